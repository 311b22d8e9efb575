"""The table of published models: architectures, dilation settings, results and checkpoint addresses.

    ARCHS, ISOTROPIC                13 backbones and 6 isotropic models
    DILATION_SETTINGS               the dilations and the kernel size of each task and resolution
    dilations(arch, setting)        the dilation of every block
    CLASSIFICATION, DETECTION, SEGMENTATION, MASK2FORMER    22 + 21 + 13 + 8 = 64 published rows, keyed by `row.name`
    IMAGENET22K                     ImageNet-22k classifiers, from which the large models start; not among the 64
    PRETRAINED                      addresses of the ImageNet-1k and ImageNet-22k checkpoints, by name

A row's backbone is ``FAMILY(arch=row.arch, dilations=row.dilations)``. The training recipe is the config `row.config`.

Units: `params_m` in millions; `gmacs` in 10^9 multiply-accumulates (what fvcore calls FLOPs); AP, PQ, mIoU and top-1 in
percent. Numbers are those of the final result tables of the NAT and DiNAT releases; the first preprint differs by up
to 0.9. What can be derived (names, addresses, configs, dilations) is a property, not a column.
"""

from __future__ import annotations

from pathlib import Path

from .archs import ARCHS, ISOTROPIC, Arch, Isotropic, arch, find, isotropic
from .dilation_settings import DILATION_SETTINGS, DilationSetting, dilation_setting, dilations, settings_of
from .rows import (
    CLASSIFICATION,
    DETECTION,
    IMAGENET22K,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MASK2FORMER,
    PRETRAINED,
    SEGMENTATION,
    Classification,
    Detection,
    ImageNet22k,
    Mask2Former,
    Segmentation,
)

__all__ = [
    "ARCHS", "ISOTROPIC", "Arch", "Isotropic", "arch", "isotropic", "find",
    "DILATION_SETTINGS", "DilationSetting", "dilation_setting", "dilations", "settings_of",
    "CLASSIFICATION", "DETECTION", "SEGMENTATION", "MASK2FORMER", "IMAGENET22K", "PRETRAINED",
    "IMAGENET_MEAN", "IMAGENET_STD",
    "Classification", "ImageNet22k", "Detection", "Segmentation", "Mask2Former", "Row", "rows", "config_folder",
    "find_config",
]  # fmt: skip

Row = Classification | Detection | Segmentation | Mask2Former


def rows() -> tuple[Row, ...]:
    """All 64 published rows."""
    return (*CLASSIFICATION.values(), *DETECTION.values(), *SEGMENTATION.values(), *MASK2FORMER.values())


def config_folder() -> Path:
    """The folder that `row.config` is relative to: configs/ of the checkout, or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / ".mim" / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The path of a config: `name` itself, or for "configs/..." and "mask2former/configs/..." that do not exist from
    here, those of the checkout or of the installed package. The file need not exist."""
    path = Path(name)
    if path.parts[:1] == ("configs",) or path.parts[:2] == ("mask2former", "configs"):
        return path if path.is_file() else config_folder().parent / path
    return path
