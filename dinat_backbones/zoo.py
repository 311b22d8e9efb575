"""The table of published models: architectures, dilation patterns, results, recipes and checkpoint addresses.

Standard library only, so that configs, tools and documentation can read it without torch.

    ARCHS, ISOTROPIC                13 trunks and 6 isotropic models
    dilations(arch, setting)        the dilation of every block, for a task and resolution
    CLASSIFICATION, DETECTION, SEGMENTATION, MASK2FORMER    22 + 21 + 13 + 8 = 64 published rows, keyed by `row.name`
    PRETRAINED                      addresses of the ImageNet checkpoints, by name
    backbone_kwargs(row)            the keyword arguments that build a row's trunk

Units: `params_m` in millions; `gmacs` in 10^9 multiply-accumulates (what fvcore calls FLOPs); AP, PQ, mIoU and top-1 in
percent. Numbers are those of the final result tables of the NAT and DiNAT releases; the first preprint differs by up
to 0.9. Whatever follows from something else (names, addresses, kernel size -> dilations) is a property, not a column.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar, TypeVar

_T = TypeVar("_T")

# RGB, on the 0..255 scale
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def _url(file: str) -> str:
    return f"https://shi-labs.com/projects/{file}.pth"


def _pick(kind: str, name: object, known: Mapping[str, _T]) -> _T:
    """`known[name]`, or an error that names the value, the nearest known name and all of them."""
    if isinstance(name, str) and name in known:
        return known[name]
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------- architectures


@dataclass(frozen=True)
class Arch:
    """A trunk of four stages at strides 4, 8, 16 and 32, of width embed_dim times 1, 2, 4 and 8."""

    name: str
    family: str  # "NAT" | "DiNAT" | "DiNAT_s"
    embed_dim: int
    depths: tuple[int, ...]
    mlp_ratio: float
    layer_scale: float | None = None
    kernel_size: int = 7

    @property
    def num_heads(self) -> tuple[int, ...]:
        """Heads of each stage: every head of every trunk is 32 wide."""
        return tuple(self.embed_dim * 2**stage // 32 for stage in range(len(self.depths)))


ARCHS: dict[str, Arch] = {a.name: a for a in (
    #    name             family    width  depths         mlp  layer scale
    Arch("nat_mini",      "NAT",      64, (3, 4, 6, 5),  3.0),
    Arch("nat_tiny",      "NAT",      64, (3, 4, 18, 5), 3.0),
    Arch("nat_small",     "NAT",      96, (3, 4, 18, 5), 2.0, 1e-5),
    Arch("nat_base",      "NAT",     128, (3, 4, 18, 5), 2.0, 1e-5),
    Arch("dinat_mini",    "DiNAT",    64, (3, 4, 6, 5),  3.0),
    Arch("dinat_tiny",    "DiNAT",    64, (3, 4, 18, 5), 3.0),
    Arch("dinat_small",   "DiNAT",    96, (3, 4, 18, 5), 2.0),
    Arch("dinat_base",    "DiNAT",   128, (3, 4, 18, 5), 2.0, 1e-5),
    Arch("dinat_large",   "DiNAT",   192, (3, 4, 18, 5), 2.0),
    Arch("dinat_s_tiny",  "DiNAT_s",  96, (2, 2, 6, 2),  4.0),
    Arch("dinat_s_small", "DiNAT_s",  96, (2, 2, 18, 2), 4.0),
    Arch("dinat_s_base",  "DiNAT_s", 128, (2, 2, 18, 2), 4.0),
    Arch("dinat_s_large", "DiNAT_s", 192, (2, 2, 18, 2), 4.0),
)}  # fmt: skip


@dataclass(frozen=True)
class Isotropic:
    """`depth` equal blocks on one grid of patches. kernel_size None: attention over the whole grid (ViT with rpb)."""

    name: str
    embed_dim: int
    num_heads: int
    drop_path_rate: float
    kernel_size: int | None
    dilation_of_odd_blocks: int | None  # blocks 1, 3, 5, ... counted from 0; the even ones have dilation 1
    depth: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    img_size: int = 224
    patch_norm: bool = True


ISOTROPIC: dict[str, Isotropic] = {m.name: m for m in (
    #         name                    width heads drop kernel dilation
    Isotropic("nat_isotropic_small",   384, 12, 0.1, 7, 1),
    Isotropic("dinat_isotropic_small", 384, 12, 0.1, 7, 2),
    Isotropic("vitrpb_small",          384, 12, 0.1, None, None),
    Isotropic("nat_isotropic_base",    768, 24, 0.4, 7, 1),
    Isotropic("dinat_isotropic_base",  768, 24, 0.4, 7, 2),
    Isotropic("vitrpb_base",           768, 24, 0.4, None, None),
)}  # fmt: skip


def arch(name: str) -> Arch:
    """The trunk of that name; ValueError with the known names otherwise."""
    if isinstance(name, str) and name in ISOTROPIC:
        raise ValueError(f"{name!r} is an isotropic model, not a trunk with stages: look in ISOTROPIC")
    return _pick("architecture", name, ARCHS)


# -------------------------------------------------------------------------------------------------------- dilations


@dataclass(frozen=True)
class _Pattern:
    """Dilations of the four stages: cycled to a deeper stage's depth, while a shallower one takes the end of it."""

    stages: tuple[tuple[int, ...], ...]
    families: tuple[str, ...] = ("DiNAT", "DiNAT_s")


