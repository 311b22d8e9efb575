"""Layer-wise learning rates in a LazyConfig, whose optimizer knows parameters by their names alone."""

from collections.abc import Sequence

from ... import zoo
from ...backbone import layer_depth
from ...optim import check_layer_decay
from .backbone import STAGES


def get_lr_decay_rate(
    name: str,
    lr_decay_rate: float = 1.0,
    *,
    arch: str | None = None,
    depths: Sequence[int] | None = None,
    out_features: Sequence[str] = STAGES,
) -> float:
    """The factor of a parameter's learning rate, as Detectron2's `get_vit_lr_decay_rate` has it for plain ViTs.

        optimizer.params.lr_factor_func = partial(get_lr_decay_rate, lr_decay_rate=0.8, arch="dinat_tiny")

    Equal to `optim.layer_scales` of the whole model: the tokenizer, each block with what follows it, and the pyramid
    with the heads are a layer each.

    Args:
        name: of a parameter of a model whose `backbone` is one of ours, or a pyramid with one as its `bottom_up`.
        lr_decay_rate: more than 0 and at most 1, which leaves all learning rates equal.
        arch: of the backbone, a name of `zoo.ARCHS`.
        depths: its blocks per stage, where no `arch` names it.
        out_features: those of the backbone; stages after the last of them do not count.

    Raises:
        ValueError: another `lr_decay_rate`; neither `arch` nor `depths`, or an unknown `arch`; unknown `out_features`.
    """
    check_layer_decay(lr_decay_rate, "lr_decay_rate")
    if depths is None and arch is None:
        raise ValueError("get_lr_decay_rate needs the backbone's arch=... or depths=...")
    if not out_features or not set(out_features) <= set(STAGES):
        raise ValueError(f"out_features={list(out_features)}: expected some of {', '.join(STAGES)}")
    built = max(map(STAGES.index, out_features)) + 1
    blocks = (zoo.arch(arch).depths if depths is None and arch else depths or ())[:built]
    deepest = sum(blocks) + 1
    prefix = "backbone."
    inside = name.startswith(prefix)
    depth = layer_depth(name.removeprefix(prefix).removeprefix("bottom_up."), blocks) if inside else deepest
    return lr_decay_rate ** (deepest - depth)
