"""Mask2Former with the same weights in detectron2, in mmdet 3 and mmseg 1, and in transformers.

`_TABLE` has the name of each module in all of them. They differ in more than names in four places:

- transformers has separate projections of query, key and value in the decoder's self-attention; the others have the
  packed one of `torch.nn.MultiheadAttention`, and so has transformers in its cross-attention.
- mmdet's panoptic head counts all things before all stuff. Everywhere else classes have the order of the data set,
  which is another one for ADE20K and Cityscapes. The last class is always "no object".
- `criterion.empty_weight`, the weight of each class in the loss, is in the files of detectron2 and transformers; with
  OpenMMLab it is in the configs.
- Code of detectron2's Mask2Former takes a state dict without `_metadata` for one of its first version, whose names
  had no `pixel_decoder.` and said `static_query`, and renames it.

The rest is the same everywhere: the order of the scales (1/32, 1/16, 1/8), every shape, the layout of MSDeformAttn.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..zoo import ade20k

# Modules in OpenMMLab, detectron2 and transformers. {} is a number; the parameters' own names (weight, ...) follow.
# The first line of a group is what its names start with, a dot for nothing.
_TABLE = """
pixel_decoder.                   pixel_decoder.                 model.pixel_level_module.decoder.
    input_convs.{}.conv              input_proj.{}.0                input_projections.{}.0
    input_convs.{}.gn                input_proj.{}.1                input_projections.{}.1
    level_encoding.weight            transformer.level_embed        level_embed
    lateral_convs.0.conv             adapter_1                      adapter_1.0
    lateral_convs.0.gn               adapter_1.norm                 adapter_1.1
    output_convs.0.conv              layer_1                        layer_1.0
    output_convs.0.gn                layer_1.norm                   layer_1.1
    mask_feature                     mask_features                  mask_projection
pixel_decoder.encoder.layers.{}. pixel_decoder.transformer.encoder.layers.{}. model.pixel_level_module.decoder.encoder.layers.{}.
    self_attn.sampling_offsets       self_attn.sampling_offsets     self_attn.sampling_offsets
    self_attn.attention_weights      self_attn.attention_weights    self_attn.attention_weights
    self_attn.value_proj             self_attn.value_proj           self_attn.value_proj
    self_attn.output_proj            self_attn.output_proj          self_attn.output_proj
    norms.0                          norm1                          self_attn_layer_norm
    ffn.layers.0.0                   linear1                        fc1
    ffn.layers.1                     linear2                        fc2
    norms.1                          norm2                          final_layer_norm
transformer_decoder.layers.{}.   predictor.transformer_         model.transformer_module.decoder.layers.{}.
    cross_attn.attn                  cross_attention_layers.{}.multihead_attn  cross_attn
    norms.0                          cross_attention_layers.{}.norm            cross_attn_layer_norm
    self_attn.attn                   self_attention_layers.{}.self_attn        self_attn
    norms.1                          self_attention_layers.{}.norm             self_attn_layer_norm
    ffn.layers.0.0                   ffn_layers.{}.linear1          fc1
    ffn.layers.1                     ffn_layers.{}.linear2          fc2
    norms.2                          ffn_layers.{}.norm             final_layer_norm
.                                predictor.                     model.transformer_module.
    decoder_input_projs.{}           input_proj.{}                  input_projections.{}
    query_feat                       query_feat                     queries_features
    query_embed                      query_embed                    queries_embedder
    level_embed                      level_embed                    level_embed
    transformer_decoder.post_norm    decoder_norm                   decoder.layernorm
    mask_embed.0                     mask_embed.layers.0            decoder.mask_predictor.mask_embedder.0.0
    mask_embed.2                     mask_embed.layers.1            decoder.mask_predictor.mask_embedder.1.0
    mask_embed.4                     mask_embed.layers.2            decoder.mask_predictor.mask_embedder.2.0
.                                predictor.                     .
    cls_embed                        class_embed                    class_predictor
