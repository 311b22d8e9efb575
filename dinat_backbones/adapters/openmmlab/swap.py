"""Any model of mmdet or mmseg with its backbone replaced:

    cfg = with_backbone(Config.fromfile("retinanet_r50_fpn_1x_coco.py"), "dinat_tiny")

No model is known by name. The old backbone is built and run without weights for the channels and strides of its maps,
the neck for which of them it reads; the new backbone returns the stages with those strides and no others (a stage that
nobody reads has no gradient, which DistributedDataParallel takes for an error), and every `in_channels` behind it
follows. SwapError says why a model cannot be swapped.
"""

import copy
import importlib
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from ... import zoo
from .channels import SEGMENTOR_HEADS, as_list, maps_of_backbone, replace_backbone
from .probe import SwapError, build
from .recipe import published_recipe, set_optimizer

ADAPTER = __package__  # what the new config imports


def with_backbone(
    cfg: Config,
    arch: str,
    *,
    dilations: Any = None,
    checkpoint: str | None = None,
    keep_optimizer: bool = False,
) -> Config:
    """A copy of a config of mmdet or mmseg whose model has a NAT, DiNAT or DiNAT_s for a backbone.

    Args:
        cfg: any config with a model; it is left as it is.
        arch: one of `zoo.ARCHS`.
        dilations: as of `dinat_backbones.DiNAT`; None for those published for COCO, or for ADE20K at about the size of
            the training crop.
        checkpoint: file or http(s) address of the backbone's weights; None for the published ImageNet weights, "none"
            for random ones.
        keep_optimizer: leave `optim_wrapper` and `param_scheduler` alone. Otherwise SGD becomes AdamW as the published
            models had it, and norms and rpb have no weight decay.

    Raises:
        SwapError (a ValueError): the model is tied to its backbone, or has none.
        ValueError: unknown `arch` or dilation setting.
    """
    named = zoo.arch(arch)
    cfg = copy.deepcopy(cfg)
    if cfg.get("model") is None:
        raise SwapError("the config has no model")
    _drop_import(cfg, "mmpretrain", unless_in=_without_backbones(cfg.model))
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        import_framework(cfg.get("default_scope") or "mmdet")
        model = find_model(cfg.model)
        unswapped = copy.deepcopy(model)
        old = maps_of_backbone(model)
        replace_backbone(model, old, named, min(_crop(cfg)))
        model.backbone.update(_arguments(cfg, named, dilations, checkpoint))
        if "language_model" not in model:  # which would be downloaded
            _check_build(model, unswapped)
    _forget_old_weights(cfg, model)
    if model.backbone.get("init_cfg") and checkpoint is None:
        _normalize_as_imagenet(cfg)
    _import_adapter(cfg)
    if not keep_optimizer:
        set_optimizer(cfg, named)
    return cfg


def _check_build(model: ConfigDict, unswapped: ConfigDict) -> None:
    """SwapError if the new model cannot be built, and the old one can: otherwise it is not for the backbone."""
    try:
        build(model, "model")
    except SwapError:
        try:
            build(unswapped, "model")
        except SwapError:
            return
        raise


def import_framework(scope: str) -> None:
    """Import the models of a framework, so that its registry knows them.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    importlib.import_module(scope if scope not in ("mmdet", "mmseg", "mmpretrain") else f"{scope}.models")


def find_model(model: ConfigDict) -> ConfigDict:
    """The part of a model that has the backbone: the model itself, or its `detector` (trackers, semi-supervised ones).

    Raises:
        SwapError: neither has one.
    """
    for part in (model, model.get("detector")):
        if isinstance(part, dict) and isinstance(part.get("backbone"), dict) and "type" in part["backbone"]:
            return part
    raise SwapError(f"model {model.get('type')} has no `backbone` that could be replaced")


def changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The entries that differ between two configs, one line each: "model.neck.in_channels: [256, 512] -> [64, 128]"."""
    if isinstance(old, Config) and isinstance(new, Config):
        old, new = old.to_dict(), new.to_dict()
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and ("arch" in new or path.endswith("custom_keys")):
        yield f"{path}: {old.get('type') or _short(old)} -> {_short(new)}"
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(map(_nested, old)):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from changes(before, after, f"{path}[{i}]")
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = repr(dict(value) if isinstance(value, dict) else value)
    return text if len(text) <= 300 else text[:297] + "..."


