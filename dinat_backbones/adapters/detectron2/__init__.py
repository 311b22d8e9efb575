"""NAT, DiNAT and DiNAT_s for Detectron2: backbones, feature pyramids, `MODEL.DINAT` in configs, safe checkpoints.

    import dinat_backbones.adapters.detectron2 as dinat         # registers the backbones
    cfg = dinat.with_backbone(model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml"), "dinat_tiny")
    dinat.Checkpointer(model).load(cfg.MODEL.WEIGHTS)           # in place of DetectionCheckpointer

    model.backbone.bottom_up = LazyCall(dinat.D2DiNAT)(         # in a LazyConfig with a feature pyramid
        arch="dinat_tiny", dilations="coco", out_features=["res2", "res3", "res4", "res5"]
    )

Works with Detectron2 built from source on a current torch, and with the wheel that requirements/classic.txt names.

    backbone.py             the backbones and pyramids
    config.py               `MODEL.DINAT`; `with_backbone`, for any config
    checkpointer.py         `Checkpointer`
    layer_decay.py          `get_lr_decay_rate`, for a LazyConfig
    data_checks.py          what a config expects of its data sets, checked before training
    maskformer_compat.py    Mask2Former: `get_config`, and what differs between its releases; needs Mask2Former
    trainer.py              Mask2Former's optimizer, data mappers and evaluators; needs Mask2Former
    resumable_loader.py     training data and random numbers as functions of the seed and the step
    shapes_datasets.py      the data sets of `dinat shapes` under Detectron2's names
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "detectron2":
        raise
    raise ModuleNotFoundError(
        "dinat_backbones.adapters.detectron2 needs Detectron2: pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git (a wheel for Python 3.10 is sal-detectron2)",
        name="detectron2",
    ) from error

from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS

from ...ops.flops import TRACED_OPS
from .backbone import (
    D2NAT,
    D2DiNAT,
    D2DiNAT_s,
    build_dinat_fpn_backbone,
    build_dinat_retinanet_fpn_backbone,
    build_dinat_s_fpn_backbone,
    build_dinat_s_retinanet_fpn_backbone,
    build_nat_fpn_backbone,
    build_nat_retinanet_fpn_backbone,
)
from .checkpointer import Checkpointer
from .config import FURTHER_DEFAULTS, PUBLISHED_DEFAULTS, add_dinat_config, with_backbone
from .layer_decay import get_lr_decay_rate

_DEFAULT_SUPPORTED_OPS.update(TRACED_OPS)  # FlopCountAnalysis, Detectron2's analyze_model.py

__all__ = [
    "FURTHER_DEFAULTS",
    "PUBLISHED_DEFAULTS",
    "Checkpointer",
    "D2DiNAT",
    "D2DiNAT_s",
    "D2NAT",
    "add_dinat_config",
    "build_dinat_fpn_backbone",
    "build_dinat_retinanet_fpn_backbone",
    "build_dinat_s_fpn_backbone",
    "build_dinat_s_retinanet_fpn_backbone",
    "build_nat_fpn_backbone",
    "build_nat_retinanet_fpn_backbone",
    "get_lr_decay_rate",
    "with_backbone",
]
