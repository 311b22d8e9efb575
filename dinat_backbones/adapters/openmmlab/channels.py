"""Channels and strides of a swapped backbone: the stages that take the place of the old maps, and the keys of the neck
and the heads that follow from them."""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import ConfigDict

from ... import zoo
from .probe import FeatureMap, SwapError, backbone_maps, is_sequence, neck_maps, read_by_head, type_name

STRIDES = (4, 8, 16, 32)  # of every backbone of `zoo.ARCHS`
# Parts of a model that read no map of the backbone.
NOT_BEHIND = ("backbone", "neck", "data_preprocessor", "train_cfg", "test_cfg", "init_cfg", "language_model", "tracker")
SEGMENTOR_HEADS = ("decode_head", "auxiliary_head")


def maps_of_backbone(model: ConfigDict) -> list[FeatureMap]:
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


def replace_backbone(model: ConfigDict, old: Sequence[FeatureMap], named: zoo.Arch, size: int) -> None:
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
        read += [i % count for i in as_list(head.get("in_index", -1))]
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
    read = everything or [i % len(old) for i in as_list(head.get("in_index", -1))]
    read = [i for i in read if i in position]  # EncHead without lateral connections lists more than it reads
    before = head["in_channels"]
    after = [new[position[i]].channels for i in read]
    head["in_channels"] = type(before)(after) if is_sequence(before) else after[0]
    if "in_index" in head or not is_sequence(before):
        index = [position[i] for i in read]
        head["in_index"] = index if is_sequence(head.get("in_index", -1)) else index[0]
    if head.get("num_convs") == 0 and head.get("channels") == before:
        head["channels"] = head["in_channels"]  # mmseg's heads without convolutions insist on it


def as_list(value: Any) -> list[Any]:
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