# The widest dilation of a stage is about what fits: kernel x dilation <= the stage's map at the training resolution
# (7 x 8 = 224 / 4, 7 x 28 <= 800 / 4, 11 x 14 <= 640 / 4). Hence the settings: a task, a size and a kernel size.
_PATTERNS = {
    "imagenet-224": _Pattern(((1, 8), (1, 4), (1, 2), (1,))),
    "imagenet-384": _Pattern(((1, 13), (1, 6), (1, 3), (1,))),
    "imagenet-384-k11": _Pattern(((1, 8), (1, 4), (1, 2), (1,)), ("DiNAT",)),
    "coco": _Pattern(((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3))),
    "ade20k-512": _Pattern(((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))),
    "ade20k-640": _Pattern(((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5) * 2 + (1, 5), (1, 2))),
    "mask2former": _Pattern(((1, 14), (1, 4, 1, 7), (1, 2, 1, 3) * 4 + (1, 3), (1,)), ("DiNAT",)),  # kernel 11
}
DILATION_SETTINGS: tuple[str, ...] = tuple(_PATTERNS)


def dilations(arch_name: str, setting: str) -> tuple[tuple[int, ...], ...] | None:
    """The dilation of every block of every stage, published for that setting; None (all ones) for every NAT."""
    trunk, pattern = arch(arch_name), _pick("dilation setting", setting, _PATTERNS)
    if trunk.family == "NAT":
        return None
    if trunk.family not in pattern.families:
        choices = ", ".join(s for s, p in _PATTERNS.items() if trunk.family in p.families)
        raise ValueError(f"dilation setting {setting!r} was never published for {trunk.family}. Choices: {choices}")
    return tuple(
        tuple(islice(cycle(stage[-depth:]), depth)) for stage, depth in zip(pattern.stages, trunk.depths, strict=True)
    )


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
            return _url(f"nat/checkpoints/CLS/{self.arch}")
        folder = "isotropic" if self.arch in ISOTROPIC else "imagenet1k"
        kernel = "_11x11" if self.kernel_size == 11 else ""
        return _url(f"dinat/checkpoints/{folder}/{self.arch}_{self.file_tag}_{self.resolution}{kernel}")


