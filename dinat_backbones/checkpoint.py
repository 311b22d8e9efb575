"""Read checkpoints without running code that they carry, and load them into a trunk without losing anything silently.

    checkpoint = read("dinat_mini_in1k_224.pth")    # path or http(s) address, .pth / .pt / .safetensors
    state = backbone_state(checkpoint)              # the trunk's own keys, whoever wrote the file
    report = load_backbone(model, "dinat_mini_in1k_224.pth")

No framework is needed to read what a framework wrote.
"""

import logging
import os
import pickle
import re
import types
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from . import zoo

# Where frameworks put the weights inside their checkpoints, in order of preference.
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "state_dict_ema", "model_ema")
# What training wrappers, detectors and feature pyramids put before the trunk's own keys, outermost first.
PREFIXES = ("module.", "model.", "backbone.", "bottom_up.")
_CLASSIFIER = ("norm.", "head.")  # of the published ImageNet files; a trunk has norm0 ... norm3 instead
_BLOCK = re.compile(r"((?:levels|layers)\.\d+)\.blocks\.(\d+)\.")
_OUTPUT_NORM = re.compile(r"norm\d+\.")


# ------------------------------------------------------------------------------------------------------------ reading


def read(source: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """The content of a checkpoint as it was saved (with its wrappers), tensors on the CPU.

    Args:
        source: a local `.safetensors` file, any other local file as `torch.save` wrote it, or an http(s) address, which
            is downloaded once into torch.hub's cache (``torch.hub.get_dir() + "/checkpoints"``).
        allow_pickle: run whatever code a pickle asks for. Only for files whose origin you trust.

    Returns:
        Name -> tensor, or the framework's dictionary around it (see `backbone_state`). Bookkeeping of training runs
        that needs code (mmengine's message hub, numpy scalars, argparse namespaces) becomes empty `Inert` objects.

    Raises:
        FileNotFoundError: no such file, or a download failed; says where the file can be put by hand.
        ValueError: the file is empty, truncated or no checkpoint, or its pickle needs code (the message names it).
        ModuleNotFoundError: a `.safetensors` file without the safetensors package.
    """
    path = _local(source)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        if allow_pickle:
            checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        else:
            checkpoint = _read_without_code(path)
    except _NeedsCode as error:
        raise ValueError(
            f"{path} is a pickle that needs code to be read: it asks for {error}. That could run anything, so it was "
            "refused; pass allow_pickle=True if you trust its origin"
        ) from None
    except (ImportError, PermissionError):
        raise  # these say it themselves; the first one comes from an allowed pickle
    except Exception as error:  # corrupt pickles and archives raise nearly anything
        raise _damaged(path, error) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; expected a dictionary of tensors (a state dict)")
    return dict(checkpoint)


def _local(source: str | os.PathLike) -> Path:
    path = Path(source)
    if urlparse(str(source)).scheme in ("http", "https"):
        path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(str(source)).path).name)
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(str(source), str(path))  # into a temporary file first
            except OSError as error:  # URLError and HTTPError included
                raise FileNotFoundError(
                    f"cannot download {source} ({error}); fetch it on another machine and put it at {path}"
                ) from error
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is {'a folder, not a file' if path.is_dir() else 'not there'}")
    return path


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ValueError(
        f"{path} ({path.stat().st_size} bytes) cannot be read: it is empty, truncated or no checkpoint at all; delete "
        f"it and get it again ({reason})"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the safetensors package: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


class _NeedsCode(Exception):
    """A pickle asked for something that is not on the lists below; the message is its name."""


class Inert:
    """Stands for an object of a training run's bookkeeping: takes any arguments and any state, and keeps nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_BUILDS_TENSORS = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{
        f"torch._utils.{name}": getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    },
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}
# Never imported, never called: mmengine saves HistoryBuffers with numpy arrays and `getattr(HistoryBuffer, "mean")`.
_BOOKKEEPING = {
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "builtins.slice",
    "_codecs.encode",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}


class _Unpickler(pickle.Unpickler):
    """Resolves the names above and no other, which is how Python's documentation restricts a pickle.

    torch's own list (`torch.serialization.safe_globals`) would need the real classes, `getattr` among them, and is
    missing before torch 2.4.
    """

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in _BOOKKEEPING:
            return Inert
        if full not in _BUILDS_TENSORS:
            raise _NeedsCode(full)
        return _BUILDS_TENSORS[full]


# what torch.load wants of its pickle_module
_RESTRICTED = types.SimpleNamespace(
    __name__="restricted pickle", Unpickler=_Unpickler, load=lambda file, **kwargs: _Unpickler(file, **kwargs).load()
)


def _read_without_code(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # bookkeeping, code or damage: the second reader tells
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED)


# ------------------------------------------------------------------------------------------------------------- keys


def backbone_state(checkpoint: Mapping[str, Any], prefix: str | None = None) -> dict[str, Tensor]:
    """The trunk's tensors under the trunk's own names, from a classification, detection or segmentation checkpoint.

    Args:
        checkpoint: what `read` returned: a state dict, bare or wrapped (`WRAPPERS`), with any of `PREFIXES`.
        prefix: take the keys that start with it, instead of guessing. The classifier (`norm.*`, `head.*`) is dropped.
    """
    state: Mapping[str, Any] = checkpoint
    while wrapper := next((name for name in WRAPPERS if isinstance(state.get(name), Mapping)), None):
        state = state[wrapper]
    prefixes = PREFIXES if prefix is None else (prefix.rstrip(".") + ".",)
    for start in prefixes:
        inside = {key[len(start) :]: value for key, value in state.items() if str(key).startswith(start)}
        state = inside or (state if prefix is None else {})
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and not str(k).startswith(_CLASSIFIER)}


@dataclass(frozen=True)
class Report:
    """What `load_backbone` did, by state-dict names; `mismatched` maps a name to its shapes in file and model."""

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def complete(self) -> bool:
        """Nothing was left out but output norms, which ImageNet files do not have."""
        return not self.unexpected and not self.mismatched and all(map(_OUTPUT_NORM.match, self.missing))

    def __str__(self) -> str:
        words = f"loaded {len(self.loaded)} tensors from {self.source}"
        if self.missing:
            words += f"; {len(self.missing)} not in the file, left as they were: {_some(self.missing, 8)}"
        if self.unexpected:
            words += f"; {len(self.unexpected)} in the file, not used: {_some(self.unexpected, 8)}"
        return words


def load_backbone(
    model: nn.Module,
    source: str | os.PathLike,
    *,
    prefix: str | None = None,
    allow_pickle: bool = False,
    logger: logging.Logger | None = None,
) -> Report:
    """Load a checkpoint into a NAT, DiNAT or DiNAT_s, and log what did not find its place (a warning if there is any).

    Args:
        model: a trunk; untouched if an error is raised.
        source, allow_pickle: see `read`.
        prefix: see `backbone_state`.
        logger: where the report goes; this module's logger by default.

    Raises:
        ValueError: nothing fits, or the file belongs to another architecture (other shapes, other depths, layer scale
            on one side only); and whatever `read` raises.
    """
    own, state = model.state_dict(), backbone_state(read(source, allow_pickle=allow_pickle), prefix)
    family = type(model).__name__
    if not any(_BLOCK.match(key) for key in own.keys() & state.keys()):
        raise ValueError(
            f"nothing in {source} fits {family}: the file has {_some(state) or 'no tensors there'}; the model has "
            f"{_some(own)}{_hint(state)}"
        )
    common = [key for key in own if key in state]
    report = Report(
        source=str(source),
        loaded=tuple(key for key in common if own[key].shape == state[key].shape),
        missing=tuple(key for key in own if key not in state),
        unexpected=tuple(key for key in state if key not in own),
        mismatched={k: (tuple(state[k].shape), tuple(own[k].shape)) for k in common if own[k].shape != state[k].shape},
    )
    differences = _differences(state, own) + [
        f"{key} is {list(theirs)} in the file and {list(ours)} in the model"
        for key, (theirs, ours) in list(report.mismatched.items())[:3]
    ]
    if differences:
        count = f" ({len(report.mismatched)} shapes differ)" if report.mismatched else ""
        raise ValueError(f"{source} does not fit this {family}: {'; '.join(differences)}{count}{_hint(state)}")
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    logger = logger or logging.getLogger(__name__)
    logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def _some(names, count: int = 4) -> str:
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
