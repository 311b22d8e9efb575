"""The optimizer of a config of mmdet or mmseg, adapted to a NAT, DiNAT or DiNAT_s as the shipped configs train them."""

import copy
import functools
from typing import Any

from mmengine.config import Config, ConfigDict

from ... import zoo

# Parameters without weight decay, by parts of their names that are longer than "backbone", which is a key of many
# configs: of several keys in a name the longest decides.
NO_DECAY = ("patch_embed.norm", "downsample.norm", "backbone.norm")
NO_DECAY_OF_BLOCK = ("norm", "attn.rpb")


def set_optimizer(cfg: Config, named: zoo.Arch) -> None:
    """Changes `optim_wrapper` as the published models were trained, and `param_scheduler` where it follows from that.

    SGD and the like become AdamW with the learning rate and weight decay of the published models, and least learning
    rates (`eta_min`) shrink as the learning rate does; AdamW keeps its numbers. Norms and rpb have no weight decay, and
    where the config gives the backbone a learning rate of its own, they keep that. Constructors for another backbone's
    layers become the default one.
    """
    wrapper = cfg.get("optim_wrapper")
    if not wrapper or "optimizer" not in wrapper:
        return
    published = published_recipe(named, cfg.get("default_scope") == "mmseg").optim_wrapper
    groups = dict(wrapper.get("paramwise_cfg") or {})
    optimizer = wrapper.optimizer
    if optimizer.type not in ("AdamW", "Adam"):
        _scale_eta_min(cfg.get("param_scheduler"), published.optimizer.lr / optimizer.lr)
        wrapper.optimizer = copy.deepcopy(published.optimizer)
        groups = {key: value for key, value in groups.items() if key == "custom_keys"}  # the others were for SGD
    constructor = str(wrapper.get("constructor"))
    if "Decay" in constructor and "LayerDecayOptimWrapper" not in constructor:  # by layers of other backbones alone
        del wrapper["constructor"]
        groups = {}
    keys = dict(groups.get("custom_keys") or {})
    of_backbone = {key: value for key, value in dict(keys.get("backbone") or {}).items() if key != "decay_mult"}
    no_decay = dict(of_backbone, decay_mult=0.0)
    if of_backbone:
        blocks = [f"blocks.{i}.{name}" for i in range(max(named.depths)) for name in NO_DECAY_OF_BLOCK]
        keys.update({key: dict(no_decay) for key in (*NO_DECAY, *blocks)})
    else:
        keys.update({key: dict(no_decay) for key in published.paramwise_cfg.custom_keys})
    wrapper.paramwise_cfg = ConfigDict(groups, custom_keys=keys)


@functools.cache
def published_recipe(named: zoo.Arch, segmentor: bool) -> Config:
    """The shipped config of the first published detector (or segmentor) with this backbone; not to be changed."""
    rows: dict[str, Any] = dict(zoo.SEGMENTATION if segmentor else zoo.DETECTION)
    row = next(row for row in rows.values() if row.arch == named.name)
    return Config.fromfile(str(zoo.config_folder() / row.config))


def _scale_eta_min(schedulers: Any, factor: float) -> None:
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if isinstance(scheduler, dict) and scheduler.get("eta_min"):
            scheduler["eta_min"] *= factor