CLASSIFICATION: dict[str, Classification] = {r.name: r for r in (
    #              trunk           params gmacs  top-1
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

# The ImageNet-22k files have heads of 21841 classes. The 11x11 one is the 7x7 one with its rpb tables resized.
PRETRAINED: dict[str, str] = {name: row.checkpoint for name, row in CLASSIFICATION.items()} | {
    "dinat_large_21k": _url("dinat/checkpoints/imagenet22k/dinat_large_in22k_224"),
    "dinat_large_21k_11x11": _url("dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp"),
    "dinat_s_large_21k": _url("dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224"),
}


class _Downstream:
    """What rows of dense tasks share: a trunk that starts from an ImageNet checkpoint."""

    arch: str
    kernel_size: ClassVar[int] = Arch.kernel_size
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # AdamW
    samples_per_gpu: ClassVar[int] = 2  # on 8 GPUs: 16 images a step

    @property
    def family(self) -> str:
        return ARCHS[self.arch].family

    @property
    def pretrained(self) -> str:
        """Key into PRETRAINED: the ImageNet-22k checkpoint where the trunk has one, else the ImageNet-1k one at 224."""
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
# Copied from Swin's recipe by most DiNAT_s rows; no trunk has a parameter of the first name.
_SWIN_NO_DECAY = ("absolute_pos_embed", "rpb", "norm")


@dataclass(frozen=True)
class Detection(_Downstream):
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
    def checkpoint(self) -> str:
        cascade = self.detector == "cascade_mask_rcnn"
        if self.family == "NAT":
            return _url(f"nat/checkpoints/DET/{self.arch}_{'cascade' if cascade else ''}maskrcnn")
        return _url(f"dinat/checkpoints/coco/{'cascaded' if cascade else ''}maskrcnn_{self.arch}")


DETECTION: dict[str, Detection] = {r.name: r for r in (
    #         trunk          params gmacs   box  mask  detector            drop path
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
class Segmentation(_Downstream):
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
    def checkpoint(self) -> str:
        if self.family == "NAT":
            return _url(f"nat/checkpoints/SEG/{self.arch}_upernet")
        return _url(f"dinat/checkpoints/ade20k/upernet_{self.arch}")


SEGMENTATION: dict[str, Segmentation] = {r.name: r for r in (
    #            trunk          params gmacs  mIoU multi drop path
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


# ------------------------------------------------------------------------------------------------ rows: Mask2Former

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


@dataclass(frozen=True)
class Mask2Former(_Downstream):
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
        return _url(f"dinat/checkpoints/m2f/mask2former_{self.arch}_{self.dataset}_{self.task}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return _M2F_OUTPUTS["panoptic" if self.all_outputs else self.task]

    def detectron2_config(self) -> dict[str, Any]:
        """What differs from the defaults of detectron2, Mask2Former and MODEL.DINAT: values by dotted key."""
        trunk = backbone_kwargs(self)
        del trunk["mlp_ratio"]  # as it is by default
        coco, panoptic = self.dataset == "coco", self.task == "panoptic"
        config = {
            **_M2F_COMMON,
            **_M2F_DATASETS[self.dataset],
            **{f"MODEL.DINAT.{key.upper()}": value for key, value in trunk.items()},
            "MODEL.WEIGHTS": PRETRAINED[self.pretrained].rpartition("/")[2].replace(".pth", ".pkl"),
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": self.num_classes,
            "DATASETS.TRAIN": [self.data.format("train")],
            # the COCO panoptic set that comes with semantic ground truth has a name of its own
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


# --------------------------------------------------------------------------------------------------- all rows alike

Row = Classification | Detection | Segmentation | Mask2Former


def rows() -> tuple[Row, ...]:
    """All 64 published rows."""
    return (*CLASSIFICATION.values(), *DETECTION.values(), *SEGMENTATION.values(), *MASK2FORMER.values())


def backbone_kwargs(row: Row) -> dict[str, Any]:
    """What builds the row's trunk, as plain numbers and lists; an argument that is None for the row is left out."""
    trunk, pattern = arch(row.arch), dilations(row.arch, row.dilations)
    kwargs = {
        "embed_dim": trunk.embed_dim,
        "depths": list(trunk.depths),
        "num_heads": list(trunk.num_heads),
        "kernel_size": row.kernel_size,
        "dilations": pattern and [list(stage) for stage in pattern],
        "mlp_ratio": trunk.mlp_ratio,
        "layer_scale": trunk.layer_scale,
        "drop_path_rate": row.drop_path_rate,
    }
    return {key: value for key, value in kwargs.items() if value is not None}
