"""The dilation of every block, for each published setting: a task, a resolution and a kernel size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from .archs import arch, find


@dataclass(frozen=True)
class DilationSetting:
    """Dilations per stage: repeated for a stage with more blocks; one with fewer blocks takes the last ones."""

    name: str
    task: str
    stages: tuple[tuple[int, ...], ...]
    kernel_size: int = 7
    families: tuple[str, ...] = ("DiNAT", "DiNAT_s")

    def __str__(self) -> str:
        return f"{self.name!r} ({self.task}, kernel size {self.kernel_size})"

    def per_block(self, depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The dilation of every block for stages with `depths` blocks; ValueError unless there are four stages."""
        if len(depths) != len(self.stages):
            raise ValueError(f"dilations={self.name!r} is for {len(self.stages)} stages, but depths={list(depths)}")
        return tuple(
            tuple(islice(cycle(stage[-depth:]), depth)) for stage, depth in zip(self.stages, depths, strict=True)
        )


# The largest dilation of a stage is about the largest that fits its map at the training resolution:
# 7 x 8 = 224 / 4, 7 x 28 <= 800 / 4, 11 x 14 <= 640 / 4.
DILATION_SETTINGS: dict[str, DilationSetting] = {s.name: s for s in (
    DilationSetting("imagenet-224", "classification at 224x224", ((1, 8), (1, 4), (1, 2), (1,))),
    DilationSetting("imagenet-384", "classification at 384x384", ((1, 13), (1, 6), (1, 3), (1,))),
    DilationSetting("imagenet-384-k11", "classification at 384x384",
                    ((1, 8), (1, 4), (1, 2), (1,)), 11, ("DiNAT",)),
    DilationSetting("coco", "detection at 800x1333", ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3))),
    DilationSetting("ade20k-512", "segmentation of 512x512 crops",
                    ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))),
    DilationSetting("ade20k-640", "segmentation of 640x640 crops",
                    ((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5) * 2 + (1, 5), (1, 2))),
    DilationSetting("mask2former", "Mask2Former on COCO, ADE20K and Cityscapes",
                    ((1, 14), (1, 4, 1, 7), (1, 2, 1, 3) * 4 + (1, 3), (1,)), 11, ("DiNAT",)),
)}  # fmt: skip


def settings_of(family: str) -> tuple[DilationSetting, ...]:
    """The settings published for a family ("DiNAT", "DiNAT_s"); none for "NAT", whose dilations are all 1."""
    return tuple(setting for setting in DILATION_SETTINGS.values() if family in setting.families)


def dilation_setting(arch_name: str, setting_name: str) -> DilationSetting:
    """A setting of DiNAT or DiNAT_s.

    Raises:
        ValueError: an unknown name, or a setting that was not published for this family, with the choices.
    """
    family, setting = arch(arch_name).family, find("dilation setting", setting_name, DILATION_SETTINGS)
    if family == "NAT":
        raise ValueError(
            f"arch={arch_name!r} with dilations={setting_name!r}: NAT has dilation 1 everywhere; leave dilations out, "
            f"or use a DiNAT"
        )
    if family not in setting.families:
        choices = ", ".join(map(str, settings_of(family)))
        raise ValueError(f"dilation setting {setting_name!r} was never published for {family}. Choices: {choices}")
    return setting


def dilations(arch_name: str, setting_name: str) -> tuple[tuple[int, ...], ...] | None:
    """The dilation of every block of every stage in that setting; None (dilation 1 everywhere) for NAT.

    Raises:
        ValueError: an unknown name, or a setting that was not published for this family.
    """
    backbone = arch(arch_name)
    if backbone.family == "NAT":
        find("dilation setting", setting_name, DILATION_SETTINGS)
        return None
    return dilation_setting(arch_name, setting_name).per_block(backbone.depths)
