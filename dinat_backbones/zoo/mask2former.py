"""Published rows of Mask2Former."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from .archs import backbone_kwargs
from .rows import IMAGENET_MEAN, IMAGENET_STD, PRETRAINED, Downstream, url

_M2F_OUTPUTS = {"semantic": ("semantic",), "instance": ("instance",), "panoptic": ("semantic", "instance", "panoptic")}
_RES = ["res2", "res3", "res4", "res5"]


def _under(prefix: str, **values: Any) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in values.items()}


_M2F_COMMON = {
    **_under("MODEL", META_ARCHITECTURE="MaskFormer", PIXEL_MEAN=list(IMAGENET_MEAN), PIXEL_STD=list(IMAGENET_STD)),
    **_under("MODEL.BACKBONE", NAME="D2DiNAT", FREEZE_AT=0),
    # left over from the ResNet base files, nothing here reads it
    **_under("MODEL.RESNETS", OUT_FEATURES=_RES, STEM_TYPE="basic", STRIDE_IN_1X1=False, RES5_MULTI_GRID=[1, 1, 1]),
    **_under("MODEL.SEM_SEG_HEAD", NAME="MaskFormerHead", IN_FEATURES=_RES, CONVS_DIM=256, TRANSFORMER_ENC_LAYERS=6),
    **_under("MODEL.SEM_SEG_HEAD", PIXEL_DECODER_NAME="MSDeformAttnPixelDecoder"),
    **_under("MODEL.MASK_FORMER", TRANSFORMER_IN_FEATURE="multi_scale_pixel_decoder", DEC_LAYERS=10, DROPOUT=0.0),
    **_under("MODEL.MASK_FORMER", CLASS_WEIGHT=2.0, DICE_WEIGHT=5.0, MASK_WEIGHT=5.0),
    **_under("MODEL.MASK_FORMER.TEST", OBJECT_MASK_THRESHOLD=0.8, OVERLAP_THRESHOLD=0.8),
    **_under("SOLVER.CLIP_GRADIENTS", ENABLED=True, CLIP_TYPE="full_model", CLIP_VALUE=0.01),
    "SOLVER.WARMUP_FACTOR": 1.0,
    "INPUT.FORMAT": "RGB",
    "TEST.EVAL_PERIOD": 5000,
}


def _cropped(short: int, crop: list[int], longest: int, longest_tta: int, iters: int) -> dict[str, Any]:
    """Training on crops of images whose short side is 0.5 to 2 times `short`, with a learning rate falling to 0."""
    train_sides = [int(0.1 * tenths * short) for tenths in range(5, 21)]
    test_sides = [short * quarters // 4 for quarters in range(2, 8)]
    return {
        **_under("INPUT", MIN_SIZE_TRAIN=train_sides, MAX_SIZE_TRAIN=4 * short, COLOR_AUG_SSD=True),
        **_under("INPUT", MIN_SIZE_TEST=short, MAX_SIZE_TEST=longest),
        **_under("INPUT.CROP", ENABLED=True, TYPE="absolute", SIZE=crop),
        **_under("SOLVER", LR_SCHEDULER_NAME="WarmupPolyLR", MAX_ITER=iters, WARMUP_ITERS=0),
        **_under("TEST.AUG", MIN_SIZES=test_sides, MAX_SIZE=longest_tta),
    }


_M2F_DATASETS = {
    "coco": _under("SOLVER", MAX_ITER=737_500, STEPS=[655_556, 710_184], WARMUP_ITERS=10),
    "ade20k": {**_cropped(640, [640, 640], 2560, 4480, 160_000), "INPUT.SIZE_DIVISIBILITY": 640},
    "cityscapes": {**_cropped(1024, [512, 1024], 2048, 4096, 90_000), "MODEL.RESNETS.NORM": "SyncBN"},
}

_M2F_CONFIGS = {
    "coco/instance-segmentation": "mmdet/dinat/{}_16xb1-lsj-100e_coco.py",
    "coco/panoptic-segmentation": "mmdet/dinat/{}_16xb1-lsj-100e_coco-panoptic.py",
    "ade20k/instance-segmentation": "mmdet/dinat/{}_8xb2-160k_ade20k-instance.py",
    "ade20k/semantic-segmentation": "mmseg/dinat/{}_8xb2-160k_ade20k-640x640.py",
    "ade20k/panoptic-segmentation": "mmdet/dinat/{}_8xb2-160k_ade20k-panoptic.py",
    "cityscapes/instance-segmentation": "mmdet/dinat/{}_8xb2-90k_cityscapes-instance.py",
    "cityscapes/semantic-segmentation": "mmseg/dinat/{}_8xb2-90k_cityscapes-512x1024.py",
}


@dataclass(frozen=True)
class Mask2Former(Downstream):
    """Mask2Former in detectron2, without AMP, measured on the validation set; `gmacs` is the average over its images.

    PQ, AP (of masks) and mIoU are single-scale; a metric is None where the row has none. The weights to start from
    (`pretrained`) have kernel size 7 while the model has 11: their rpb tables have to be resized when they are loaded.
    """

    dataset: str  # "coco" | "ade20k" | "cityscapes"
    task: str  # "instance" | "semantic" | "panoptic"
    gmacs: int
    num_classes: int
    data: str  # detectron2's name of the data set, with {} for the split
    pq: float | None = None
    ap: float | None = None
    miou: float | None = None
    miou_multi_scale: float | None = None
    all_outputs: bool = False  # an instance row that was configured to give all three kinds of result
    arch: str = "dinat_large"
    params_m: int = 220

    kernel_size: ClassVar[int] = 11
    dilations: ClassVar[str] = "mask2former"
    drop_path_rate: ClassVar[float] = 0.3
    lr: ClassVar[float] = 1e-4
    weight_decay: ClassVar[float] = 0.05
    fp16: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.task}-segmentation"

    @property
    def checkpoint(self) -> str:
        return url(f"dinat/checkpoints/m2f/mask2former_{self.arch}_{self.dataset}_{self.task}")

    @property
    def config(self) -> str | None:
        """Path under configs/; None for Cityscapes panoptic, which neither mmdet nor mmseg has a data set for."""
        file = _M2F_CONFIGS.get(self.name)
        return file and file.format(f"mask2former_{self.arch.replace('_', '-')}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return _M2F_OUTPUTS["panoptic" if self.all_outputs else self.task]

    def detectron2_config(self) -> dict[str, Any]:
        """What differs from the defaults of detectron2, Mask2Former and MODEL.DINAT: values by dotted key."""
        backbone = backbone_kwargs(self)
        del backbone["mlp_ratio"]  # as it is by default
        coco, panoptic = self.dataset == "coco", self.task == "panoptic"
        config = {
            **_M2F_COMMON,
            **_M2F_DATASETS[self.dataset],
            **{f"MODEL.DINAT.{key.upper()}": value for key, value in backbone.items()},
            "MODEL.WEIGHTS": PRETRAINED[self.pretrained].rpartition("/")[2].replace(".pth", ".pkl"),
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": self.num_classes,
            "DATASETS.TRAIN": [self.data.format("train")],
            # the COCO panoptic set that comes with semantic annotations has a name of its own
            "DATASETS.TEST": [self.data.format("val") + ("_with_sem_seg" if coco and panoptic else "")],
            "SOLVER.BASE_LR": self.lr,
            "SOLVER.WEIGHT_DECAY": self.weight_decay,
        }
        for kind in _M2F_OUTPUTS:
            if (kind in self.outputs) != (kind == "semantic"):  # by default semantic is on and the others are off
                config[f"MODEL.MASK_FORMER.TEST.{kind.upper()}_ON"] = kind in self.outputs
        if self.task != "semantic":
            config["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"] = 200
            config["INPUT.DATASET_MAPPER_NAME"] = f"coco_{self.task}_lsj" if coco else f"mask_former_{self.task}"
        return copy.deepcopy(config)


MASK2FORMER: dict[str, Mask2Former] = {r.name: r for r in (
    #           dataset       task    gmacs classes
    Mask2Former("coco",       "instance", 522,  80, "coco_2017_{}",                     ap=50.8),
    Mask2Former("ade20k",     "instance", 535, 100, "ade20k_instance_{}",               ap=35.4, all_outputs=True),
    Mask2Former("cityscapes", "instance", 522,   8, "cityscapes_fine_instance_seg_{}",  ap=45.1),
    Mask2Former("ade20k",     "semantic", 518, 150, "ade20k_sem_seg_{}",                miou_multi_scale=58.1),
    Mask2Former("cityscapes", "semantic", 509,  19, "cityscapes_fine_sem_seg_{}",       miou_multi_scale=84.5),
    Mask2Former("coco",       "panoptic", 522, 133, "coco_2017_{}_panoptic",            pq=58.5, ap=49.2, miou=68.3),
    Mask2Former("ade20k",     "panoptic", 535, 150, "ade20k_panoptic_{}",               pq=49.4, ap=35.0, miou=56.3),
    Mask2Former("cityscapes", "panoptic", 522,  19, "cityscapes_fine_panoptic_{}",      pq=67.2, ap=44.5, miou=83.4),
)}  # fmt: skip
