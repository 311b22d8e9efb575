"""NAT, DiNAT and DiNAT_s for Detectron2: backbones, feature pyramids, `MODEL.DINAT` in configs, safe checkpoints.

    import dinat_backbones.adapters.detectron2 as dinat         # registers the backbones
    cfg = get_cfg()
    dinat.add_dinat_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_dinat_fpn_backbone"        # or D2NAT, D2DiNAT, D2DiNAT_s without a pyramid

    model.backbone = LazyCall(dinat.D2DiNAT)(arch="dinat_tiny", dilations="coco")   # in a LazyConfig

Works with Detectron2 from source on a current torch as with the wheel that requirements/classic.txt names.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

try:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import CfgNode, configurable
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import BACKBONE_REGISTRY, Backbone
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "detectron2":
        raise
    raise ModuleNotFoundError(
        "dinat_backbones.adapters.detectron2 needs Detectron2: pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git (a wheel for Python 3.10 is sal-detectron2)",
        name="detectron2",
    ) from error

from .. import backbone, zoo
from ..checkpoint import fetch, load_backbone, read
from ..checkpoint.loading import tensors, unwrap

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
# Ours besides; as they are by default, nothing differs from the published code. That code never read
# MODEL.BACKBONE.FREEZE_AT, and neither does this: FROZEN_STAGES is what freezes.
FURTHER_DEFAULTS: dict[str, Any] = dict(LAYER_SCALE=None, FROZEN_STAGES=-1, WITH_CP=False)


def add_dinat_config(cfg: CfgNode) -> None:
    """Add `MODEL.DINAT` with its defaults to a config of Detectron2, before any file is read into it.

    The keys are the published ones, by which the original YAML files load unchanged, and LAYER_SCALE, FROZEN_STAGES and
    WITH_CP; see `dinat_backbones.NAT` for what each does. OUT_FEATURES names stages: res2 (stride 4) to res5 (32).
    """
    cfg.MODEL.DINAT = CfgNode(PUBLISHED_DEFAULTS | FURTHER_DEFAULTS)


class _Pyramid:
    """Makes a backbone a Backbone of Detectron2. Comes first among the bases; its super() is the backbone, whose own super()
    is Backbone, so that the state dict has no prefix."""

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
        # from which Backbone.output_shape() reads
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
class D2NAT(_Pyramid, backbone.NAT, Backbone):  # type: ignore[misc]  # forward() names its results
    """`dinat_backbones.NAT` with named outputs. Built from a config with `MODEL.DINAT`, or from arguments.

    Args:
        arch: see `dinat_backbones.NAT`, as for all further arguments but `out_indices`.
        out_features: some of "res2" (stride 4), "res3", "res4" and "res5" (stride 32).

    Raises:
        ValueError: another name in `out_features`, and whatever the backbone raises.
    """


@BACKBONE_REGISTRY.register()
class D2DiNAT(_Pyramid, backbone.DiNAT, Backbone):  # type: ignore[misc]  # forward() names its results
    """`dinat_backbones.DiNAT`; see `D2NAT`."""


@BACKBONE_REGISTRY.register()
class D2DiNAT_s(_Pyramid, backbone.DiNAT_s, Backbone):  # type: ignore[misc]  # forward() names its results
    """`dinat_backbones.DiNAT_s`; see `D2NAT`."""


def _fpn(backbone: type[Backbone], cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    return FPN(
        bottom_up=backbone(cfg, input_shape),
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


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but files are read without running code that they carry (see `checkpoint.read`).

    A file without any of the model's own names, such as an ImageNet checkpoint or a backbone of another framework, goes
    into the backbone by `checkpoint.load_backbone`: bias tables of another kernel size are resized, another architecture
    is an error. Any other file is loaded as Detectron2 does it.

    Args:
        model, save_dir, checkpointables: see `DetectionCheckpointer`.
        allow_pickle: run whatever code a pickle asks for. Only for files whose origin you trust.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str = "", *, allow_pickle: bool = False, **kwargs: Any):
        super().__init__(model, save_dir, **kwargs)
        self.allow_pickle = allow_pickle

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `DetectionCheckpointer.load`; an http(s) address is downloaded once by `checkpoint.fetch`.

        Raises:
            FileNotFoundError: no such file; for the name of a published one, says where that is.
            ValueError: see `read` and `load_backbone`.
        """
        scheme = urlparse(path).scheme if path else ""
        if scheme in ("http", "https"):
            path = str(fetch(path))
        elif path and not scheme and not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint {path} is not there{_published(Path(path))}")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read(filename, allow_pickle=self.allow_pickle)
        state = tensors(checkpoint)
        dinat = next((module for module in self.model.modules() if isinstance(module, backbone.BackboneBase)), None)
        if dinat is not None and not self.model.state_dict().keys() & state.keys():
            load_backbone(dinat, filename, allow_pickle=self.allow_pickle, logger=self.logger)
            return {"model": {}}
        # The mark of the version, without which Mask2Former renames tensors as if they were from older code.
        marked = OrderedDict(state)
        found = getattr(unwrap(checkpoint), "_metadata", None)
        marked._metadata = self.model.state_dict()._metadata if found is None else found  # type: ignore[attr-defined]
        checkpoint.pop("matching_heuristics", None)  # for backbones alone
        return checkpoint | {"model": marked}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        return super()._load_model(checkpoint) if checkpoint["model"] else None


def _published(path: Path) -> str:
    """The end of a message. The published configs name files that their users had to convert first."""
    address = next((url for url in zoo.PRETRAINED.values() if Path(urlparse(url).path).stem == path.stem), None)
    return f"; the published one needs no conversion: set MODEL.WEIGHTS to {address}" if address else ""
