"""Any model of mmdet or mmseg with its backbone replaced:

    cfg = with_backbone(Config.fromfile("retinanet_r50_fpn_1x_coco.py"), "dinat_tiny")

No model is known by name. The old backbone is built and run without weights for the channels and strides of its maps,
the neck for which of them it reads; the new backbone returns the stages with those strides and no others (a stage that
nobody reads has no gradient, which DistributedDataParallel takes for an error), and every `in_channels` behind it
follows. SwapError says why a model cannot be swapped.
"""

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from .. import zoo
from . import openmmlab
from .openmmlab_probe import (
    FeatureMap,
    SwapError,
    backbone_maps,
    build,
    is_sequence,
    neck_maps,
    read_by_head,
    type_name,
)
from .openmmlab_recipe import published_recipe, set_optimizer

STRIDES = (4, 8, 16, 32)  # of every backbone of `zoo.ARCHS`
# Parts of a model that read no map of the backbone.
NOT_BEHIND = ("backbone", "neck", "data_preprocessor", "train_cfg", "test_cfg", "init_cfg", "language_model", "tracker")
SEGMENTOR_HEADS = ("decode_head", "auxiliary_head")


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
    openmmlab.mmcv_ext.install()
    _drop_import(cfg, "mmpretrain", unless_in=_without_backbones(cfg.model))
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        import_framework(cfg.get("default_scope") or "mmdet")
        model = find_model(cfg.model)
        unswapped = copy.deepcopy(model)
        old = _maps_of(model)
        _replace(model, old, named, min(_crop(cfg)))
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


# --------------------------------------------------------------------------------------------- channels and strides


def _maps_of(model: ConfigDict) -> list[FeatureMap]:
    """The maps of the old backbone. Where the package of its class is not installed, those that the config lets expect:
    as many as `out_indices`, the last one at stride 32, with the channels that the neck or the heads read."""
    package = model.backbone.type.rpartition(".")[0].split(".")[0] if isinstance(model.backbone.type, str) else ""
    if not package or importlib.util.find_spec(package):
        return backbone_maps(model.backbone)
    count = len(model.backbone.get("out_indices") or STRIDES)
    reader = model.get("neck") or model.get("decode_head") or {}
    reader = reader[0] if is_sequence(reader) else reader
    channels = reader.get("in_channels")
    if count > len(STRIDES) or channels is None or not is_sequence(channels) or len(channels) != count:
        raise SwapError(f"backbone {model.backbone.type} cannot be built: {package} is not installed")
    return [FeatureMap(*pair) for pair in zip(channels, STRIDES[-count:], strict=True)]


def _replace(model: ConfigDict, old: Sequence[FeatureMap], named: zoo.Arch, size: int) -> None:
    """Puts `out_indices` into a new backbone, and the new channels into the neck and the heads; segmentors are given
    images of `size`."""
    if "shared_head" in (model.get("roi_head") or {}):
        raise SwapError("roi_head.shared_head is the last stage of the old backbone (C4), which reads its own stage 3")
    segmentor = any(head in model for head in SEGMENTOR_HEADS)
    neck, read = model.get("neck"), list(range(len(old)))
    seen_by_heads = list(old)
    if neck is not None:
        inner = [key for key in _dicts(neck) if "backbone" in key]
        if inner:
            raise SwapError(
                f"neck {type_name(neck)} has a backbone of its own (`{inner[0]}`) that belongs to the old one"
            )
        seen_by_heads, read = neck_maps(neck, old)
    if neck is not None and _makes_pyramid(old, seen_by_heads):
        # the neck of a plain ViT: heads read the stages with the strides that it made of one
        del model["neck"]
        neck, old, read = None, seen_by_heads, list(range(len(seen_by_heads)))
    if neck is None and segmentor:
        read = sorted({i for name in SEGMENTOR_HEADS for i in _read_by_heads(model.get(name), old, size)})
    stage_of = _stages(old, read, segmentor)
    stages = sorted(set(stage_of.values()))
    new = [FeatureMap(named.embed_dim * 2**stage, STRIDES[stage]) for stage in stages]
    position = {i: stages.index(stage) for i, stage in stage_of.items()}  # of a map read, among the new ones
    model.backbone = ConfigDict(type=named.family, out_indices=stages)
    if neck is not None:
        _map_neck(neck[0] if isinstance(neck, list) else neck, old, read, new, position)
        seen_now, read_now = neck_maps(neck, new)
        if len(read_now) != len(new):
            raise SwapError(f"neck {type_name(neck)} reads maps {read_now} of {len(new)} alone")
        if [map.channels for map in seen_now] == [map.channels for map in seen_by_heads]:
            return
        if len(seen_now) != len(seen_by_heads):
            raise SwapError(
                f"neck {type_name(neck)} makes {len(seen_now)} maps instead of {len(seen_by_heads)} of the new backbone"
            )
        old, new, position = seen_by_heads, seen_now, {i: i for i in range(len(seen_now))}
    if segmentor:
        for name in SEGMENTOR_HEADS:
            runs = [read_by_head(head, old, size) is not None for head in _heads(model.get(name))]
            _map_segmentor_head(model.get(name), old, new, position)
            for head, ran in zip(_heads(model.get(name)), runs, strict=True):
                if ran and read_by_head(head, new, size) is None:
                    strides = [map.stride for map in new]
                    raise SwapError(
                        f"{head['type']} does not run on maps of strides {strides} of {size} x {size} pixels"
                    )
    else:
        _map_channels({key: value for key, value in model.items() if key not in NOT_BEHIND}, old, new)


