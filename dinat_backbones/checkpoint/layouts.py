"""Conversion between the layouts in which NAT and DiNAT were published and those of today's programs.

Every conversion goes through one form: tensors under the names of a present OpenMMLab model (`backbone.*`, `neck.*`,
`decode_head.*`, ...; `norm.*` and `head.*` of an ImageNet classifier), and the names and colours of the classes. To add
a program, let `_to_common` recognise its files, `_from_common` name its tensors, and put it into `LAYOUTS`. The names
of a Mask2Former are in `mask2former_layouts.py`, those of transformers' backbones and classifiers in `huggingface.py`.

Between mmdet 2.19 / mmseg 0.20, which the published models were trained with, and mmdet 3 / mmseg 1 no tensor of Mask
R-CNN, Cascade Mask R-CNN and UPerNet with its auxiliary head has changed its name or shape. What has moved are the
class names, from `meta.CLASSES` and `meta.PALETTE` to `meta.dataset_meta`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import huggingface, mask2former_layouts
from .fitting import resize_all_rpb
from .loading import EMA_WRAPPERS, WRAPPERS, ema_wrapper, tensors

_CLASSIFIER = ("norm.", "head.")
_FPN_BACKBONE = "backbone.bottom_up."  # where detectron2 has a backbone with a feature pyramid
# the modules of mmdet's and mmseg's models
_OPENMMLAB = re.compile(
    r"(backbone|neck|rpn_head|roi_head|bbox_head|mask_head|panoptic_\w+|semantic_head|decode_head|auxiliary_head)\."
)


@dataclass(frozen=True)
class Layout:
    """How a program's checkpoints look.

    Attributes:
        description: in words.
        bare: a state dict without anything around it, the backbone's names without `backbone.`; False for a dictionary
            of which it is a part.
        class_key: where in "meta" the classes are, with {} for "classes" or "palette"; a dot leads into a dictionary.
        model: what transformers puts before the names of a classifier's backbone; "" for other programs.
    """

    description: str
    bare: bool = False
    class_key: str = ""
    model: str = ""


LAYOUTS = {
    "imagenet": Layout("backbone or classifier alone, as the published ImageNet files", bare=True),
    "mmdet2": Layout("mmdet 2", class_key="{upper}"),
    "mmseg0": Layout("mmseg 0", class_key="{upper}"),
    "mmdet3": Layout("mmdet 3", class_key="dataset_meta.{lower}"),
    "mmseg1": Layout("mmseg 1", class_key="dataset_meta.{lower}"),
    "detectron2": Layout("detectron2: a Mask2Former or a backbone"),
    "huggingface": Layout("transformers: Dinat (classifier or backbone) or a Mask2Former", bare=True, model="dinat."),
    "huggingface-nat": Layout("transformers: Nat (classifier or backbone)", bare=True, model="nat."),
}


@dataclass(frozen=True)
class Change:
    """What became of one entry of a checkpoint.

    `kind` is kept, renamed, resized or reordered (both perhaps renamed, too), dropped, or added.
    """

    kind: str
    source: str
    target: str = ""
    note: str = ""

    def __str__(self) -> str:
        arrow = f" -> {self.target}" if self.target not in ("", self.source) else ""
        return f"{self.kind:8} {self.source}{arrow}{f'  ({self.note})' if self.note else ''}"


def convert(
    checkpoint: Mapping[str, Any], to: str, *, kernel_size: int | None = None, things: Sequence[int] | None = None
) -> tuple[dict[str, Any], list[Change]]:
    """Give a checkpoint another layout.

    Args:
        checkpoint: what `read` returned.
        to: one of `LAYOUTS`.
        kernel_size: resize the bias tables to this kernel size (see `resize_rpb`).
        things: of a Mask2Former: which classes, counted in the order of the data set, are the things that mmdet's
            panoptic head counts first. By default ADE20K's for 150 classes, Cityscapes' for 19, and else the first.

    Returns:
        The new checkpoint, of tensors and plain Python values alone, and what became of every entry of the old one.

    Raises:
        ValueError: an unknown layout on either side, a layout that has no such model, `things` that cannot be.
    """
    if to not in LAYOUTS:
        raise ValueError(f"layout {to!r}: expected one of {', '.join(LAYOUTS)}")
    layout, state = LAYOUTS[to], tensors(checkpoint, ema=True)
    common = _to_common(state, to, things)
    resized = resize_all_rpb({name: tensor for name, (_, tensor) in common.items()}, kernel_size) if kernel_size else {}
    new: dict[str, Tensor] = {}
    changes = []
    unused = dict.fromkeys(state)
    prepared = {name: resized.get(name, tensor) for name, (_, tensor) in common.items()}
    steps = _from_common(prepared, mask2former_layouts.find_layout(state), to, things)
    for names, targets in steps:
        sources = tuple(dict.fromkeys(source for name in names for source in common[name][0]))
        new |= targets
        changes.append(_change(state, sources, targets, any(name in resized for name in names)))
        for source in sources:
            unused.pop(source, None)
    note = f"no place in the layout of {layout.description}"
    changes += [Change("dropped", source, note=note) for source in unused]
    meta, more = _meta(checkpoint, layout)
    if ema := ema_wrapper(checkpoint):
        more.append(Change("kept", ema, note="the moving average (EMA) of the weights, preferred to the others"))
    return _wrapped(new, meta, to), changes + more


def _to_common(
    state: Mapping[str, Tensor], to: str, things: Sequence[int] | None
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """By name in the common form: the names in the file and the tensor."""
    if source := mask2former_layouts.find_layout(state):
        steps = mask2former_layouts.to_common(state, source, things)
        return {name: (sources, tensor) for sources, targets in steps for name, tensor in targets.items()}
    prefix = huggingface.find_prefix(state)
    if prefix is not None:
        steps = huggingface.steps_from_huggingface(huggingface.split_prefix(state)[0])
        return {
            _common_name(name): (tuple(source if source in state else prefix + source for source in sources), tensor)
            for sources, targets in steps
            for name, tensor in targets.items()
        }
    if any(key.startswith("patch_embed.") for key in state):
        return {_common_name(key): ((key,), value) for key, value in state.items()}
    if names := _names_of_mmpretrain(state):
        return {common: ((key,), state[key]) for key, common in names.items()}
    others = [key for key in state if not _OPENMMLAB.match(key)]
    if any(key.startswith(f"{_FPN_BACKBONE}patch_embed.") for key in state) and to in ("imagenet", "detectron2"):
        backbone = {
            key: f"backbone.{key.removeprefix(_FPN_BACKBONE)}" for key in state if key.startswith(_FPN_BACKBONE)
        }
        return {backbone[key]: ((key,), state[key]) for key in backbone}
    if any(key.startswith("backbone.patch_embed.") for key in state) and (
        to in ("imagenet", "detectron2") or not others
    ):
        return {key: ((key,), value) for key, value in state.items()}
    raise ValueError(
        f"cannot convert to {to}: expected a Mask2Former, or a NAT or DiNAT checkpoint of ImageNet, mmdet, mmseg or "
        "detectron2 with patch_embed.* or backbone.patch_embed.*, or one of transformers, and the file has "
        f"{', '.join((others or list(state))[:4]) or 'no tensors'}"
    )


def _names_of_mmpretrain(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Of mmpretrain's classifier the names in the common form, where the norm of its only output is the classifier's;
    nothing of another model."""
    norms = {found[0] for key in state if (found := re.match(r"backbone\.norm\d+\.", key))}
    if "head.fc.weight" not in state or "backbone.patch_embed.norm.weight" not in state or len(norms) != 1:
        return {}
    (norm,) = norms
    return {key: key.replace(norm, "norm.").replace("head.fc.", "head.") for key in state}


