"""The backbones in mmengine's registry, with `init_cfg` and `pretrained`."""

import importlib
import sys
from typing import Any

from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import MODELS

from ... import backbone, zoo
from ...checkpoint import load_backbone


class CheckpointInitMixin:
    """Adds `init_cfg` and `pretrained` to a backbone.

    The bases of a class are this one, the backbone, and BaseModule, in this order: freezing and train() stay the
    backbone's, and the state dict has no prefix.
    """

    def __init__(self, *args: Any, pretrained: str | None = None, init_cfg: Any = None, **kwargs: Any):
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
        for source in (pretrained, *(cfg.get("checkpoint") for cfg in cfgs)):
            _check_source(source, type(self).__name__)
        if pretrained is not None and init_cfg is not None:
            raise ValueError(
                f"both pretrained={pretrained!r} and init_cfg={init_cfg!r} were given to {type(self).__name__}; use "
                'init_cfg=dict(type="Pretrained", checkpoint=...) alone'
            )
        super().__init__(*args, **kwargs)
        self.init_cfg = init_cfg if pretrained is None else dict(type="Pretrained", checkpoint=pretrained)

    def init_weights(self: Any) -> None:
        """Called by mmengine before training. Without a checkpoint the backbone keeps the weights it was built with."""
        given, first_call = self.init_cfg, not self.is_init
        cfgs = [given] if isinstance(given, dict) else list(given or [])
        pretrained = [cfg for cfg in cfgs if cfg["type"] in ("Pretrained", PretrainedInit)]
        # mmengine's own loader knows neither the layouts of our checkpoints nor an error where nothing fits
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        try:
            super().init_weights()  # type: ignore[misc]  # BaseModule has it
        finally:
            self.init_cfg = given
        if not first_call:
            return  # mmengine has warned
        self.is_init = False  # until the checkpoint is in
        for cfg in pretrained:
            checkpoint: str = cfg["checkpoint"]
            load_backbone(
                self,
                zoo.PRETRAINED.get(checkpoint, checkpoint),
                prefix=cfg.get("prefix"),
                allow_pickle=cfg.get("allow_pickle", False),
                logger=MMLogger.get_current_instance(),
            )
        self.is_init = True


def _check_source(source: Any, name: str) -> None:
    """ValueError where weights of another backbone are left in a base config."""
    scheme = source.partition("://")[0] if isinstance(source, str) and "://" in source else ""
    if scheme not in ("", "http", "https"):
        raise ValueError(
            f"{source!r} has no weights of a {name}; if it is left from another backbone in a base config, set "
            "model.pretrained=None and _delete_=True in model.backbone, and give the weights as "
            'init_cfg=dict(type="Pretrained", checkpoint=...)'
        )


# force: importing this file a second time (a reload, a second path to it) registers the same names again


@MODELS.register_module(force=True)
class NAT(CheckpointInitMixin, backbone.NAT, BaseModule):
    """`dinat_backbones.NAT` with two more arguments.

    Args:
        pretrained: a checkpoint (ImageNet, detection or segmentation): its path, its http(s) address, or the name of a
            published ImageNet one, a key of `zoo.PRETRAINED`. Loaded when mmengine calls init_weights(), by
            `checkpoint.load_backbone`.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` for the same, with `prefix` and `allow_pickle` if needed,
            or other initializers of mmengine. None keeps the random weights of the backbone.

    Raises:
        ValueError: both are given.
    """


@MODELS.register_module(force=True)
class DiNAT(CheckpointInitMixin, backbone.DiNAT, BaseModule):
    """`dinat_backbones.DiNAT` with the two arguments of `NAT` here."""


@MODELS.register_module(force=True)
class DiNAT_s(CheckpointInitMixin, backbone.DiNAT_s, BaseModule):
    """`dinat_backbones.DiNAT_s` with the two arguments of `NAT` here."""


def register_with_imported_frameworks() -> None:
    """Register the backbones with mmdet, mmseg and mmpretrain where those are imported, whose own registries are asked
    for ``type="mmdet.DiNAT"``."""
    for framework in ("mmdet", "mmseg", "mmpretrain"):
        if framework in sys.modules:
            for named in (NAT, DiNAT, DiNAT_s):
                importlib.import_module(f"{framework}.registry").MODELS.register_module(module=named, force=True)


register_with_imported_frameworks()
