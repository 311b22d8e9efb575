"""Names of NAT and DiNAT in transformers' files (`shi-labs/*` on the Hugging Face hub), and the published ones.

    to_huggingface(backbone.state_dict())      # of a NAT or DiNAT: backbone, classifier or both
    from_huggingface(state)                 # and back, bit by bit

The names are those of `DinatBackbone` and, without the prefix `dinat.` or `nat.` of a classifier (see `split_prefix`),
those of `DinatForImageClassification`. Only two things differ by more than a name: the three projections of an
attention are one tensor in the published files and three in transformers', and the two layer scales are two vectors in
the published files and one matrix in transformers'.
"""

import os
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_BLOCK = {
    "norm1": "layernorm_before",
    "attn.rpb": "attention.self.rpb",
    "attn.qkv": "attention.self.{}",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "gamma": "layer_scale_parameters",
}
_OUTSIDE_BLOCKS = {
    "patch_embed.proj.0": "embeddings.patch_embeddings.projection.0",
    "patch_embed.proj.1": "embeddings.patch_embeddings.projection.1",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
    "head": "classifier",
}
_PUBLISHED_BLOCK = re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.(.+?)(\.weight|\.bias|(?<=gamma)[12])?")
_HUGGINGFACE_BLOCK = re.compile(r"encoder\.levels\.(\d+)\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")
_FIRST_CONVOLUTION = "embeddings.patch_embeddings.projection.0.weight"
_QKV = ("query", "key", "value")
_GAMMA = ("1", "2")

# The names of one or more tensors, and the tensors they become.
Step = tuple[tuple[str, ...], dict[str, Tensor]]


def find_prefix(state: Mapping[str, Tensor]) -> str | None:
    """What stands before the backbone's names in a file of transformers ("", "dinat.", "nat.", for a segmentation model
    "model.pixel_level_module.encoder."), None if there is no such backbone in it."""
    found = (key.removesuffix(_FIRST_CONVOLUTION) for key in state if key.endswith(_FIRST_CONVOLUTION))
    return next((prefix for prefix in found if prefix == "" or prefix.endswith(".")), None)


def split_prefix(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone of a file of transformers without its prefix, together with the classifier; and everything else.

    `hidden_states_norms.stem`, which no published backbone has, is among everything else.

    Raises:
        ValueError: there is no NAT or DiNAT of transformers in it.
    """
    prefix = find_prefix(state)
    if prefix is None:
        raise ValueError(
            f"expected a NAT or DiNAT of transformers with {_FIRST_CONVOLUTION}; got {', '.join(list(state)[:4])}"
        )
    backbone, others = {}, {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        inside = key.startswith(prefix) or (key.startswith("classifier.") and prefix in ("dinat.", "nat."))
        if inside and not name.startswith("hidden_states_norms.stem."):
            backbone[name] = tensor
        else:
            others[key] = tensor
    return backbone, others


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a NAT or DiNAT under transformers' names.

    Args:
        state: published names without any prefix: `patch_embed.*`, `levels.*`, a backbone's `norm0` ... `norm3`, a
            classifier's `norm` and `head`.

    Returns:
        Names as in `DinatBackbone`, and `layernorm` and `classifier`. No memory is shared with `state`.

    Raises:
        ValueError: a name that is none of those, `gamma1` without `gamma2`, a qkv that is not three equal parts.
    """
    return {name: tensor for _, targets in steps_to_huggingface(state) for name, tensor in targets.items()}


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_huggingface`.

    Args:
        state: transformers' names without any prefix (see `split_prefix`).

    Raises:
        ValueError: a name without a counterpart, a query without its key and value.
    """
    return {name: tensor for _, targets in steps_from_huggingface(state) for name, tensor in targets.items()}


def steps_to_huggingface(state: Mapping[str, Tensor]) -> Iterator[Step]:
    """`to_huggingface`, one step for each name or group of names that become others together."""
    for name, tensor in state.items():
        target = _huggingface_name(name)
        if "{}" in target:
            if tensor.shape[0] % 3:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected query, key and value in equal parts")
            parts = zip(_QKV, tensor.chunk(3), strict=True)
            yield (name,), {target.format(part): chunk.clone() for part, chunk in parts}
        elif re.search(r"\.gamma[12]$", name):
            names = tuple(name[:-1] + digit for digit in _GAMMA)
            if name == next(key for key in state if key in names):
                yield names, {target: torch.stack(_together(state, names))}
        else:
            yield (name,), {target: tensor.clone()}


def steps_from_huggingface(state: Mapping[str, Tensor]) -> Iterator[Step]:
    """`from_huggingface`, one step for each name or group of names that become others together."""
    for name, tensor in state.items():
        target, part = _published_name(name)
        if part:
            names = tuple(name.replace(f".{part}.", f".{other}.") for other in _QKV)
            if name == next(key for key in state if key in names):
                yield names, {target: torch.cat(_together(state, names))}
        elif target.endswith(".gamma"):
            if tensor.dim() != 2 or len(tensor) != len(_GAMMA):
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [2, dim]")
            rows = zip(_GAMMA, tensor, strict=True)
            yield (name,), {target + digit: row.clone() for digit, row in rows}
        else:
            yield (name,), {target: tensor.clone()}


def label(names: tuple[str, ...]) -> str:
    """Names that differ in one place as one: ``attention.self.{query,key,value}.weight``."""
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(names)
    rests = [name[len(start) :] for name in names]
    end = os.path.commonprefix([rest[::-1] for rest in rests])[::-1]
    return f"{start}{{{','.join(rest.removesuffix(end) for rest in rests)}}}{end}"


def _together(state: Mapping[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{label(names)} belong together, and the file has no {', '.join(missing)}")
    return [state[name] for name in names]


def _huggingface_name(name: str) -> str:
    if (block := _PUBLISHED_BLOCK.fullmatch(name)) and block[3] in _BLOCK:
        suffix = "" if block[3] == "gamma" else block[4] or ""
        return f"encoder.levels.{block[1]}.layers.{block[2]}.{_BLOCK[block[3]]}{suffix}"
    if norm := re.fullmatch(r"norm(\d+)\.(.+)", name):
        return f"hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"
    if re.fullmatch(r"levels\.\d+\.downsample\..+", name):
        return f"encoder.{name}"
    module, _, parameter = name.rpartition(".")
    if module in _OUTSIDE_BLOCKS:
        return f"{_OUTSIDE_BLOCKS[module]}.{parameter}"
    raise ValueError(f"{name} has no name in transformers, which knows NAT and DiNAT alone")


def _published_name(name: str) -> tuple[str, str]:
    """The published name, and which of query, key and value it is; "" for other tensors."""
    if block := _HUGGINGFACE_BLOCK.fullmatch(name):
        part = next((part for part in _QKV if block[3] == f"attention.self.{part}"), "")
        published = "attn.qkv" if part else next((name for name, other in _BLOCK.items() if other == block[3]), "")
        if published:
            return f"levels.{block[1]}.blocks.{block[2]}.{published}{block[4] or ''}", part
    if norm := re.fullmatch(r"hidden_states_norms\.stage(\d+)\.(.+)", name):
        return f"norm{int(norm[1]) - 1}.{norm[2]}", ""
    if re.fullmatch(r"encoder\.levels\.\d+\.downsample\..+", name):
        return name.removeprefix("encoder."), ""
    module, _, parameter = name.rpartition(".")
    published = next((name for name, other in _OUTSIDE_BLOCKS.items() if other == module), "")
    if published:
        return f"{published}.{parameter}", ""
    raise ValueError(f"{name} has no place in a published NAT or DiNAT")
