"""The published results, a row each: ImageNet classification, COCO detection, ADE20K segmentation, Mask2Former.

A row holds what was published about a trained model: its backbone, size, results and checkpoint. The training recipe
is in its config only (`row.config`, under configs/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    kernel_size: int | None = Arch.kernel_size  # None: attention over the whole map (ViT-rpb)
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
    def dilations(self) -> str | None:
        """A key of DILATION_SETTINGS; None for NAT and for isotropic models, which have none."""
        if self.arch in ISOTROPIC or ARCHS[self.arch].family == "NAT":
            return None
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
    *(Classification(*row, kernel_size=ISOTROPIC[row[0]].kernel_size) for row in (
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

    @property
    def name(self) -> str:
        return f"{self.arch}_21k" + ("_11x11" if self.kernel_size == 11 else "")

    @property
    def dilations(self) -> str:
        """A key of DILATION_SETTINGS; the 11x11 file has those of 224, which are also those of 11x11 at 384."""
        return "imagenet-384-k11" if self.kernel_size == 11 else "imagenet-224"

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
    """Base class of the rows of dense tasks."""

    arch: str

    @property
    def family(self) -> str:
        return ARCHS[self.arch].family


# -------------------------------------------------------------------------------------------------- rows: detection


@dataclass(frozen=True)
class Detection(Downstream):
    """COCO val2017 at a single scale, 800 x 1333, after the "3x" schedule."""

    arch: str
    params_m: int
    gmacs: int
    box_ap: float
    mask_ap: float
    detector: str  # "mask_rcnn" | "cascade_mask_rcnn"
    fp16: bool = True  # trained in mixed precision ("amp" in the config's name)

    flops_input: ClassVar[tuple[int, int]] = (1280, 800)  # width, height

    @property
    def name(self) -> str:
        return f"{self.detector}_{self.arch}"

    @property
    def dilations(self) -> str | None:
        """A key of DILATION_SETTINGS; None for NAT."""
        return None if self.family == "NAT" else "coco"

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
    #         backbone          params gmacs   box  mask  detector
    Detection("nat_mini",       40,  225, 46.5, 41.7, "mask_rcnn"),
    Detection("nat_tiny",       48,  258, 47.7, 42.6, "mask_rcnn"),
    Detection("nat_small",      70,  330, 48.4, 43.2, "mask_rcnn"),
    Detection("nat_mini",       77,  704, 50.3, 43.6, "cascade_mask_rcnn"),
    Detection("nat_tiny",       85,  737, 51.4, 44.5, "cascade_mask_rcnn"),
    Detection("nat_small",     108,  809, 52.0, 44.9, "cascade_mask_rcnn"),
    Detection("nat_base",      147,  931, 52.3, 45.1, "cascade_mask_rcnn"),
    Detection("dinat_mini",     40,  225, 47.2, 42.5, "mask_rcnn"),
    Detection("dinat_tiny",     48,  258, 48.6, 43.5, "mask_rcnn"),
    Detection("dinat_small",    70,  330, 49.3, 44.0, "mask_rcnn"),
    Detection("dinat_mini",     77,  704, 51.2, 44.4, "cascade_mask_rcnn"),
    Detection("dinat_tiny",     85,  737, 52.2, 45.1, "cascade_mask_rcnn"),
    Detection("dinat_small",   108,  809, 52.9, 45.8, "cascade_mask_rcnn"),
    Detection("dinat_base",    147,  931, 53.4, 46.2, "cascade_mask_rcnn"),
    Detection("dinat_large",   258, 1276, 55.3, 47.8, "cascade_mask_rcnn", fp16=False),
    Detection("dinat_s_tiny",   48,  263, 46.6, 42.1, "mask_rcnn"),
    Detection("dinat_s_small",  69,  350, 48.6, 43.5, "mask_rcnn"),
    Detection("dinat_s_tiny",   86,  742, 51.0, 44.1, "cascade_mask_rcnn"),
    Detection("dinat_s_small", 107,  829, 52.3, 45.2, "cascade_mask_rcnn"),
    Detection("dinat_s_base",  145,  966, 52.6, 45.3, "cascade_mask_rcnn"),
    Detection("dinat_s_large", 253, 1357, 54.8, 47.2, "cascade_mask_rcnn"),
)}  # fmt: skip


# ----------------------------------------------------------------------------------------------- rows: segmentation


@dataclass(frozen=True)
class Segmentation(Downstream):
    """ADE20K val with UPerNet, on whole images: mIoU at one scale, and over scales of 0.5 to 1.75 times it, with flip.

    `size`, the side of the training crop, determines the config's name, the test scale and the dilations. (The released
    configs of the two `large` rows kept the 512 crop and the 2048 x 512 scale of the smaller models, by accident.)
    """

    arch: str
    params_m: int
    gmacs: int
    miou_single_scale: float
    miou_multi_scale: float
    size: int = 512
    fp16: bool = True  # trained in mixed precision ("amp" in the config's name)

    @property
    def name(self) -> str:
        return f"upernet_{self.arch}"

    @property
    def scale(self) -> tuple[int, int]:
        """Long and short side of the single-scale test; also the size at which MACs are counted."""
        return 4 * self.size, self.size

    @property
    def dilations(self) -> str | None:
        """A key of DILATION_SETTINGS; None for NAT."""
        return None if self.family == "NAT" else f"ade20k-{self.size}"

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
    #            backbone          params gmacs  mIoU multi
    Segmentation("nat_mini",       50,  900, 45.1, 46.4),
    Segmentation("nat_tiny",       58,  934, 47.1, 48.4),
    Segmentation("nat_small",      82, 1010, 48.0, 49.5),
    Segmentation("nat_base",      123, 1137, 48.5, 49.7),
    Segmentation("dinat_mini",     50,  900, 45.8, 47.2),
    Segmentation("dinat_tiny",     58,  934, 47.8, 48.8),
    Segmentation("dinat_small",    82, 1010, 48.9, 49.9),
    Segmentation("dinat_base",    123, 1137, 49.6, 50.4),
    Segmentation("dinat_large",   238, 2335, 54.0, 54.9, size=640, fp16=False),
    Segmentation("dinat_s_tiny",   60,  941, 46.0, 47.4),
    Segmentation("dinat_s_small",  81, 1030, 48.6, 49.9),
    Segmentation("dinat_s_base",  121, 1173, 49.4, 50.2),
    Segmentation("dinat_s_large", 234, 2466, 53.4, 54.6, size=640),
)}  # fmt: skip


# ------------------------------------------------------------------------------------------------ rows: Mask2Former

_MASK2FORMER_CONFIGS = {
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
    """Mask2Former in Detectron2, measured on the validation set; `gmacs` is the average over its images.

    PQ, AP (of masks) and mIoU are single-scale; a metric is None where the row has none. The recipe is the YAML file
    in mask2former/configs/, in the folder of the row's name.
    """

    dataset: str  # "coco" | "ade20k" | "cityscapes"
    task: str  # "instance" | "semantic" | "panoptic"
    gmacs: int
    num_classes: int
    pq: float | None = None
    ap: float | None = None
    miou: float | None = None
    miou_multi_scale: float | None = None
    arch: str = "dinat_large"
    params_m: int = 220

    dilations: ClassVar[str] = "mask2former"

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.task}-segmentation"

    @property
    def checkpoint(self) -> str:
        return url(f"dinat/checkpoints/m2f/mask2former_{self.arch}_{self.dataset}_{self.task}")

    @property
    def config(self) -> str | None:
        """Path under configs/; None for Cityscapes panoptic: neither mmdet nor mmseg has a data set for it."""
        file = _MASK2FORMER_CONFIGS.get(self.name)
        return file and file.format(f"mask2former_{self.arch.replace('_', '-')}")


MASK2FORMER: dict[str, Mask2Former] = {r.name: r for r in (
    #           dataset       task      gmacs classes
    Mask2Former("coco",       "instance", 522,  80, ap=50.8),
    Mask2Former("ade20k",     "instance", 535, 100, ap=35.4),
    Mask2Former("cityscapes", "instance", 522,   8, ap=45.1),
    Mask2Former("ade20k",     "semantic", 518, 150, miou_multi_scale=58.1),
    Mask2Former("cityscapes", "semantic", 509,  19, miou_multi_scale=84.5),
    Mask2Former("coco",       "panoptic", 522, 133, pq=58.5, ap=49.2, miou=68.3),
    Mask2Former("ade20k",     "panoptic", 535, 150, pq=49.4, ap=35.0, miou=56.3),
    Mask2Former("cityscapes", "panoptic", 522,  19, pq=67.2, ap=44.5, miou=83.4),
)}  # fmt: skip