def _common_name(name: str) -> str:
    """Of a tensor of a backbone or classifier."""
    return name if name.startswith(_CLASSIFIER) else f"backbone.{name}"


def _from_common(
    state: Mapping[str, Tensor], source: str | None, to: str, things: Sequence[int] | None
) -> Iterator[mask2former_layouts.Step]:
    """Names in the common form, and the tensors that they become in the new file."""
    if source and to in mask2former_layouts.LAYOUTS:
        yield from mask2former_layouts.from_common(state, to, things)
        return
    if source and to != "imagenet":
        layouts = ", ".join(mask2former_layouts.LAYOUTS)
        raise ValueError(f"cannot convert a Mask2Former to {to}: expected imagenet, {layouts}")
    if model := LAYOUTS[to].model:
        yield from _for_transformers(state, model)
        return
    # detectron2 finds the place of names without a prefix by their ends, which `norm0.weight` shares with other norms
    by_end = to == "detectron2" and not any(re.match(r"backbone\.norm\d", name) for name in state)
    for name, tensor in state.items():
        if to == "imagenet":
            belongs = name.startswith(("backbone.", *_CLASSIFIER))
        elif to == "detectron2":
            belongs = name.startswith("backbone.")
        else:
            belongs = not name.startswith(_CLASSIFIER)
        if belongs:
            yield (name,), {name.removeprefix("backbone.") if to == "imagenet" or by_end else name: tensor}


