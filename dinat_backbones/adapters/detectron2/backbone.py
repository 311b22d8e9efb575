"""The backbones and feature pyramids of Detectron2's registry, and `MODEL.DINAT` in its configs."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool

from ... import backbone

# Published keys of MODEL.DINAT with their defaults; in lower case they are arguments of the backbones.
PUBLISHED_DEFAULTS: dict[str, Any] = dict(
    EMBED_DIM=192,
    DEPTHS=[3, 4, 18, 5],
    NUM_HEADS=[6, 12, 24, 48],
    KERNEL_SIZE=7,
    DILATIONS=None,
    MLP_RATIO=2.0,
    QKV_BIAS=True,
    QK_SCALE=None,
    DROP_RATE=0.0,
    ATTN_DROP_RATE=0.0,
    DROP_PATH_RATE=0.3,
    OUT_FEATURES=["res2", "res3", "res4", "res5"],
)
# Keys that the published code lacks; with these defaults they change nothing. As in that code, MODEL.BACKBONE.FREEZE_AT
# is not read: FROZEN_STAGES freezes.
FURTHER_DEFAULTS: dict[str, Any] = dict(LAYER_SCALE=None, FROZEN_STAGES=-1, WITH_CP=False)


def add_dinat_config(cfg: CfgNode) -> None:
    """Add `MODEL.DINAT` with its defaults to a config of Detectron2, before any file is read into it.

    The keys are the published ones, by which the original YAML files load unchanged, and LAYER_SCALE, FROZEN_STAGES and
    WITH_CP; see `dinat_backbones.NAT` for what each does. OUT_FEATURES names stages: res2 (stride 4) to res5 (32).
    SOLVER.LAYER_DECAY, 1.0 by default, is read by this package's trainer: `layer_decay` of `optim.layer_scales`.
    """
    cfg.MODEL.DINAT = CfgNode(PUBLISHED_DEFAULTS | FURTHER_DEFAULTS)
    cfg.SOLVER.LAYER_DECAY = 1.0


class _Detectron2Backbone:
    """Mixin for named outputs and construction from a config, as Detectron2 expects of a Backbone.

    To be the first base, before the backbone and Detectron2's class. Inheriting, not wrapping: the state dict has no
    prefix.
    """

    @configurable
    def __init__(
        self,
        arch: str | None = None,
        *,
        out_features: Sequence[str] = PUBLISHED_DEFAULTS["OUT_FEATURES"],
        **kwargs: Any,
    ):
        stages = {f"res{stage + 2}": stage for stage in range(4)}
        if not out_features or not set(out_features) <= set(stages):
            raise ValueError(f"OUT_FEATURES={list(out_features)}: expected some of {', '.join(stages)}")
        indices = sorted(stages[name] for name in out_features)
        super().__init__(arch, out_indices=indices, **kwargs)  # type: ignore[call-arg]  # the backbone's
        # read by Backbone.output_shape()
        self._out_features = [f"res{index + 2}" for index in indices]
        self._out_feature_channels = dict(zip(self._out_features, self.out_channels, strict=True))  # type: ignore
        self._out_feature_strides = dict(zip(self._out_features, self.out_strides, strict=True))  # type: ignore

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        if "DINAT" not in cfg.MODEL:
            raise ValueError("the config has no MODEL.DINAT: call add_dinat_config(cfg) before reading files into it")
        return {key.lower(): value for key, value in cfg.MODEL.DINAT.items()} | {"in_chans": input_shape.channels}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images ``[B, in_chans, H, W]`` to a map ``[B, C, ceil(H/stride), ceil(W/stride)]`` per name of
        `out_features`, with ``C`` and stride from `output_shape()`."""
        return dict(zip(self._out_features, super().forward(x), strict=True))  # type: ignore[misc]

    @property
    def size_divisibility(self) -> int:
        """As published; the backbone itself takes any size."""
        return 32


@BACKBONE_REGISTRY.register()
class D2NAT(_Detectron2Backbone, backbone.NAT, Backbone):  # type: ignore[misc]  # forward() names its results
    """`dinat_backbones.NAT` with named outputs. Built from a config with `MODEL.DINAT`, or from arguments.

    Args:
        arch: see `dinat_backbones.NAT`, as for all further arguments but `out_indices`.
        out_features: some of "res2" (stride 4), "res3", "res4" and "res5" (stride 32).

    Raises:
        ValueError: another name in `out_features`; arguments that do not fit together, as for `dinat_backbones.NAT`.
    """


@BACKBONE_REGISTRY.register()
class D2DiNAT(_Detectron2Backbone, backbone.DiNAT, Backbone):  # type: ignore[misc]  # forward() names its results
    """`dinat_backbones.DiNAT`; see `D2NAT`."""


@BACKBONE_REGISTRY.register()
class D2DiNAT_s(_Detectron2Backbone, backbone.DiNAT_s, Backbone):  # type: ignore[misc]  # forward() names its results
    """`dinat_backbones.DiNAT_s`; see `D2NAT`."""


def _fpn(family: type[Backbone], cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    return FPN(
        bottom_up=family(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_nat_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """NAT with a feature pyramid p2 ... p6 for Mask R-CNN and Panoptic FPN, from `MODEL.DINAT` and `MODEL.FPN`."""
    return _fpn(D2NAT, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_dinat_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As `build_nat_fpn_backbone`, with DiNAT."""
    return _fpn(D2DiNAT, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_dinat_s_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As `build_nat_fpn_backbone`, with DiNAT_s."""
    return _fpn(D2DiNAT_s, cfg, input_shape)
