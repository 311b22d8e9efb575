"""Checkpoints are read without running code that they carry."""

import json
import os
import pickle
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from .download import fetch

META = "openmmlab_meta"  # where the header of a safetensors file holds, as JSON, what a .pth file has under "meta"


def read(source: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """The content of a checkpoint as it was saved (with its wrappers), tensors on the CPU.

    Args:
        source: a local `.safetensors` file, any other local file as `torch.save` wrote it, or an http(s) address, which
            is downloaded once (see `fetch`).
        allow_pickle: run whatever code a pickle asks for. Only for files whose origin you trust.

    Returns:
        Name -> tensor, or the framework's dictionary around it (see `backbone_state`). Bookkeeping of training runs
        that needs code (mmengine's message hub, numpy scalars, argparse namespaces) becomes empty `Inert` objects.

    Raises:
        FileNotFoundError: no such file, or a download failed; says where the file can be put by hand.
        ValueError: the file is empty, truncated or no checkpoint, its pickle needs code (the message names it), or a
            download is not what it should be.
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
    path = fetch(str(source)) if urlparse(str(source)).scheme in ("http", "https") else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is {'a folder, not a file' if path.is_dir() else 'not there'}")
    return path


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ValueError(
        f"{path} ({path.stat().st_size} bytes) cannot be read: it is empty, truncated or no checkpoint at all; delete "
        f"it and get it again ({reason})"
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the safetensors package: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error
    if META not in metadata:
        return state
    return {"meta": json.loads(metadata[META]), "state_dict": state}


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