def _for_transformers(state: Mapping[str, Tensor], model: str) -> Iterator[mask2former_layouts.Step]:
    """The backbone or classifier under transformers' names; other tensors are left out."""
    common = {name.removeprefix("backbone."): name for name in state if name.startswith(("backbone.", *_CLASSIFIER))}
    start = model if "head.weight" in common else ""
    for names, targets in huggingface.steps_to_huggingface({bare: state[name] for bare, name in common.items()}):
        new = {k if k.startswith("classifier.") else start + k: tensor for k, tensor in targets.items()}
        yield tuple(common[name] for name in names), new


def _change(
    old: Mapping[str, Tensor], sources: tuple[str, ...], targets: Mapping[str, Tensor], resized: bool
) -> Change:
    """What became of the tensors of these names."""
    source, target, before, after = (
        huggingface.label(sources),
        huggingface.label(tuple(targets)),
        [old[s] for s in sources],
        targets.values(),
    )
    shape, new_shape = (" + ".join(str(list(tensor.shape)) for tensor in side) for side in (before, after))
    kind = "kept" if source == target else "renamed"
    if resized:
        kind = "resized"
    elif not sources:
        kind, source = "added", target
    elif shape == new_shape and not all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
        kind = "reordered"
    return Change(kind, source, target, f"{shape} -> {new_shape}" if sources and shape != new_shape else new_shape)


def _wrapped(state: dict[str, Tensor], meta: dict[str, Any], to: str) -> dict[str, Any]:
    """The file around a state dict."""
    if LAYOUTS[to].bare:
        return state
    if to != "detectron2":
        return {"meta": meta, "state_dict": state}
    file = {"model": state, "__author__": "dinat_backbones"}  # without it detectron2 reads the file as one of Caffe2
    if mask2former_layouts.find_layout(state):
        return file | {"model": mask2former_layouts.second_version(state)}
    return file if any(name.startswith("backbone.") for name in state) else file | {"matching_heuristics": True}


def _meta(checkpoint: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[Change]]:
    """The new "meta", and what became of everything in the file that is no tensor of the model."""
    old = checkpoint.get("meta")
    entries = dict(old) if isinstance(old, Mapping) else {}
    entries |= {f"dataset_meta.{key}": value for key, value in dict(entries.pop("dataset_meta", None) or {}).items()}
    meta: dict[str, Any] = {}
    changes = [
        Change("dropped", str(key), note="not part of the model")
        for key, value in checkpoint.items()
        if key not in ("meta", *WRAPPERS, *EMA_WRAPPERS) and not isinstance(value, Tensor)
    ]
    for key, value in entries.items():
        name = str(key).removeprefix("dataset_meta.").lower()
        if not layout.class_key or name not in ("classes", "palette") or not isinstance(value, (list, tuple)):
            changes.append(Change("dropped", f"meta.{key}", note="not needed to use the model"))
            continue
        target = layout.class_key.format(lower=name, upper=name.upper())
        parent, _, last = target.rpartition(".")
        (meta.setdefault(parent, {}) if parent else meta)[last] = value
        changes.append(Change("kept" if target == key else "renamed", f"meta.{key}", f"meta.{target}"))
    return meta, changes
