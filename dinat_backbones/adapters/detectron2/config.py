"""`MODEL.DINAT` in configs, the settings that its weights need beside it, and any config with its backbone replaced."""

import copy
import logging
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ... import zoo

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
# Keys that the published code lacks; with these defaults they change nothing.
FURTHER_DEFAULTS: dict[str, Any] = dict(ARCH=None, LAYER_SCALE=None, FROZEN_STAGES=-1, WITH_CP=False)
KEYS_OF_ARCH = ("EMBED_DIM", "DEPTHS", "NUM_HEADS", "KERNEL_SIZE", "MLP_RATIO")


def add_dinat_config(cfg: CfgNode) -> None:
    """Add `MODEL.DINAT` with its defaults to a config of Detectron2, before any file is read into it.

    The keys are the published ones, by which the original YAML files load unchanged, and ARCH, LAYER_SCALE,
    FROZEN_STAGES and WITH_CP; see `dinat_backbones.NAT` for what each does. With ARCH, one of `zoo.ARCHS`, those of
    EMBED_DIM, DEPTHS, NUM_HEADS, KERNEL_SIZE and MLP_RATIO that have their defaults (DiNAT-Large's) are ARCH's, and
    DILATIONS may be a setting such as "coco". OUT_FEATURES names stages: res2 (stride 4) to res5 (32).

    FROZEN_STAGES freezes; MODEL.BACKBONE.FREEZE_AT is not read, as in the published code. SOLVER.LAYER_DECAY, 1.0 by
    default, is read by this package's trainer: `layer_decay` of `optim.layer_scales`.
    """
    cfg.MODEL.DINAT = CfgNode(PUBLISHED_DEFAULTS | FURTHER_DEFAULTS)
    cfg.SOLVER.LAYER_DECAY = 1.0


def arguments_of_backbone(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of a backbone that `MODEL.DINAT` stands for; logs what `other_backbones_settings` finds."""
    if "DINAT" not in cfg.MODEL:
        raise ValueError("the config has no MODEL.DINAT: call add_dinat_config(cfg) before reading files into it")
    if settings := other_backbones_settings(cfg):
        logging.getLogger(__name__).warning(
            "this config has settings of another backbone, with which ImageNet weights of %s give wrong features: %s "
            "(`with_backbone` of dinat_backbones.adapters.detectron2 sets them all)",
            cfg.MODEL.BACKBONE.NAME,
            "; ".join(f"{key} is {value}, expected {wanted}" for key, (value, wanted) in settings.items()),
        )
    arguments = dict(cfg.MODEL.DINAT)
    if arguments["ARCH"]:
        for key in KEYS_OF_ARCH:
            if arguments[key] == PUBLISHED_DEFAULTS[key]:
                del arguments[key]
    return {key.lower(): value for key, value in arguments.items()}


def other_backbones_settings(cfg: CfgNode) -> dict[str, tuple[Any, str]]:
    """Keys that are as Detectron2's ResNets need them, with their values and what they should be.

    ImageNet weights of NAT and DiNAT expect RGB with the mean and standard deviation of ImageNet. Detectron2's defaults
    are BGR, its mean, and a standard deviation of 1.
    """
    defaults = get_cfg()
    found: dict[str, tuple[Any, str]] = {}
    if len(cfg.MODEL.PIXEL_MEAN) == len(zoo.IMAGENET_MEAN):
        pixels = {"PIXEL_MEAN": list(zoo.IMAGENET_MEAN), "PIXEL_STD": list(zoo.IMAGENET_STD)}
        for key, wanted in pixels.items():
            value = list(cfg.MODEL[key])
            if value in (list(defaults.MODEL[key]), wanted[::-1]):
                found[f"MODEL.{key}"] = (value, str(wanted))
        if cfg.INPUT.FORMAT == "BGR":
            found["INPUT.FORMAT"] = ("BGR", "RGB")
    if cfg.MODEL.WEIGHTS.startswith("detectron2://"):
        found["MODEL.WEIGHTS"] = (cfg.MODEL.WEIGHTS, "an address of zoo.PRETRAINED or a file of this backbone")
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT
    if frozen > 0 and cfg.MODEL.DINAT.FROZEN_STAGES < 0:
        found["MODEL.BACKBONE.FREEZE_AT"] = (
            f"{frozen}, which freezes nothing here",
            f"0 (MODEL.DINAT.FROZEN_STAGES={frozen - 1} freezes that much)",
        )
    return found


def with_backbone(
    cfg: CfgNode, arch: str, *, dilations: Any = None, checkpoint: str | None = None, drop_path_rate: float = 0.2
) -> CfgNode:
    """A copy of a config whose model has a NAT, DiNAT or DiNAT_s for a backbone, and the settings that it needs.

    Sets MODEL.BACKBONE, MODEL.DINAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT and MODEL.WEIGHTS. The solver is
    left alone: the published detectors were trained by AdamW with a learning rate of 1e-4 for a batch of 16 images.

    Args:
        cfg: of Detectron2's model zoo, or like those; it is left as it is.
        arch: one of `zoo.ARCHS`.
        dilations: as of `dinat_backbones.DiNAT`; None for those published for COCO.
        checkpoint: file or http(s) address of the backbone's weights; None for the published ImageNet weights, "none"
            for random ones.
        drop_path_rate: as of `dinat_backbones.DiNAT`.

    Raises:
        ValueError: an unknown `arch` or dilation setting; a model that is tied to its ResNet.
    """
    named = zoo.arch(arch)
    cfg = cfg.clone()
    cfg.defrost()
    if "DINAT" not in cfg.MODEL:
        add_dinat_config(cfg)
    cfg.MODEL.BACKBONE.NAME = _builder(cfg, named.family)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    if named.family == "NAT":
        dilations = None
    elif dilations is None:
        dilations = "coco"
    if isinstance(dilations, str):
        zoo.dilations(named.name, dilations)  # raises for unknown settings
    for key in (*KEYS_OF_ARCH, "LAYER_SCALE"):  # of another architecture, if it had one of ours
        cfg.MODEL.DINAT[key] = copy.deepcopy((PUBLISHED_DEFAULTS | FURTHER_DEFAULTS)[key])
    cfg.MODEL.DINAT.ARCH, cfg.MODEL.DINAT.DILATIONS = named.name, dilations
    cfg.MODEL.DINAT.DROP_PATH_RATE = drop_path_rate
    cfg.MODEL.DINAT.OUT_FEATURES = list(cfg.MODEL.RESNETS.OUT_FEATURES)  # read without a pyramid
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(zoo.IMAGENET_MEAN), list(zoo.IMAGENET_STD)
    cfg.INPUT.FORMAT = "RGB"
    if checkpoint is None:
        checkpoint = zoo.PRETRAINED[named.name]
    cfg.MODEL.WEIGHTS = "" if checkpoint == "none" else checkpoint
    return cfg


def _builder(cfg: CfgNode, family: str) -> str:
    """The name in Detectron2's registry of what takes the place of a config's backbone."""
    old = cfg.MODEL.BACKBONE.NAME
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        raise ValueError(
            "this model's heads are the last stage of its ResNet (C4, Res5ROIHeads): start from a config with a "
            "feature pyramid, such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
        )
    if "fpn" not in old:
        return f"D2{family}"
    return f"build_{family.lower()}_{'retinanet_' if 'retinanet' in old else ''}fpn_backbone"
