"""NAT, DiNAT and DiNAT_s for OpenMMLab: mmdetection, mmsegmentation, mmpretrain and whatever else builds on mmengine.

    custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"])
    model = dict(backbone=dict(type="DiNAT", arch="dinat_mini", dilations="coco"))

Importing this package registers the backbones, the hook, the optimizer constructor and what FSDP needs in mmengine's
root registry, where every framework's own registry looks last; serves mmcv's operators where mmcv was installed without
them; gives mmengine the reader of `checkpoint` for the files that it loads, and its FLOP counter the op.
"""

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "mmengine":
        raise
    raise ModuleNotFoundError(
        'dinat_backbones.adapters.openmmlab needs mmengine: pip install "dinat_backbones[openmmlab]"', name="mmengine"
    ) from error

from mmengine.analysis import complexity_analysis

from ...ops.flops import TRACED_OPS
from .. import mmcv_ext
from . import checkpoints
from .backbones import NAT, CheckpointInitMixin, DiNAT, DiNAT_s
from .fsdp import ResumableFSDPStrategy, wrap_dinat_blocks
from .optim import LayerDecayOptimWrapperConstructor
from .seeding import SeedStepsHook
from .swap import SwapError, changes, with_backbone

mmcv_ext.install()
checkpoints.register()
checkpoints.refuse_backbones_alone()
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(TRACED_OPS)  # get_model_complexity_info, mmdet's get_flops.py

__all__ = [
    "NAT",
    "CheckpointInitMixin",
    "DiNAT",
    "DiNAT_s",
    "LayerDecayOptimWrapperConstructor",
    "ResumableFSDPStrategy",
    "SeedStepsHook",
    "SwapError",
    "changes",
    "with_backbone",
    "wrap_dinat_blocks",
]