def _nested(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _arguments(cfg: Config, named: zoo.Arch, dilations: Any, checkpoint: str | None) -> dict[str, Any]:
    """The arguments of the new backbone besides `type` and `out_indices`."""
    segmentor = any(head in find_model(cfg.model) for head in SEGMENTOR_HEADS)
    published = published_recipe(named, segmentor).model.backbone
    arguments: dict[str, Any] = dict(arch=named.name, drop_path_rate=published.get("drop_path_rate", 0.0))
    if named.family != "NAT":
        if dilations is None:
            dilations = "coco" if not segmentor else "ade20k-640" if min(_crop(cfg)) >= 640 else "ade20k-512"
        if isinstance(dilations, str):
            zoo.dilations(named.name, dilations)  # raises for unknown settings
        arguments["dilations"] = dilations
    channels = cfg.model.get("data_preprocessor", {}).get("mean")
    in_chans = len(channels) if channels is not None and len(channels) > 3 else 3
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    if checkpoint is None:  # RGB weights adapt to other channels
        checkpoint = published.init_cfg.checkpoint
    if checkpoint not in (None, "none"):
        arguments["init_cfg"] = dict(type="Pretrained", checkpoint=checkpoint)
    return arguments


def _crop(cfg: Config) -> tuple[int, int]:
    size = cfg.get("crop_size") or cfg.model.get("data_preprocessor", {}).get("size") or 512
    return (size, size) if isinstance(size, int) else tuple(size)


def _forget_old_weights(cfg: Config, model: ConfigDict) -> None:
    """Checkpoints of the whole model hold another backbone."""
    for part in (cfg.model, model):
        if part.get("pretrained") is not None:
            part.pretrained = None
        init_cfg = part.get("init_cfg")
        if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained":
            del part["init_cfg"]
    for key in ("load_from", "resume_from"):
        if cfg.get(key):
            cfg[key] = None


def _normalize_as_imagenet(cfg: Config) -> None:
    """The published weights want RGB, normalized with ImageNet's mean and standard deviation."""
    wanted = dict(mean=list(zoo.IMAGENET_MEAN), std=list(zoo.IMAGENET_STD))
    for preprocessor in _preprocessors(cfg.model):
        mean = preprocessor.get("mean")
        if mean is not None and len(mean) != 3:
            continue
        given = dict(mean=list(mean or []), std=list(preprocessor.get("std") or []))
        if given != wanted or not preprocessor.get("bgr_to_rgb"):
            preprocessor.update(wanted, bgr_to_rgb=True)
            preprocessor.pop("rgb_to_bgr", None)


def _preprocessors(part: Any) -> Iterator[ConfigDict]:
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key == "data_preprocessor" and isinstance(value, dict) and "data_preprocessor" not in value:
            yield value  # that of several branches has the one that normalizes inside
        yield from _preprocessors(value)


def _import_adapter(cfg: Config) -> None:
    imports = dict(cfg.get("custom_imports") or {})
    modules = as_list(imports.get("imports") or [])
    if ADAPTER not in modules:
        modules.append(ADAPTER)
    cfg.custom_imports = dict(imports=modules, allow_failed_imports=imports.get("allow_failed_imports", False))


def _drop_import(cfg: Config, package: str, unless_in: Any) -> None:
    """Leaves out `custom_imports` that only the old backbone needed."""
    imports = cfg.get("custom_imports") or {}
    if f"{package}." not in repr(unless_in) and imports:
        cfg.custom_imports.imports = [m for m in as_list(imports["imports"]) if m.split(".")[0] != package]


def _without_backbones(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _without_backbones(value) for key, value in part.items() if key != "backbone"}
    return [_without_backbones(item) for item in part] if isinstance(part, (list, tuple)) else part
