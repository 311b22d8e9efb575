"""The backbones and feature pyramids of Detectron2's registry."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7

from ... import backbone
from .config import PUBLISHED_DEFAULTS, arguments_of_backbone

STAGES = tuple(PUBLISHED_DEFAULTS["OUT_FEATURES"])
_PATCH_EMBED = re.compile(
    r"(.*\.)?patch_embed\.proj\.(0\.)?weight"
)  # the backbone's first tensor, in files of any layout


class FeatureShapes(dict[str, ShapeSpec]):
    """What `output_shape()` returns: a missing name, such as one of an IN_FEATURES, is a sentence, not a KeyError."""

    def __missing__(self, name: str) -> ShapeSpec:
        retinanet = (
            "; p6 and p7 of a RetinaNet come from build_*_retinanet_fpn_backbone" if name in ("p6", "p7") else ""
        )
        raise ValueError(
            f"the model reads the feature map {name!r}, and its backbone returns {', '.join(self)}: change the "
            "IN_FEATURES that names it (of MODEL.FPN, RPN, ROI_HEADS, RETINANET or SEM_SEG_HEAD), or what is returned, "
            f"by MODEL.FPN.IN_FEATURES with a pyramid, else by MODEL.DINAT.OUT_FEATURES{retinanet}"
        )


class _WithFeatureShapes:
    """Mixin for a Backbone, whose `output_shape()` becomes a `FeatureShapes`."""

    def output_shape(self) -> FeatureShapes:
        return FeatureShapes(super().output_shape())  # type: ignore[misc]  # of a Backbone


class _Detectron2Backbone(_WithFeatureShapes):
    """Mixin for named outputs and construction from a config, as Detectron2 expects of a Backbone.

    To be the first base, before the backbone and Detectron2's class. Inheriting, not wrapping: the state dict has no
    prefix.
    """

    @configurable
    def __init__(
        self,
        arch: str | None = None,
        *,
        out_features: Sequence[str] = STAGES,
        **kwargs: Any,
    ):
        if not out_features or not set(out_features) <= set(STAGES):
            raise ValueError(f"OUT_FEATURES={list(out_features)}: expected some of {', '.join(STAGES)}")
        indices = sorted(map(STAGES.index, set(out_features)))
        super().__init__(arch, out_indices=indices, **kwargs)  # type: ignore[call-arg]  # the backbone's
        # read by Backbone.output_shape()
        self._out_features = [STAGES[index] for index in indices]
        self._out_feature_channels = dict(zip(self._out_features, self.out_channels, strict=True))  # type: ignore
        self._out_feature_strides = dict(zip(self._out_features, self.out_strides, strict=True))  # type: ignore

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return arguments_of_backbone(cfg) | {"in_chans": input_shape.channels}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images ``[B, in_chans, H, W]`` to a map ``[B, C, ceil(H/stride), ceil(W/stride)]`` per name of
        `out_features`, with ``C`` and stride from `output_shape()`."""
        return dict(zip(self._out_features, super().forward(x), strict=True))  # type: ignore[misc]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        *args: Any,
    ) -> None:
        # Detectron2's own checkpointer would only log that nothing of such a file was loaded, and train from scratch
        others = [name for name in unexpected if _PATCH_EMBED.fullmatch(name)]
        if others and not any(name.startswith(prefix) for name in state_dict):
            raise ValueError(
                f"the checkpoint has the backbone's tensors under other names ({others[0]}; this model has "
                f"{prefix}{others[0][others[0].index('patch_embed') :]}): load it by "
                "dinat_backbones.adapters.detectron2.Checkpointer (`dinat train` does); DetectionCheckpointer loads "
                "FILE.pth?matching_heuristics=True, if its names have no prefix (dinat convert --to imagenet)"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *args)  # type: ignore[misc]

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


class DinatFPN(_WithFeatureShapes, FPN):  # type: ignore[misc]  # output_shape() has its own dict
    """Detectron2's FPN on a backbone with the stages that it reads, and no other.

    Args:
        family: `D2NAT`, `D2DiNAT` or `D2DiNAT_s`.
        cfg: with `MODEL.DINAT`, but for its OUT_FEATURES, and `MODEL.FPN`.
        input_shape: of the images.
        retinanet: two further levels by convolutions of the last stage's features (p6 and p7, if it is res5), as
            RetinaNet has them, and not one by pooling.

    Raises:
        ValueError: MODEL.FPN.IN_FEATURES is not one or more consecutive stages.
    """

    def __init__(self, family: type[Backbone], cfg: CfgNode, input_shape: ShapeSpec, *, retinanet: bool = False):
        names, width = tuple(cfg.MODEL.FPN.IN_FEATURES), cfg.MODEL.FPN.OUT_CHANNELS
        first = STAGES.index(names[0]) if names and names[0] in STAGES else 0
        if not names or names != STAGES[first : first + len(names)]:
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES={list(names)}: expected consecutive stages of {list(STAGES)}, such as "
                "all of them, or the last three for a RetinaNet"
            )
        bottom_up = family(cfg, input_shape, out_features=names)
        if retinanet:
            top_block = LastLevelP6P7(bottom_up.output_shape()[names[-1]].channels, width, in_feature=names[-1])
        else:
            top_block = LastLevelMaxPool()
            top_block.in_feature = names[-1].replace("res", "p")
        super().__init__(
            bottom_up=bottom_up,
            in_features=names,
            out_channels=width,
            norm=cfg.MODEL.FPN.NORM,
            top_block=top_block,
            fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        )


@BACKBONE_REGISTRY.register()
def build_nat_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """NAT with a feature pyramid p2 ... p6 for R-CNNs and Panoptic FPN, from `MODEL.DINAT` and `MODEL.FPN`."""
    return DinatFPN(D2NAT, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_dinat_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As `build_nat_fpn_backbone`, with DiNAT."""
    return DinatFPN(D2DiNAT, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_dinat_s_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As `build_nat_fpn_backbone`, with DiNAT_s."""
    return DinatFPN(D2DiNAT_s, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_nat_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """NAT with a feature pyramid p3 ... p7 for RetinaNet (MODEL.FPN.IN_FEATURES: res3, res4, res5)."""
    return DinatFPN(D2NAT, cfg, input_shape, retinanet=True)


@BACKBONE_REGISTRY.register()
def build_dinat_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As `build_nat_retinanet_fpn_backbone`, with DiNAT."""
    return DinatFPN(D2DiNAT, cfg, input_shape, retinanet=True)


@BACKBONE_REGISTRY.register()
def build_dinat_s_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As `build_nat_retinanet_fpn_backbone`, with DiNAT_s."""
    return DinatFPN(D2DiNAT_s, cfg, input_shape, retinanet=True)