"""  # noqa: E501
_COLUMN = {"mmdet3": 0, "mmseg1": 0, "detectron2": 1, "huggingface": 2}
LAYOUTS = tuple(_COLUMN)
# by layout: the prefix of the heads' names, that of the backbone's, and a tensor that no other layout has
_HEAD = {"mmdet3": "panoptic_head.", "mmseg1": "decode_head.", "detectron2": "sem_seg_head.", "huggingface": ""}
_BACKBONE = dict.fromkeys(LAYOUTS, "backbone.") | {"huggingface": "model.pixel_level_module.encoder."}
_UNIQUE_TENSOR = {
    "mmdet3": "panoptic_head.query_feat.weight",
    "mmseg1": "decode_head.query_feat.weight",
    "detectron2": "sem_seg_head.predictor.query_embed.weight",
    "huggingface": "model.transformer_module.queries_embedder.weight",
}
_PARAMETER = r"((?:\.out_proj)?\.(?:weight|bias)|\.in_proj_(?:weight|bias)|)"
_QUERY = re.compile(r"(.+\.decoder\.layers\.\d+\.self_attn\.)[qkv]_proj(\.weight|\.bias)")
_PACKED = re.compile(r"(.+\.decoder\.layers\.\d+\.self_attn\.)in_proj_(weight|bias)")

_EMPTY_WEIGHT = "criterion.empty_weight"
NO_OBJECT_WEIGHT = 0.1  # MODEL.MASK_FORMER.NO_OBJECT_WEIGHT of all published models, and transformers' default
# by number of classes, in the order of the data set; with any other number the first classes are the things
_THINGS: dict[int, Sequence[int]] = {len(ade20k.NAMES): ade20k.THINGS, 19: range(11, 19)}

# Names of tensors that become others together: the old names; the new names and tensors.
Step = tuple[tuple[str, ...], dict[str, Tensor]]


def _rows() -> Iterator[list[str]]:
    starts: list[str] = []
    for line in _TABLE.strip().splitlines():
        names = line.split()
        if line.startswith(" "):
            yield [start + name for start, name in zip(starts, names, strict=True)]
        else:
            starts = ["" if name == "." else name for name in names]


_ROWS = list(_rows())
_PATTERNS = [
    [re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + _PARAMETER) for name in column]
    for column in zip(*_ROWS, strict=True)
]


def find_layout(state: Mapping[str, Tensor]) -> str | None:
    """Which of `LAYOUTS` a Mask2Former comes from; None if there is none in `state`."""
    return next((name for name, tensor in _UNIQUE_TENSOR.items() if tensor in state), None)


def to_common(state: Mapping[str, Tensor], source: str, things: Sequence[int] | None = None) -> Iterator[Step]:
    """A Mask2Former in the common form: names as in mmdet, classes in the order of the data set.

    Args:
        state: the whole model, as one of `LAYOUTS` saves it.
        source: its name.
        things: which classes of the data set are things; see `_THINGS`. Only mmdet's files depend on it.

    Yields:
        Names in `state` and the tensors they become.

    Raises:
        ValueError: a name without a counterpart, a query without its key and value, `things` that cannot be.
    """
    backbone = {name: tensor for name, tensor in state.items() if name.startswith(_BACKBONE[source])}
    yield from _backbone_steps(backbone, _BACKBONE[source], "backbone.", source == "huggingface", to_huggingface=False)
    for key, tensor in state.items():
        if key in backbone or key in ("pixel_mean", "pixel_std"):  # only the oldest files have these
            continue
        if key == _EMPTY_WEIGHT:
            yield (key,), {key: tensor}
            continue
        name = key.removeprefix(_HEAD[source])
        if source == "detectron2" and key != name:
            name = _second_version(name)
        part = _QUERY.fullmatch(name) if source == "huggingface" else None
        if part:
            keys = tuple(f"{part[1]}{letter}_proj{part[2]}" for letter in "qkv")
            if missing := [other for other in keys if other not in state]:
                raise ValueError(f"{key} becomes one tensor with {', '.join(missing)}, and the file has no such")
            if key == next(other for other in state if other in keys):
                packed = f"{part[1]}in_proj_{part[2].removeprefix('.')}"
                yield keys, {_rename(packed, source, "mmdet3"): torch.cat([state[other] for other in keys])}
            continue
        name = _rename(name, source, "mmdet3")
        if source == "mmdet3" and name.startswith(_HEAD["mmdet3"] + "cls_embed."):
            tensor = tensor[_things_first(len(tensor), things).argsort()]
        yield (key,), {name: tensor}


def from_common(state: Mapping[str, Tensor], to: str, things: Sequence[int] | None = None) -> Iterator[Step]:
    """The inverse of `to_common`; a missing `criterion.empty_weight` is made, from no name, with `NO_OBJECT_WEIGHT`."""
    in_loss = to in ("detectron2", "huggingface")
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    yield from _backbone_steps(backbone, "backbone.", _BACKBONE[to], to == "huggingface", to_huggingface=True)
    for key, tensor in state.items():
        if key == _EMPTY_WEIGHT and in_loss:
            yield (key,), {key: tensor}
        if key in backbone or key == _EMPTY_WEIGHT:
            continue
        name = _rename(key.removeprefix(_HEAD["mmdet3"]), "mmdet3", to)
        if to == "mmdet3" and ".cls_embed." in key:
            tensor = tensor[_things_first(len(tensor), things)]
        if packed := _PACKED.fullmatch(name) if to == "huggingface" else None:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            yield (key,), {f"{packed[1]}{letter}_proj.{packed[2]}": chunk.clone() for letter, chunk in parts}
        else:
            yield (key,), {name: tensor}
    if in_loss and _EMPTY_WEIGHT not in state:
        weight = torch.ones_like(state[_HEAD["mmdet3"] + "cls_embed.bias"])
        weight[-1] = NO_OBJECT_WEIGHT
        yield (), {_EMPTY_WEIGHT: weight}


def second_version(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The state dict with the versions by which detectron2's Mask2Former knows that its names are the present ones."""
    versioned = OrderedDict(state)
    versioned._metadata = {  # type: ignore[attr-defined]
        "": {"version": 1},
        **{module: {"version": 2} for module in ("sem_seg_head", "sem_seg_head.predictor")},
    }
    return versioned


