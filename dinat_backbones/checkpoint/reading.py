"""Checkpoints are read without running code that they carry."""

import io
import json
import math
import os
import pickle
import types
import zipfile
from collections import Counter, OrderedDict, deque
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
        source: a local `.safetensors` file, any other local file as `torch.save` wrote it, a plain pickle of tensors or
            numpy arrays as detectron2 writes them (`.pkl`), or an http(s) address, which is downloaded once (see
            `fetch`).
        allow_pickle: run whatever code a pickle asks for. Only for files whose origin you trust.

    Returns:
        Name -> tensor, or the framework's dictionary around it (see `backbone_state`). Of a plain pickle, arrays have
        become tensors. Bookkeeping of training runs
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
        checkpoint = _read_plain_pickle(path, allow_pickle)
        if checkpoint is None and allow_pickle:
            checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        elif checkpoint is None:
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
    "collections.Counter": Counter,  # of mmengine's MultiStepLR
    "collections.deque": deque,
    "collections.defaultdict": lambda factory=None: {},
    "builtins.set": set,
    "builtins.frozenset": frozenset,
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


# ------------------------------------------------- plain pickles: arrays are rebuilt here, not by numpy


class _Dtype:
    """What a pickle says of an array's elements: numpy's name of the type, such as "f4", and the order of bytes."""

    def __init__(self, name: str, *args: Any) -> None:
        self.name, self.order = str(name), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


_DTYPES = {
    "b1": torch.bool,
    **{f"i{bits // 8}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "u1": torch.uint8,
    **{f"f{bits // 8}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
}


def _tensor(data: Any, dtype: _Dtype, shape: tuple[int, ...] = (), order: Any = "C") -> Any:
    """The array of these bytes; `Inert` if its elements are no numbers that torch has."""
    if dtype.name not in _DTYPES or dtype.order == ">":
        return Inert()
    content = bytearray(data.encode("latin1") if isinstance(data, str) else data)  # a str in files of Python 2
    flat = (
        torch.frombuffer(content, dtype=_DTYPES[dtype.name]) if content else torch.empty(0, dtype=_DTYPES[dtype.name])
    )
    if math.prod(shape) != len(flat):
        raise ValueError(f"an array of shape {list(shape)} has {len(flat)} elements")
    if order in ("F", True):
        return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.reshape(shape)


class _Array:
    """An array whose content comes in the next step of the pickle; then it is `value`."""

    value: Any = None

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = Inert() if isinstance(data, list) else _tensor(data, dtype, shape, fortran)


class _ArrayUnpickler(_Unpickler):
    """Knows, besides, numpy's arrays and how tensors are pickled without torch.save."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "multiarray._reconstruct": _Array,
            "multiarray.scalar": lambda dtype, data: _tensor(data, dtype),
            "numeric._frombuffer": _tensor,
            "torch.storage._load_from_bytes": lambda content: torch.load(io.BytesIO(content), weights_only=True),
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),
            "__builtin__.bytes": lambda: b"",  # of protocol 2
        }
        short = f"{module.removeprefix('numpy.core.').removeprefix('numpy._core.')}.{name}"
        return known[short] if short in known else super().find_class(module, name)


def _read_plain_pickle(path: Path, allow_pickle: bool) -> Any:
    """The dictionary of a file that `pickle.dump` wrote; None if it is one of torch.save."""
    if zipfile.is_zipfile(path):
        return None
    with open(path, "rb") as file:
        unpickler = pickle.Unpickler if allow_pickle else _ArrayUnpickler
        content = unpickler(file, encoding="latin1").load()
    # before torch 1.6, torch.save began with a pickled number
    return _with_tensors(content) if isinstance(content, Mapping) else None


def _with_tensors(content: Any) -> Any:
    """Arrays in nested dictionaries as tensors, in place."""
    if isinstance(content, dict):
        for key, value in content.items():
            content[key] = _with_tensors(value)
    elif isinstance(content, _Array):
        return content.value
    elif type(content).__module__ == "numpy":  # of an allowed pickle
        return torch.as_tensor(content)
    return content
