"""NAT, DiNAT and DiNAT_s for OpenMMLab: mmdetection, mmsegmentation, mmpretrain and whatever else builds on mmengine.

    custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"])
    model = dict(backbone=dict(type="DiNAT", arch="dinat_mini", dilations="coco"))

The names go into mmengine's root registry, where every framework's own registry looks last.
"""

from typing import Any

try:
    from mmengine.dist import get_rank
    from mmengine.hooks import Hook
    from mmengine.logging import MMLogger
    from mmengine.model import BaseModule
    from mmengine.model.weight_init import PretrainedInit
    from mmengine.registry import HOOKS, MODELS
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "mmengine":
        raise
    raise ModuleNotFoundError(
        'dinat_backbones.adapters.openmmlab needs mmengine: pip install "dinat_backbones[openmmlab]"', name="mmengine"
    ) from error

from .. import backbone, zoo
from ..checkpoint import load_backbone
from . import mmcv_ext, openmmlab_checkpoints, openmmlab_fsdp  # noqa: F401  # which registers its names
from .seeding import seed_everything

mmcv_ext.install()
openmmlab_checkpoints.register()


class CheckpointInitMixin:
    """Adds `init_cfg` and `pretrained` to a backbone.

    The bases of a class are this one, the backbone, and BaseModule, in this order: freezing and train() stay the
    backbone's, and the state dict has no prefix.
    """

    def __init__(self, *args: Any, pretrained: str | None = None, init_cfg: Any = None, **kwargs: Any):
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


@HOOKS.register_module(force=True)
class SeedStepsHook(Hook):
    """Makes the random choices of a training step depend on nothing but the run's seed, the rank and the step's number,
    so that a run that was killed and resumed ends with the weights of one that never stopped.

        custom_hooks = [dict(type="SeedStepsHook")]
        randomness = dict(seed=0)

    mmengine saves no states of random generators. For data this is exact where the training process reads it
    (``num_workers=0``), and with workers that start anew each epoch (``persistent_workers=False``) when the checkpoint
    is from the end of an epoch.
    """

    def before_train_epoch(self, runner: Any) -> None:  # and once before a run without epochs
        self._seed(runner, 2 * runner.iter)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._seed(runner, 2 * runner.iter + 1)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._seed(runner, 2 * (runner.iter + 1))  # for reading the next batch

    def _seed(self, runner: Any, step: int) -> None:
        seed_everything(runner.seed, get_rank(), step)