def _rename(name: str, source: str, to: str) -> str:
    """A name of the heads, without what they start with in `source`, as `to` has it, with it."""
    for row, pattern in zip(_ROWS, _PATTERNS[_COLUMN[source]], strict=True):
        if match := pattern.fullmatch(name):
            *numbers, parameter = match.groups()
            return _HEAD[to] + row[_COLUMN[to]].format(*numbers) + parameter
    raise ValueError(f"{name} is no name of a Mask2Former with one extra scale and learned queries in {source}")


def _second_version(name: str) -> str:
    """A name of detectron2's heads as the second version of its Mask2Former has it."""
    if not name.startswith(("pixel_decoder.", "predictor.")):
        name = f"pixel_decoder.{name}"
    return name.replace("static_query", "query_feat")


def _things_first(rows: int, things: Sequence[int] | None) -> Tensor:
    """Where mmdet's classes, "no object" included, are in the order of the data set: indices ``[rows]``."""
    classes = range(rows - 1)
    first = _THINGS.get(len(classes), ()) if things is None else things
    if len(set(first)) != len(first) or not set(first) <= set(classes):
        raise ValueError(f"things {list(first)}: expected different numbers from 0 to {len(classes) - 1}")
    return torch.tensor([*first, *(label for label in classes if label not in first), rows - 1])


def _backbone_steps(
    state: Mapping[str, Tensor], start: str, new_start: str, transformers: bool, *, to_huggingface: bool
) -> Iterator[Step]:
    """The backbone with another start of its names and, if `transformers` is on one side, other names."""
    bare = {name.removeprefix(start): tensor for name, tensor in state.items()}
    steps: Iterable[Step] = (((name,), {name: tensor}) for name, tensor in bare.items())
    if bare and transformers:
        from .huggingface import steps_from_huggingface, steps_to_huggingface

        if to_huggingface:
            steps = steps_to_huggingface(bare)
        else:
            # the norm of an output that no Mask2Former uses
            bare = {name: tensor for name, tensor in bare.items() if not name.startswith("hidden_states_norms.stem.")}
            steps = steps_from_huggingface(bare)
    for names, targets in steps:
        yield (
            tuple(start + name for name in names),
            {new_start + name: tensor for name, tensor in targets.items()},
        )
