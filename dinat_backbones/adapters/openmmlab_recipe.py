"""The optimizer of a config of mmdet or mmseg, adapted to a NAT, DiNAT or DiNAT_s."""

from typing import Any

from mmengine.config import Config, ConfigDict

from .. import zoo

# Parameters without weight decay, by parts of their names that are longer than "backbone", which is a key of many
# configs: of several keys in a name the longest decides.
NO_DECAY = ("patch_embed.norm", "downsample.norm", "backbone.norm")
NO_DECAY_OF_BLOCK = ("norm", "attn.rpb")


def set_optimizer(cfg: Config, named: zoo.Arch) -> None:
    """Changes `optim_wrapper` as the published models were trained, and `param_scheduler` where it follows from that.

    SGD and the like become AdamW with the learning rate and weight decay of the published rows, and least learning
    rates (`eta_min`) shrink as the learning rate does; AdamW keeps its numbers. Norms and rpb have no weight decay, and
    where the config gives the backbone a learning rate of its own, they keep that. Constructors for another backbone's
    layers become the default one.
    """
    wrapper = cfg.get("optim_wrapper")
    if not wrapper or "optimizer" not in wrapper:
        return
    row: Any = _row(cfg, named)
    groups = dict(wrapper.get("paramwise_cfg") or {})
    optimizer = wrapper.optimizer
    if optimizer.type not in ("AdamW", "Adam"):
        _scale_eta_min(cfg.get("param_scheduler"), row.lr / optimizer.lr)
        wrapper.optimizer = ConfigDict(type="AdamW", lr=row.lr, betas=row.betas, weight_decay=row.weight_decay)
        groups = {key: value for key, value in groups.items() if key == "custom_keys"}  # the others were for SGD
    if "Decay" in str(wrapper.get("constructor")):  # by layers that it knows of other backbones alone
        del wrapper["constructor"]
        groups = {}
    keys = dict(groups.get("custom_keys") or {})
    of_backbone = {key: value for key, value in dict(keys.get("backbone") or {}).items() if key != "decay_mult"}
    no_decay = dict(of_backbone, decay_mult=0.0)
    if of_backbone:
        blocks = [f"blocks.{i}.{name}" for i in range(max(named.depths)) for name in NO_DECAY_OF_BLOCK]
        keys.update({key: dict(no_decay) for key in (*NO_DECAY, *blocks)})
    else:
        keys.update({key: dict(no_decay) for key in row.no_decay if key != "absolute_pos_embed"})
    wrapper.paramwise_cfg = ConfigDict(groups, custom_keys=keys)


def _row(cfg: Config, named: zoo.Arch) -> Any:
    segmentor = cfg.get("default_scope") == "mmseg"
    rows: dict[str, Any] = dict(zoo.SEGMENTATION if segmentor else zoo.DETECTION)
    return next(row for row in rows.values() if row.arch == named.name)


def _scale_eta_min(schedulers: Any, factor: float) -> None:
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if isinstance(scheduler, dict) and scheduler.get("eta_min"):
            scheduler["eta_min"] *= factor
