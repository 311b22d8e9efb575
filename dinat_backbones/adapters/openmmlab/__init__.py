"""NAT, DiNAT and DiNAT_s for OpenMMLab: mmdetection, mmsegmentation, mmpretrain and whatever else builds on mmengine.

    custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"])
    model = dict(backbone=dict(type="DiNAT", arch="dinat_mini", dilations="coco"))

Importing this package registers the backbones, the hook and the FSDP policy in mmengine's root registry, where every
framework's own registry looks last; serves mmcv's operators where mmcv was installed without them; and gives mmengine
the reader of `checkpoint` for the files that it loads.
"""

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "mmengine":
        raise
    raise ModuleNotFoundError(
        'dinat_backbones.adapters.openmmlab needs mmengine: pip install "dinat_backbones[openmmlab]"', name="mmengine"
    ) from error

from .. import mmcv_ext
from . import checkpoints
from .backbones import NAT, CheckpointInitMixin, DiNAT, DiNAT_s
from .swap import SwapError, changes, with_backbone
from .training import SeedStepsHook, wrap_dinat_blocks

mmcv_ext.install()
checkpoints.register()

__all__ = [
    "NAT",
    "CheckpointInitMixin",
    "DiNAT",
    "DiNAT_s",
    "SeedStepsHook",
    "SwapError",
    "changes",
    "with_backbone",
    "wrap_dinat_blocks",
]
