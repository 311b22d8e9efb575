"""The table of published models: architectures, dilation patterns, results, recipes and checkpoint addresses.

Standard library only, so that configs, tools and documentation can read it without torch.

    ARCHS, ISOTROPIC                13 backbones and 6 isotropic models
    dilations(arch, setting)        the dilation of every block, for a task and resolution
    CLASSIFICATION, DETECTION, SEGMENTATION, MASK2FORMER    22 + 21 + 13 + 8 = 64 published rows, keyed by `row.name`
    IMAGENET22K                     classifiers of 21841 classes that the large models began as; not among the 64
    PRETRAINED                      addresses of the ImageNet checkpoints of both, by name
    backbone_kwargs(row)            the keyword arguments that build a row's backbone

Units: `params_m` in millions; `gmacs` in 10^9 multiply-accumulates (what fvcore calls FLOPs); AP, PQ, mIoU and top-1 in
percent. Numbers are those of the final result tables of the NAT and DiNAT releases; the first preprint differs by up
to 0.9. Whatever follows from something else (names, addresses, configs, dilations) is a property, not a column.
"""

from __future__ import annotations

from .archs import (
    ARCHS,
    DILATION_SETTINGS,
    ISOTROPIC,
    Arch,
    Isotropic,
    arch,
    backbone_kwargs,
    dilations,
    find,
    isotropic,
)
from .mask2former import MASK2FORMER, Mask2Former
from .rows import (
    BOX_HEADS,
    CLASSIFICATION,
    DETECTION,
    IMAGENET22K,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRETRAINED,
    SEGMENTATION,
    Classification,
    Detection,
    ImageNet22k,
    Segmentation,
)

__all__ = [
    "ARCHS", "ISOTROPIC", "Arch", "Isotropic", "arch", "isotropic", "backbone_kwargs", "dilations",
    "DILATION_SETTINGS", "find",
    "CLASSIFICATION", "DETECTION", "SEGMENTATION", "MASK2FORMER", "IMAGENET22K", "PRETRAINED", "BOX_HEADS",
    "IMAGENET_MEAN", "IMAGENET_STD",
    "Classification", "ImageNet22k", "Detection", "Segmentation", "Mask2Former", "Row", "rows",
]  # fmt: skip

Row = Classification | Detection | Segmentation | Mask2Former


def rows() -> tuple[Row, ...]:
    """All 64 published rows."""
    return (*CLASSIFICATION.values(), *DETECTION.values(), *SEGMENTATION.values(), *MASK2FORMER.values())