def _stages(old: Sequence[FeatureMap], read: Sequence[int], segmentor: bool) -> dict[int, int]:
    """The stage that takes the place of each map that is read.

    By stride. Segmentors, whose heads resize what they read, may also have dilated backbones and plain ViTs, with
    several maps of one stride: those take stages by their order, the deepest one the last stage.
    """
    strides = [old[i].stride for i in read]
    if not read:
        raise SwapError("nothing reads the maps of the backbone")
    if strides != sorted(strides) or len(read) > len(STRIDES):
        raise SwapError(f"the model reads maps of strides {strides}; the stages of a DiNAT have {list(STRIDES)}")
    by_stride = len(set(strides)) == len(strides) and set(strides) <= set(STRIDES)
    if by_stride and (not segmentor or strides[-1] == STRIDES[-1]):
        return {i: STRIDES.index(stride) for i, stride in zip(read, strides, strict=True)}
    if not segmentor:
        raise SwapError(f"the model reads maps of strides {strides}; the stages of a DiNAT have {list(STRIDES)}")
    if len(old) == len(STRIDES):
        return {i: i for i in read}
    first = len(STRIDES) - len(read)
    return {i: first + order for order, i in enumerate(read)}


def _makes_pyramid(inputs: Sequence[FeatureMap], outputs: Sequence[FeatureMap]) -> bool:
    strides = [map.stride for map in outputs]
    plain = len(inputs) > 1 and len({map.stride for map in inputs}) == 1
    return plain and len(set(strides)) == len(strides) > 1 and set(strides) <= set(STRIDES)


def _map_neck(
    neck: ConfigDict,
    old: Sequence[FeatureMap],
    read: Sequence[int],
    new: Sequence[FeatureMap],
    position: dict[int, int],
) -> None:
    """Puts the channels of the new maps into a neck, and moves its levels by the maps in front that it did not read."""
    given = neck.get("in_channels")
    channels = [new[position[i]].channels for i in read]
    if is_sequence(given):
        before = [map.channels for map in old]
        backwards = list(given) == before[::-1] != before
        neck.in_channels = type(given)(channels[::-1] if backwards else channels)
    elif given is not None:
        neck.in_channels = channels[-1]
    skipped = read[0]
    for key in ("start_level", "end_level"):
        if isinstance(neck.get(key), int) and neck[key] >= skipped > 0:
            neck[key] -= skipped


def _heads(head: Any) -> list[dict[str, Any]]:
    """A head of mmseg or a list of heads, as a list."""
    return list(head) if isinstance(head, (list, tuple)) else [head] if isinstance(head, dict) else []


