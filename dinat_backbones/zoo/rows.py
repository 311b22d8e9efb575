"""Published rows of ImageNet classification, COCO detection and ADE20K segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .archs import ARCHS, ISOTROPIC, Arch

# RGB, on the 0..255 scale
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def url(file: str) -> str:
    return f"https://shi-labs.com/projects/{file}.pth"


# --------------------------------------------------------------------------------------------- rows: classification


@dataclass(frozen=True)
class Classification:
    """ImageNet-1k, measured at `resolution` (square, bicubic resize, centre crop of `crop_fraction`)."""

    arch: str  # a key of ARCHS or ISOTROPIC
    params_m: int
    gmacs: float
    top1: float
    pretraining: str | None = None  # "in22k": fine-tuned from an ImageNet-22k model
    resolution: int = 224
    kernel_size: int | None = Arch.kernel_size
    drop_path_rate: float | None = None  # None: not published
    file_tag: str = "in1k"

    num_classes: ClassVar[int] = 1000

    @property
    def name(self) -> str:
        size = "" if self.resolution == 224 else f"_{self.resolution}"
        return self.arch + size + ("_11x11" if self.kernel_size == 11 else "")

    @property
    def crop_fraction(self) -> float:
        return 0.875 if self.resolution == 224 else 1.0

    @property
    def dilations(self) -> str:
        return f"imagenet-{self.resolution}" + ("-k11" if self.kernel_size == 11 else "")

    @property
    def checkpoint(self) -> str:
        if self.arch in ARCHS and ARCHS[self.arch].family == "NAT":
            return url(f"nat/checkpoints/CLS/{self.arch}")
        folder = "isotropic" if self.arch in ISOTROPIC else "imagenet1k"
        kernel = "_11x11" if self.kernel_size == 11 else ""
        return url(f"dinat/checkpoints/{folder}/{self.arch}_{self.file_tag}_{self.resolution}{kernel}")


CLASSIFICATION: dict[str, Classification] = {r.name: r for r in (
    #              backbone           params gmacs  top-1
    Classification("nat_mini",       20,   2.7, 81.8),
    Classification("nat_tiny",       28,   4.3, 83.2),
    Classification("nat_small",      51,   7.8, 83.7),
    Classification("nat_base",       90,  13.7, 84.3),
    Classification("dinat_mini",     20,   2.7, 81.8),
    Classification("dinat_tiny",     28,   4.3, 82.7),
    Classification("dinat_small",    51,   7.8, 83.8),
    Classification("dinat_base",     90,  13.7, 84.4),
    Classification("dinat_large",   200,  30.6, 86.6, "in22k", file_tag="in22k_in1k"),
    Classification("dinat_large",   200,  89.7, 87.4, "in22k", 384, file_tag="in22k_in1k"),
    Classification("dinat_large",   200,  92.4, 87.5, "in22k", 384, 11, file_tag="in22k_in1k"),
    Classification("dinat_s_tiny",   28,   4.5, 81.8),
    Classification("dinat_s_small",  50,   8.7, 83.5),
    Classification("dinat_s_base",   88,  15.4, 83.8),
    Classification("dinat_s_large", 197,  34.5, 86.5, "in22k"),
    Classification("dinat_s_large", 197, 101.5, 87.4, "in22k", 384),
    *(Classification(*row, kernel_size=ISOTROPIC[row[0]].kernel_size, drop_path_rate=ISOTROPIC[row[0]].drop_path_rate)
      for row in (
        ("nat_isotropic_small",   22,  4.3, 80.0),
        ("dinat_isotropic_small", 22,  4.3, 80.8),
        ("vitrpb_small",          22,  4.6, 81.2),
        ("nat_isotropic_base",    86, 16.9, 81.6),
        ("dinat_isotropic_base",  86, 16.9, 82.1),
        ("vitrpb_base",           86, 17.5, 82.5))),
)}  # fmt: skip


@dataclass(frozen=True)
class ImageNet22k:
    """ImageNet-22k at 224. The 11x11 file is the 7x7 one with its rpb tables resized."""

    arch: str
    kernel_size: int = Arch.kernel_size

    num_classes: ClassVar[int] = 21841
    resolution: ClassVar[int] = 224
    crop_fraction: ClassVar[float] = 0.875
    dilations: ClassVar[str] = "imagenet-224"
    drop_path_rate: ClassVar[None] = None

    @property
    def name(self) -> str:
        return f"{self.arch}_21k" + ("_11x11" if self.kernel_size == 11 else "")

    @property
    def checkpoint(self) -> str:
        kernel = "_11x11interp" if self.kernel_size == 11 else ""
        return url(f"dinat/checkpoints/imagenet22k/{self.arch}_in22k_224{kernel}")


IMAGENET22K: dict[str, ImageNet22k] = {
    r.name: r for r in (ImageNet22k("dinat_large"), ImageNet22k("dinat_large", 11), ImageNet22k("dinat_s_large"))
}
PRETRAINED: dict[str, str] = {name: row.checkpoint for name, row in CLASSIFICATION.items()} | {
    name: row.checkpoint for name, row in IMAGENET22K.items()
}


class Downstream:
    """What rows of dense tasks share: a backbone that starts from an ImageNet checkpoint."""

    arch: str
    kernel_size: ClassVar[int] = Arch.kernel_size
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # AdamW
    samples_per_gpu: ClassVar[int] = 2  # on 8 GPUs: 16 images a step

    @property
    def family(self) -> str:
        return ARCHS[self.arch].family

    @property
    def pretrained(self) -> str:
        """Key into PRETRAINED: the ImageNet-22k checkpoint where the backbone has one, else the ImageNet-1k one at 224."""
        return f"{self.arch}_21k" if f"{self.arch}_21k" in PRETRAINED else self.arch


# -------------------------------------------------------------------------------------------------- rows: detection

# The box head of each detector, in mmdet's words; a cascade has three of them.
BOX_HEADS: dict[str, dict[str, Any]] = {
    "mask_rcnn": {"type": "Shared2FCBBoxHead", "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0}},
    "cascade_mask_rcnn": {
        "type": "ConvFCBBoxHead", "num_shared_convs": 4, "num_shared_fcs": 1, "conv_out_channels": 256,
        "norm_cfg": {"type": "SyncBN", "requires_grad": True}, "reg_decoded_bbox": True,
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0},
    },
}  # fmt: skip
# Copied from Swin's recipe by most DiNAT_s rows; no backbone has a parameter of the first name.
_SWIN_NO_DECAY = ("absolute_pos_embed", "rpb", "norm")


@dataclass(frozen=True)
class Detection(Downstream):
    """COCO val2017, single scale 800 x 1333, with AdamW and the "3x" schedule of the class constants."""

    arch: str
    params_m: int
    gmacs: int
    box_ap: float
    mask_ap: float
    detector: str  # "mask_rcnn" | "cascade_mask_rcnn"
    drop_path_rate: float
    lr: float = 1e-4
    fp16: bool = True
    no_decay: tuple[str, ...] = ("rpb", "norm")  # substrings of the parameters without weight decay

    dilations: ClassVar[str] = "coco"
    flops_input: ClassVar[tuple[int, int]] = (1280, 800)  # width, height
    weight_decay: ClassVar[float] = 0.05
    epochs: ClassVar[int] = 36
    lr_drops: ClassVar[tuple[int, ...]] = (27, 33)  # after these epochs, to a tenth
    warmup_iters: ClassVar[int] = 500  # linear, from this fraction of lr:
    warmup_ratio: ClassVar[float] = 0.001

    @property
    def name(self) -> str:
        return f"{self.detector}_{self.arch}"

    @property
    def original_config(self) -> str:
        return f"{self.family.lower()}/{self.name}_3x_coco.py"

    @property
    def config(self) -> str:
        """Path under configs/, named as mmdet names its own."""
        head = "fpn_4conv1fc-giou" if self.detector == "cascade_mask_rcnn" else "fpn"
        names = f"{self.detector} {self.arch}".replace("_", "-").replace(" ", "_")
        amp = "amp-" if self.fp16 else ""
        return f"mmdet/{self.family.lower()}/{names}_{head}_{amp}ms-crop-3x_coco.py"

    @property
    def checkpoint(self) -> str:
        cascade = self.detector == "cascade_mask_rcnn"
        if self.family == "NAT":
            return url(f"nat/checkpoints/DET/{self.arch}_{'cascade' if cascade else ''}maskrcnn")
        return url(f"dinat/checkpoints/coco/{'cascaded' if cascade else ''}maskrcnn_{self.arch}")


DETECTION: dict[str, Detection] = {r.name: r for r in (
    #         backbone          params gmacs   box  mask  detector            drop path
    Detection("nat_mini",       40,  225, 46.5, 41.7, "mask_rcnn",         0.2),
    Detection("nat_tiny",       48,  258, 47.7, 42.6, "mask_rcnn",         0.2),
    Detection("nat_small",      70,  330, 48.4, 43.2, "mask_rcnn",         0.35),
    Detection("nat_mini",       77,  704, 50.3, 43.6, "cascade_mask_rcnn", 0.2),
    Detection("nat_tiny",       85,  737, 51.4, 44.5, "cascade_mask_rcnn", 0.3),
    Detection("nat_small",     108,  809, 52.0, 44.9, "cascade_mask_rcnn", 0.3),
    Detection("nat_base",      147,  931, 52.3, 45.1, "cascade_mask_rcnn", 0.5),
    Detection("dinat_mini",     40,  225, 47.2, 42.5, "mask_rcnn",         0.2),
    Detection("dinat_tiny",     48,  258, 48.6, 43.5, "mask_rcnn",         0.2),
    Detection("dinat_small",    70,  330, 49.3, 44.0, "mask_rcnn",         0.35),
    Detection("dinat_mini",     77,  704, 51.2, 44.4, "cascade_mask_rcnn", 0.2),
    Detection("dinat_tiny",     85,  737, 52.2, 45.1, "cascade_mask_rcnn", 0.3),
    Detection("dinat_small",   108,  809, 52.9, 45.8, "cascade_mask_rcnn", 0.5),
    Detection("dinat_base",    147,  931, 53.4, 46.2, "cascade_mask_rcnn", 0.6, lr=7.5e-5),
    Detection("dinat_large",   258, 1276, 55.3, 47.8, "cascade_mask_rcnn", 0.6, lr=7.5e-5, fp16=False),
    Detection("dinat_s_tiny",   48,  263, 46.6, 42.1, "mask_rcnn",         0.2,  no_decay=_SWIN_NO_DECAY),
    Detection("dinat_s_small",  69,  350, 48.6, 43.5, "mask_rcnn",         0.35, no_decay=_SWIN_NO_DECAY),
    Detection("dinat_s_tiny",   86,  742, 51.0, 44.1, "cascade_mask_rcnn", 0.3,  no_decay=_SWIN_NO_DECAY),
    Detection("dinat_s_small", 107,  829, 52.3, 45.2, "cascade_mask_rcnn", 0.5,  no_decay=_SWIN_NO_DECAY),
    Detection("dinat_s_base",  145,  966, 52.6, 45.3, "cascade_mask_rcnn", 0.6, lr=7.5e-5, no_decay=_SWIN_NO_DECAY),
    Detection("dinat_s_large", 253, 1357, 54.8, 47.2, "cascade_mask_rcnn", 0.6, lr=5e-5),
)}  # fmt: skip


# ----------------------------------------------------------------------------------------------- rows: segmentation


@dataclass(frozen=True)
class Segmentation(Downstream):
    """ADE20K val with UPerNet: mIoU at one scale, and over the scales of `tta_ratios` with flip, on whole images.

    `size` is the crop that a row is named after, was measured at and has its dilations from. The released configs of
    the two `large` rows nevertheless kept the 512 crop and the 2048 x 512 scale of the smaller models, by accident:
    those are `released_crop` and `released_scale`.
    """

    arch: str
    params_m: int
    gmacs: int
    miou_single_scale: float
    miou_multi_scale: float
    drop_path_rate: float
    size: int = 512
    fp16: bool = True

    released_crop: ClassVar[tuple[int, int]] = (512, 512)
    released_scale: ClassVar[tuple[int, int]] = (2048, 512)  # long side, short side
    tta_ratios: ClassVar[tuple[float, ...]] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    lr: ClassVar[float] = 6e-5
    weight_decay: ClassVar[float] = 0.01
    no_decay: ClassVar[tuple[str, ...]] = ("rpb", "norm")
    iters: ClassVar[int] = 160_000  # lr falls to 0 as a polynomial of this power:
    poly_power: ClassVar[float] = 1.0
    warmup_iters: ClassVar[int] = 1500  # linear, from this fraction of lr:
    warmup_ratio: ClassVar[float] = 1e-6

    @property
    def name(self) -> str:
        return f"upernet_{self.arch}"

    @property
    def scale(self) -> tuple[int, int]:
        """Long and short side that images are resized to, for training (times 0.5 to 2), testing and counting MACs."""
        return 4 * self.size, self.size

    @property
    def dilations(self) -> str:
        return f"ade20k-{self.size}"

    @property
    def original_config(self) -> str:
        return f"{self.family.lower()}/{self.name}_{self.size}x{self.size}_160k_ade20k.py"

    @property
    def config(self) -> str:
        """Path under configs/, named as mmseg names its own."""
        backbone, amp = self.arch.replace("_", "-"), "amp-" if self.fp16 else ""
        return f"mmseg/{self.family.lower()}/{backbone}_upernet_8xb2-{amp}160k_ade20k-{self.size}x{self.size}.py"

    @property
    def checkpoint(self) -> str:
        if self.family == "NAT":
            return url(f"nat/checkpoints/SEG/{self.arch}_upernet")
        return url(f"dinat/checkpoints/ade20k/upernet_{self.arch}")


SEGMENTATION: dict[str, Segmentation] = {r.name: r for r in (
    #            backbone          params gmacs  mIoU multi drop path
    Segmentation("nat_mini",       50,  900, 45.1, 46.4, 0.2),
    Segmentation("nat_tiny",       58,  934, 47.1, 48.4, 0.3),
    Segmentation("nat_small",      82, 1010, 48.0, 49.5, 0.5),
    Segmentation("nat_base",      123, 1137, 48.5, 49.7, 0.5),
    Segmentation("dinat_mini",     50,  900, 45.8, 47.2, 0.2),
    Segmentation("dinat_tiny",     58,  934, 47.8, 48.8, 0.3),
    Segmentation("dinat_small",    82, 1010, 48.9, 49.9, 0.5),
    Segmentation("dinat_base",    123, 1137, 49.6, 50.4, 0.5),
    Segmentation("dinat_large",   238, 2335, 54.0, 54.9, 0.3, size=640, fp16=False),
    Segmentation("dinat_s_tiny",   60,  941, 46.0, 47.4, 0.3),
    Segmentation("dinat_s_small",  81, 1030, 48.6, 49.9, 0.3),
    Segmentation("dinat_s_base",  121, 1173, 49.4, 50.2, 0.3),
    Segmentation("dinat_s_large", 234, 2466, 53.4, 54.6, 0.3, size=640),
)}  # fmt: skip
