"""The one door for checkpoints: every format is read without running code that a file carries."""

import errno
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy
import torch

from .download import fetch
from .torch_files import WrongFormat, read_pickle
from .unpickling import RefusedName

META = "openmmlab_meta"  # where the header of a safetensors file holds, as JSON, what a .pth file has under "meta"


def read(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Any]:
    """The content of a checkpoint as it was saved (with its wrappers), tensors on the CPU.

    Args:
        source: a local `.safetensors` file, any other local file as `torch.save` wrote it, a plain pickle of tensors or
            numpy arrays as detectron2 writes them (`.pkl`), or an http(s) address, which is downloaded once (see
            `fetch`).
        allow_pickle: a pickle that cannot be read otherwise may run whatever code it asks for. Only for files whose
            origin you trust.

    Returns:
        Name -> tensor, or the framework's dictionary around it (see `backbone_state`). numpy's arrays and
        scalars have become tensors. Objects of training libraries (mmengine's message hub, argparse namespaces) are
        `Inert`: their names, arguments and attributes, without the objects.

    Raises:
        FileNotFoundError: no such file, or a download failed; says where the file can be put by hand.
        ValueError: the file is empty, truncated or no checkpoint, its pickle needs code (the message names it), or a
            download has another hash than its address says.
        MemoryError: the tensors do not fit into memory.
        ModuleNotFoundError: a `.safetensors` file without the safetensors package.
    """
    path = _local(source)
    try:
        checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, allow_pickle)
    except RefusedName as error:
        raise ValueError(
            f"{path} needs code to be read: it asks for {_one_line(error)}. That could run anything, so the "
            "file was refused. If you trust its origin, `dinat convert FILE TARGET.pth --to LAYOUT --allow-pickle` (in "
            "Python dinat_backbones.checkpoint.read(path, allow_pickle=True)) runs it once and writes the tensors alone"
        ) from None
    except WrongFormat as error:
        raise ValueError(
            f"{path} is {_one_line(error)}; expected a file of torch.save or safetensors with a state dict"
        ) from None
    except MemoryError as error:
        raise MemoryError(f"{path} ({path.stat().st_size} bytes) does not fit into memory") from error
    except Exception as error:  # corrupt pickles and archives raise nearly anything
        # an import or the disk failed, and the message says so; EINVAL is a damaged archive that leads before its start
        if isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        reason = _one_line(error) or type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: it is empty, truncated or no checkpoint at all; "
            f"delete it and get it again ({reason})"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; expected a dictionary of tensors (a state dict)")
    return dict(checkpoint)


def _one_line(error: Exception) -> str:
    """The first line of its message, without what a file could do to a terminal."""
    lines = str(error).strip().splitlines()
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in "".join(lines[:1])[:200])


def _local(source: str | os.PathLike[str]) -> Path:
    path = fetch(str(source)) if urlparse(str(source)).scheme in ("http", "https") else Path(source)
    if path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} is {_describe_folder(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not there")
    return path


def _describe_folder(path: Path) -> str:
    if (path / ".metadata").exists():
        return (
            "a folder of torch.distributed.checkpoint; if you trust its origin, make a file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} TARGET.pth"
        )
    if (path / "rank0.pth").exists():
        return (
            "a folder of FSDP shards, from which only mmengine can resume; train with strategy=dict("
            "state_dict_cfg='full'), as configs/_base_/fsdp.py does, to get files"
        )
    return "a folder, not a file"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the safetensors package: pip install safetensors") from error
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    state = load_file(path)
    return {"meta": json.loads(metadata[META]), "state_dict": state} if META in metadata else state


def _read_pickle(path: Path, allow_pickle: bool) -> Any:
    with open(path, "rb") as file:
        try:
            return read_pickle(file)
        except RefusedName:
            if not allow_pickle:
                raise
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=False)
        except (RuntimeError, pickle.UnpicklingError):  # a plain pickle has no magic number
            file.seek(0)
            content = pickle.load(file, encoding="latin1")
    return _with_tensors(content)


def _with_tensors(content: Any) -> Any:
    """numpy's arrays in nested dictionaries of an allowed pickle as tensors, in place."""
    if isinstance(content, dict):
        for key, value in content.items():
            content[key] = _with_tensors(value)
    number = isinstance(content, (numpy.ndarray, numpy.generic)) and content.dtype.kind in "biufc"
    return torch.as_tensor(content) if number else content
