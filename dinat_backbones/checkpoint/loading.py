"""Load what `read` returned, into a backbone or a whole model, without losing anything silently."""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .. import zoo
from . import huggingface
from .fitting import fitted
from .objects import Inert
from .reading import read

# Where frameworks put the weights inside their checkpoints, and where their moving averages (EMA).
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema_state")  # timm; DeiT and its kin; d2go
_COMPILED = "_orig_mod."  # torch.compile puts it before the names of what it compiled
_AVERAGE_COUNTS = ("steps", "n_averaged")  # beside the weights in an averaged model of mmengine or torch
_CLASSIFIER = ("norm.", "head.")  # of the published ImageNet files; a backbone has norm0 ... norm3 instead
_BLOCK = re.compile(r"((?:levels|layers)\.\d+)\.blocks\.(\d+)\.")
_OUTPUT_NORM = re.compile(r"norm\d+\.")


def ema_wrapper(checkpoint: Mapping[str, Any]) -> str:
    """Under which name a checkpoint has the moving average (EMA) of the weights; "" if it has none."""
    found = next((name for name in EMA_WRAPPERS if isinstance(checkpoint.get(name), Mapping)), "")
    # mmengine's EMAHook exchanges the two when it saves: `ema_state_dict` has the weights that are trained
    swapped = isinstance(checkpoint.get("ema_state_dict"), Mapping) and "state_dict" in checkpoint
    return found or ("state_dict" if swapped else "")


def unwrap(checkpoint: Mapping[str, Any], *, ema: bool = False) -> Mapping[str, Any]:
    """The state dict inside a checkpoint: what its `WRAPPERS` hold, however often they are nested.

    Args:
        checkpoint: what `read` returned.
        ema: the moving average of the weights where there is one (see `ema_wrapper`).
    """
    names = (*EMA_WRAPPERS, *WRAPPERS) if ema else (*WRAPPERS, *EMA_WRAPPERS)
    while wrapper := next((name for name in names if isinstance(checkpoint.get(name), Mapping)), None):
        checkpoint = checkpoint[wrapper]
    return checkpoint


