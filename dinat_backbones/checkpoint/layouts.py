"""Conversion between the layouts in which NAT and DiNAT were published and those of today's programs.

Every conversion goes through one form: tensors under the names of a present OpenMMLab model (`backbone.*`, `neck.*`,
`decode_head.*`, ...; `norm.*` and `head.*` of an ImageNet classifier), and the names and colours of the classes. To add
a program, let `_common` recognise its files and put what it reads into `LAYOUTS`.

Between mmdet 2.19 / mmseg 0.20, which the published models were trained with, and mmdet 3 / mmseg 1 no tensor of Mask
R-CNN, Cascade Mask R-CNN and UPerNet with its auxiliary head has changed its name or shape. What has moved are the
class names, from `meta.CLASSES` and `meta.PALETTE` to `meta.dataset_meta`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from . import huggingface
from .loading import WRAPPERS, resize_all_rpb, tensors

_CLASSIFIER = ("norm.", "head.")
# the modules of mmdet's and mmseg's models
_OPENMMLAB = re.compile(
    r"(backbone|neck|rpn_head|roi_head|bbox_head|mask_head|panoptic_\w+|semantic_head|decode_head|auxiliary_head)\."
)


@dataclass(frozen=True)
class Layout:
    """How a program's checkpoints look.

    Attributes:
        description: in words.
        bare: a state dict without anything around it, the trunk's names without `backbone.`; False for OpenMMLab's
            dictionary of "meta" and "state_dict".
        class_key: where in "meta" the classes are, with {} for "classes" or "palette"; a dot leads into a dictionary.
        model: what transformers puts before the names of a classifier's trunk; "" for other programs.
    """

    description: str
    bare: bool = False
    class_key: str = ""
    model: str = ""


LAYOUTS = {
    "imagenet": Layout("trunk or classifier alone, as the published ImageNet files", bare=True),
    "mmdet2": Layout("mmdet 2", class_key="{upper}"),
    "mmseg0": Layout("mmseg 0", class_key="{upper}"),
    "mmdet3": Layout("mmdet 3", class_key="dataset_meta.{lower}"),
    "mmseg1": Layout("mmseg 1", class_key="dataset_meta.{lower}"),
    "huggingface": Layout("transformers: DinatForImageClassification or DinatBackbone", bare=True, model="dinat."),
    "huggingface-nat": Layout("transformers: NatForImageClassification or NatBackbone", bare=True, model="nat."),
}


@dataclass(frozen=True)
class Change:
    """What became of one entry of a checkpoint: `kind` is kept, renamed, resized (perhaps renamed, too) or dropped."""

    kind: str
    source: str
    target: str = ""
    note: str = ""

    def __str__(self) -> str:
        arrow = f" -> {self.target}" if self.target not in ("", self.source) else ""
        return f"{self.kind:8} {self.source}{arrow}{f'  ({self.note})' if self.note else ''}"


def convert(
    checkpoint: Mapping[str, Any], to: str, *, kernel_size: int | None = None
) -> tuple[dict[str, Any], list[Change]]:
    """Give a checkpoint another layout.

    Args:
        checkpoint: what `read` returned.
        to: one of `LAYOUTS`.
        kernel_size: resize the bias tables to this kernel size (see `resize_rpb`).

    Returns:
        The new checkpoint, of tensors and plain Python values alone, and what became of every entry of the old one.

    Raises:
        ValueError: an unknown layout on either side.
    """
    if to not in LAYOUTS:
        raise ValueError(f"layout {to!r}: expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[to]
    common = _common(checkpoint, to)
    resized = resize_all_rpb(dict(common.values()), kernel_size) if kernel_size else {}
    state: dict[str, Tensor] = {}
    changes = []
    for source, (name, tensor) in common.items():
        classifier = name.startswith(_CLASSIFIER)
        if not name or (classifier if not layout.bare else not (classifier or name.startswith("backbone."))):
            changes.append(Change("dropped", source, note=f"no place in the layout of {layout.description}"))
            continue
        target = name.removeprefix("backbone.") if layout.bare else name
        state[target] = resized.get(name, tensor)
        shape = str(list(tensor.shape))
        if name in resized:
            changes.append(Change("resized", source, target, f"{shape} -> {list(resized[name].shape)}"))
        else:
            changes.append(Change("kept" if source == target else "renamed", source, target, shape))
    if layout.model:
        state, changes = _for_transformers(state, changes, layout.model)
    meta, more = _meta(checkpoint, layout)
    return (state if layout.bare else {"meta": meta, "state_dict": state}), changes + more


def _common(checkpoint: Mapping[str, Any], to: str) -> dict[str, tuple[str, Tensor]]:
    """Name in the file -> name in the common form, and the tensor."""
    state = tensors(checkpoint)
    if huggingface.find_prefix(state) is not None:
        return _from_transformers(state)
    if any(key.startswith("patch_embed.") for key in state):
        return {key: (key if key.startswith(_CLASSIFIER) else f"backbone.{key}", value) for key, value in state.items()}
    others = [key for key in state if not _OPENMMLAB.match(key)]
    if any(key.startswith("backbone.patch_embed.") for key in state) and (LAYOUTS[to].bare or not others):
        return {key: (key, value) for key, value in state.items()}
    raise ValueError(
        f"cannot convert to {to}: expected a NAT or DiNAT checkpoint of ImageNet, mmdet or mmseg with patch_embed.* or "
        "backbone.patch_embed.*, or one of transformers, and the file has "
        f"{', '.join((others or list(state))[:4]) or 'no tensors'}"
    )


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """`_common` of a file of transformers: several tensors that become one have one name, `{query,key,value}`, and
    the rows of one that becomes several have several."""
    prefix = huggingface.find_prefix(state) or ""
    trunk, others = huggingface.split_prefix(state)
    common: dict[str, tuple[str, Tensor]] = {}
    for names, targets in huggingface.steps_from_huggingface(trunk):
        source = huggingface.label(tuple(name if name in state else prefix + name for name in names))
        for row, (name, tensor) in enumerate(targets.items()):
            name = name if name.startswith(_CLASSIFIER) else f"backbone.{name}"
            common[source if len(targets) == 1 else f"{source}[{row}]"] = name, tensor
    return common | {name: ("", tensor) for name, tensor in others.items()}


def _for_transformers(
    state: Mapping[str, Tensor], changes: list[Change], model: str
) -> tuple[dict[str, Tensor], list[Change]]:
    """A bare state dict under the names of transformers, and what became of every entry since it was read."""
    classifier = any(name.startswith("head.") for name in state)
    new: dict[str, Tensor] = {}
    labels: dict[str, str] = {}
    for names, targets in huggingface.steps_to_huggingface(state):
        named = {(model if classifier and not k.startswith("classifier.") else "") + k: t for k, t in targets.items()}
        new |= named
        labels |= dict.fromkeys(names, huggingface.label(tuple(named)))
    renamed = []
    for change in changes:
        if change.target:
            target = labels[change.target]
            kind = change.kind if change.kind == "resized" else "kept" if change.source == target else "renamed"
            change = replace(change, kind=kind, target=target)
        renamed.append(change)
    return new, renamed


def _meta(checkpoint: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[Change]]:
    """The new "meta", and what became of everything in the file that is no tensor of the model."""
    old = checkpoint.get("meta")
    entries = dict(old) if isinstance(old, Mapping) else {}
    entries |= {f"dataset_meta.{key}": value for key, value in dict(entries.pop("dataset_meta", None) or {}).items()}
    meta: dict[str, Any] = {}
    changes = [
        Change("dropped", str(key), note="state of the training run")
        for key, value in checkpoint.items()
        if key not in ("meta", *WRAPPERS) and not isinstance(value, Tensor)
    ]
    for key, value in entries.items():
        name = str(key).removeprefix("dataset_meta.").lower()
        if layout.bare or name not in ("classes", "palette") or not isinstance(value, (list, tuple)):
            changes.append(Change("dropped", f"meta.{key}", note="not needed to use the model"))
            continue
        target = layout.class_key.format(lower=name, upper=name.upper())
        parent, _, last = target.rpartition(".")
        (meta.setdefault(parent, {}) if parent else meta)[last] = value
        changes.append(Change("kept" if target == key else "renamed", f"meta.{key}", f"meta.{target}"))
    return meta, changes
