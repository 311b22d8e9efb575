"""Parameter groups of optimizers: learning rates that decay layer by layer, and what has no weight decay.

    groups = parameter_groups(model, lr=1e-4, weight_decay=0.05, layer_decay=0.8)
    optimizer = torch.optim.AdamW(groups)

The model may be anything with a NAT, DiNAT or DiNAT_s in it: a backbone, a classifier, a detector. The adapters of
OpenMMLab and Detectron2 use the same functions.
"""

import fnmatch
from collections.abc import Collection
from typing import Any

from torch import nn

from .backbone import BackboneBase
from .isotropic import Isotropic


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    *,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    no_weight_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups for an optimizer, equal to those of timm's `param_groups_layer_decay`.

    Args:
        model: with one of our backbones in it, or being one. Frozen parameters are left out.
        lr: learning rate of what is deepest; None leaves `lr` out of the groups, which then have `lr_scale` alone.
        weight_decay: of all but norms, biases, layer scale and bias tables `rpb`.
        layer_decay: see `layer_scales`.
        no_weight_decay: names of further parameters without weight decay; may be patterns such as "*query_embed*".

    Returns:
        Dicts with `params`, `param_names`, `weight_decay`, `lr_scale` and, with `lr`, ``lr * lr_scale`` as `lr`.

    Raises:
        ValueError: see `layer_scales`.
    """
    scales = layer_scales(model, layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = has_weight_decay(name, parameter) and not any(fnmatch.fnmatch(name, p) for p in no_weight_decay)
        group = groups.setdefault(
            (scales[name], decays),
            dict(params=[], param_names=[], weight_decay=weight_decay if decays else 0.0, lr_scale=scales[name]),
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
        if lr is not None:
            group["lr"] = lr * scales[name]
    return list(groups.values())


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """False for norms, biases, layer scale and bias tables, which timm and mmpretrain leave out likewise."""
    return parameter.dim() > 1 and not name.endswith((".bias", "rpb"))


def check_layer_decay(layer_decay: float, name: str = "layer_decay") -> None:
    """ValueError, with the argument's name, if it is no factor from layer to layer."""
    if not 0 < layer_decay <= 1:
        raise ValueError(f"{name}={layer_decay}: expected more than 0 and at most 1")


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factors for the learning rates of all parameters, by name: ``layer_decay ** distance from the deepest layer``.

    The tokenizer, each block with what follows it, and what reads the backbone (neck, heads, classifier) are a layer
    each, see `BackboneBase.get_layer_depth`.

    Args:
        layer_decay: more than 0 and at most 1, which leaves all learning rates equal.

    Raises:
        ValueError: another `layer_decay`; less than 1 for a model without a backbone of ours.
    """
    check_layer_decay(layer_decay)
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, (BackboneBase, Isotropic))]
    if not found and layer_decay < 1:
        raise ValueError(f"layer_decay={layer_decay}: {type(model).__name__} has no NAT, DiNAT or DiNAT_s in it")
    for path, backbone in found:
        prefix = f"{path}." if path else ""
        depths = {name: backbone.get_layer_depth(name, prefix)[0] for name in names}
        deepest = max(depths.values())  # without neck and heads the last block
        scales |= {name: layer_decay ** (deepest - depth) for name, depth in depths.items() if name.startswith(prefix)}
    return scales