def tensors(checkpoint: Mapping[str, Any], *, ema: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint's state dict, without what data-parallel training, averaging and torch.compile add.

    Args:
        checkpoint, ema: see `unwrap`.

    Raises:
        ValueError: an array in the state dict has elements that torch does not know, such as numpy's longdouble.
    """
    state = {}
    for key, value in unwrap(checkpoint, ema=ema).items():
        if isinstance(value, Tensor):
            state[str(key).replace(_COMPILED, "")] = value
        elif isinstance(value, Inert) and value.is_numeric:
            raise ValueError(f"{key} is an array of numpy's {value.arguments[1]}; torch has no such type")
    counts = [key for key in _AVERAGE_COUNTS if key in state]
    parallel = len(state) > len(counts) and all(key.startswith("module.") or key in counts for key in state)
    return {key.removeprefix("module."): state[key] for key in state if key not in counts} if parallel else state


def backbone_state(checkpoint: Mapping[str, Any], prefix: str | None = None) -> dict[str, Tensor]:
    """The backbone's tensors under its own names, from a classification, detection or segmentation checkpoint.

    Where the file has a moving average (EMA) of the weights, it is taken.

    Args:
        checkpoint: what `read` returned: a state dict, bare or wrapped (`WRAPPERS`, `EMA_WRAPPERS`), with anything
            before the backbone's names (`module.`, `backbone.`, `backbone.bottom_up.`), or a file of transformers.
        prefix: what stands before the backbone's names, if the file has more than one backbone. The classifier
            (`norm.*`, `head.*`) is dropped.

    Raises:
        ValueError: the file has several backbones and no `prefix` chooses one; and what `tensors` raises.
    """
    state = bare_state(checkpoint, prefix)
    return {key: value for key, value in state.items() if not key.startswith(_CLASSIFIER)}


def bare_state(checkpoint: Mapping[str, Any], prefix: str | None = None) -> dict[str, Tensor]:
    """The tensors of a state dict behind `prefix` (None: what stands before `patch_embed.`), without it."""
    state = tensors(checkpoint, ema=True)
    if prefix is None and huggingface.find_prefix(state) is not None:
        state = huggingface.from_huggingface(huggingface.split_prefix(state)[0])
    if prefix is None:
        starts = sorted({match[1] for match in map(re.compile(r"(|.*?\.)patch_embed\.").match, state) if match})
        if len(starts) > 1:
            raise ValueError(
                f"the file has {len(starts)} backbones, under {', '.join(repr(start) for start in starts)}: choose one "
                f"of them, as in prefix={starts[0]!r}"
            )
        start = "".join(starts)
    else:
        start = prefix and prefix.rstrip(".") + "."
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


@dataclass(frozen=True)
class Report:
    """What `load_backbone` did, by state-dict names; `mismatched` maps a name to its shapes in file and model."""

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    resized: tuple[str, ...] = ()  # bias tables among the loaded ones
    adapted: tuple[str, ...] = ()  # likewise, the first convolution where the images have other channels than RGB
    left_out: tuple[str, ...] = ()  # in the file, for parts that the model leaves out because nothing reads them
    ema: str = ""  # where in the file the moving average of the weights was, which was loaded

    @property
    def complete(self) -> bool:
        """Nothing was left out but output norms, which ImageNet files do not have."""
        return not self.unexpected and not self.mismatched and all(map(_OUTPUT_NORM.match, self.missing))

    def __str__(self) -> str:
        words = f"loaded {len(self.loaded)} tensors from {self.source}"
        if self.ema:
            words += f"; they are the moving average (EMA) that the file has under {self.ema}"
        if self.resized:
            words += f"; {len(self.resized)} rpb tables resized to the model's kernel size"
        if self.adapted:
            words += f"; {_some(self.adapted)} adapted from RGB to the model's image channels"
        if self.left_out:
            words += f"; {len(self.left_out)} of stages and norms that out_indices leaves out, as expected"
        if self.missing:
            words += f"; {len(self.missing)} not in the file, left as they were: {_some(self.missing, 8)}"
        if self.unexpected:
            words += f"; {len(self.unexpected)} in the file, not used: {_some(self.unexpected, 8)}"
        return words


def load_backbone(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    allow_pickle: bool = False,
    logger: logging.Logger | None = None,
) -> Report:
    """Load a checkpoint into a NAT, DiNAT or DiNAT_s, and log what did not find its place (a warning if there is any).

    Bias tables of another kernel size are resized (see `resize_rpb`), the first convolution of an RGB model is adapted
    to images of other channels (see `fitting.adapt_image_channels`), and a moving average (EMA) of the weights is
    preferred, which the report says. Stages and norms that the model's `out_indices` leaves out are no difference. A
    backbone that returns its last stage alone computes what an ImageNet classifier
    does: its output norm is then that of the classifier.

    Args:
        model: a backbone; untouched if an error is raised.
        source, allow_pickle: see `read`.
        prefix: see `backbone_state`.
        logger: where the report goes; this module's logger by default.

    Raises:
        ValueError: nothing fits, or the file belongs to another architecture (other shapes, other depths, layer scale
            on one side only); and whatever `read` raises.
    """
    checkpoint = read(source, allow_pickle=allow_pickle)
    own, state = model.state_dict(), backbone_state(checkpoint, prefix)
    last = f"norm{len(_depths(state)) - 1}."
    if {match[0] for match in map(_OUTPUT_NORM.match, own) if match} == {last}:
        whole = bare_state(checkpoint, prefix).items()
        state = {key.replace("norm.", last): value for key, value in whole if key.startswith("norm.")} | state
    family = type(model).__name__
    if not any(_BLOCK.match(key) for key in own.keys() & state.keys()):
        raise ValueError(
            f"nothing in {source} fits {family}: the file has {_some(state) or 'no tensors there'}; the model has "
            f"{_some(own)}{_hint(state)}"
        )
    resized, adapted = fitted(own, state)
    state |= resized | adapted
    report = _compare(state, model, str(source), ema_wrapper(checkpoint))
    report = replace(report, resized=tuple(resized), adapted=tuple(adapted))
    if differences := _differences(state, own) + _shape_differences(report):
        raise ValueError(f"{source} does not fit this {family}: {'; '.join(differences)}{_hint(state)}")
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    logger = logger or logging.getLogger(__name__)
    logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def load_classifier(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    logger: logging.Logger | None = None,
) -> Report:
    """Load a checkpoint into an image classifier: all of it, but for a head of other classes, or an error.

    Bias tables of another kernel size are resized (see `resize_rpb`), and the first convolution of an RGB model is
    adapted to images of other channels. Where the file's `head` has another number of
    classes, the model keeps its own, which the report says (a warning in the log).

    Args:
        model: a classifier with `head`, or with ``num_classes=0`` and none; untouched if an error is raised.
        source, allow_pickle: see `read`. Prefixes and wrappers of training programs are taken off.
        logger: where the report goes; this module's logger by default.

    Raises:
        ValueError: a tensor of the model is not in the file, or the other way round, or shapes differ; and whatever
            `read` raises.
    """
    checkpoint = read(source, allow_pickle=allow_pickle)
    own, state = model.state_dict(), bare_state(checkpoint)
    resized, adapted = fitted(own, state)
    state |= resized | adapted
    report = _compare(state, model, str(source), ema_wrapper(checkpoint))
    report = replace(report, resized=tuple(resized), adapted=tuple(adapted))
    classes = [len(tensors["head.weight"]) if "head.weight" in tensors else 0 for tensors in (state, own)]
    heads = []
    if classes[0] != classes[1] and classes[0]:
        heads = [key for key in ("head.weight", "head.bias") if key in state]
        kept = {key: shapes for key, shapes in report.mismatched.items() if key not in heads}
        report = replace(
            report, mismatched=kept, unexpected=tuple(key for key in report.unexpected if key not in heads)
        )
    if differences := _all_differences(report):
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {'; '.join(differences)}{_hint(state)}")
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    logger = logger or logging.getLogger(__name__)
    if heads:
        new = f"the model's for {classes[1]} keeps its random weights" if classes[1] else "the model has none"
        logger.warning("%s; the file's head is for %d classes, %s", report, classes[0], new)
    else:
        logger.info("%s", report)
    return report


def load_model(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    logger: logging.Logger | None = None,
) -> Report:
    """Load a checkpoint into a whole detector, segmentor or classifier: all of it or an error.

    Where the file has a moving average (EMA) of the weights, it is taken, which the report and the log say.

    Args:
        model: untouched if an error is raised.
        source, allow_pickle: see `read`.
        logger: where the report goes; this module's logger by default.

    Raises:
        ValueError: a tensor of the model is not in the file, or the other way round, or shapes differ; and whatever
            `read` raises.
    """
    checkpoint = read(source, allow_pickle=allow_pickle)
    state = tensors(checkpoint, ema=True)
    report = _compare(state, model, str(source), ema_wrapper(checkpoint))
    if differences := _all_differences(report):
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {'; '.join(differences)}")
    model.load_state_dict(_with_version({key: state[key] for key in report.loaded}, model))
    (logger or logging.getLogger(__name__)).info("%s", report)
    return report


def _all_differences(report: Report) -> list[str]:
    differences = _shape_differences(report)
    if report.missing:
        differences.append(f"{len(report.missing)} tensors are not in the file: {_some(report.missing)}")
    if report.unexpected:
        differences.append(f"{len(report.unexpected)} tensors are not in the model: {_some(report.unexpected)}")
    return differences


def _with_version(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """A state dict of the model's names with the versions of its modules, so that none takes it for an older one."""
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return versioned


def _compare(
    state: Mapping[str, Tensor],
    model: nn.Module,
    source: str,
    ema: str = "",
) -> Report:
    own = model.state_dict()
    left_out = _left_out(model, [key for key in state if key not in own])
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    return Report(
        source=source,
        loaded=tuple(key for key, (theirs, ours) in shapes.items() if theirs == ours),
        missing=tuple(key for key in own if key not in state),
        unexpected=tuple(key for key in state if key not in own and key not in left_out),
        mismatched={key: (theirs, ours) for key, (theirs, ours) in shapes.items() if theirs != ours},
        left_out=left_out,
        ema=ema,
    )


def _left_out(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those names that belong to parts which a backbone in the model leaves out, see `BackboneBase.is_left_out`."""
    backbones = [(f"{path}." if path else "", module) for path, module in model.named_modules()]
    tests = [(start, module.is_left_out) for start, module in backbones if hasattr(module, "is_left_out")]
    return tuple(
        name for name in names if any(name.startswith(start) and test(name[len(start) :]) for start, test in tests)
    )


def _shape_differences(report: Report) -> list[str]:
    words = [
        f"{key} is {list(theirs)} in the file and {list(ours)} in the model"
        for key, (theirs, ours) in list(report.mismatched.items())[:3]
    ]
    more = len(report.mismatched) - len(words)
    return words + ([f"and {more} more shapes differ"] if more else [])


def _some(names: Iterable[str], count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names) - count} more)" if len(names) > count else "")


def _depths(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of blocks by stage, "levels.0" and so on."""
    blocks = {(match[1], match[2]) for match in map(_BLOCK.match, state) if match}
    return {stage: [of for of, _ in blocks].count(stage) for stage in sorted({of for of, _ in blocks})}


def _layer_scale(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(".gamma1") for key in state)


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Differences of architecture that no shape shows, in words; a stage that one side lacks altogether is none."""
    theirs, ours = _depths(state), _depths(own)
    words = [
        f"{stage} has {theirs[stage]} blocks in the file and {depth} in the model"
        for stage, depth in ours.items()
        if theirs.get(stage, depth) != depth
    ]
    if _layer_scale(state) != _layer_scale(own):
        with_it, without = ("file", "model") if _layer_scale(state) else ("model", "file")
        words.append(f"the {with_it} has layer scale (gamma1, gamma2) and the {without} does not")
    return words


def _hint(state: Mapping[str, Tensor]) -> str:
    """Which architectures of the table have these depths, width, MLP and layer scale, as the end of a message."""
    depths = _depths(state)
    first = next(iter(depths), "")
    norm, hidden = (state.get(f"{first}.blocks.0.{name}") for name in ("norm1.weight", "mlp.fc1.weight"))
    if norm is None or hidden is None:
        return ""
    found = (first == "layers.0", len(norm), len(hidden) / len(norm), tuple(depths.values()), _layer_scale(state))
    names = [
        name
        for name, a in zoo.ARCHS.items()
        if (a.family == "DiNAT_s", a.embed_dim, a.mlp_ratio, a.depths, a.layer_scale is not None) == found
    ]
    return f". The file looks like {' or '.join(names)}" if names else ""