def _read_by_heads(heads: Any, old: Sequence[FeatureMap], size: int) -> list[int]:
    """Indices of the maps that a head of mmseg, or a list of heads, reads."""
    read = []
    for head in _heads(heads):
        found = read_by_head(head, old, size)
        read += _listed_by_head(head, len(old)) if found is None else found
    return read


def _listed_by_head(head: dict[str, Any], count: int) -> list[int]:
    """Indices of the maps that the config of a head names."""
    read = [0] if "c1_in_channels" in head else []
    inner = [value for value in head.values() if isinstance(value, dict) and "in_index" in value]
    if "in_index" not in head and is_sequence(head.get("in_channels")):
        read += range(count)
    elif "in_channels" in head or not inner:
        read += [i % count for i in _listed(head.get("in_index", -1))]
    return read + [i for part in inner for i in _listed_by_head(part, count)]


def _map_segmentor_head(
    head: Any, old: Sequence[FeatureMap], new: Sequence[FeatureMap], position: dict[int, int]
) -> None:
    """Puts the new channels and indices into a head of mmseg, or a list of heads."""
    if isinstance(head, (list, tuple)):
        for part in head:
            _map_segmentor_head(part, old, new, position)
        return
    if not isinstance(head, dict):
        return
    for part in head.values():
        if isinstance(part, dict) and "in_index" in part:
            _map_segmentor_head(part, old, new, position)
    if "c1_in_channels" in head:
        head["c1_in_channels"] = new[position[0]].channels
    if "in_channels" not in head:
        return
    everything = list(range(len(old))) if is_sequence(head["in_channels"]) and "in_index" not in head else None
    read = everything or [i % len(old) for i in _listed(head.get("in_index", -1))]
    read = [i for i in read if i in position]  # EncHead without lateral connections lists more than it reads
    before = head["in_channels"]
    after = [new[position[i]].channels for i in read]
    head["in_channels"] = type(before)(after) if is_sequence(before) else after[0]
    if "in_index" in head or not is_sequence(before):
        index = [position[i] for i in read]
        head["in_index"] = index if is_sequence(head.get("in_index", -1)) else index[0]
    if head.get("num_convs") == 0 and head.get("channels") == before:
        head["channels"] = head["in_channels"]  # mmseg's heads without convolutions insist on it


def _listed(value: Any) -> list[Any]:
    return list(value) if is_sequence(value) else [value]


def _map_channels(part: Any, old: Sequence[FeatureMap], new: Sequence[FeatureMap]) -> None:
    """Puts the new channels wherever a part of a detector names the old ones."""
    before, after = [map.channels for map in old], [map.channels for map in new]
    if isinstance(part, (list, tuple)):
        for item in part:
            _map_channels(item, old, new)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        is_extractor = key == "out_channels" and "featmap_strides" in part
        if key != "in_channels" and not is_extractor:
            _map_channels(value, old, new)
        elif is_sequence(value) and list(value) == before:
            part[key] = type(value)(after)
        elif len(before) == 1 and value == before[0]:
            part[key] = after[0]


def _dicts(part: Any) -> Iterator[str]:
    """Keys of all dicts inside `part`."""
    if isinstance(part, dict):
        for key, value in part.items():
            if isinstance(value, dict):
                yield key
            yield from _dicts(value)
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _dicts(item)


# ------------------------------------------------------------------------------------------------ the rest of a config


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
    modules = _listed(imports.get("imports") or [])
    if openmmlab.__name__ not in modules:
        modules.append(openmmlab.__name__)
    cfg.custom_imports = dict(imports=modules, allow_failed_imports=imports.get("allow_failed_imports", False))


def _drop_import(cfg: Config, package: str, unless_in: Any) -> None:
    """Leaves out `custom_imports` that only the old backbone needed."""
    imports = cfg.get("custom_imports") or {}
    if f"{package}." not in repr(unless_in) and imports:
        cfg.custom_imports.imports = [m for m in _listed(imports["imports"]) if m.split(".")[0] != package]


def _without_backbones(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _without_backbones(value) for key, value in part.items() if key != "backbone"}
    return [_without_backbones(item) for item in part] if isinstance(part, (list, tuple)) else part
