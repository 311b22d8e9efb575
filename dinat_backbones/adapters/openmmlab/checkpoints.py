"""Files that mmengine loads (`load_from`, `--resume`, `init_cfg` of any module) pass the reader of `checkpoint`, which
runs nothing that they bring. Files that it saves are whole or absent."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import LocalBackend, io, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, runner

from ...backbone import BackboneBase
from ...checkpoint import Inert, huggingface, read
from ...checkpoint.loading import tensors
from ...files import atomic_write


def load(filename: str, map_location: Any = None) -> dict[str, Any]:
    """`checkpoint.read` with what mmengine's message hub wants to resume from.

    Args:
        filename: path or http(s) address.
        map_location: not needed: tensors are on the CPU, and `load_state_dict` of models and optimizers moves them.

    Raises:
        FileNotFoundError, ValueError: see `checkpoint.read`.
    """
    checkpoint = read(os.path.expanduser(filename))
    hub = checkpoint.get("message_hub")
    if isinstance(hub, dict):
        hub["log_scalars"] = {name: _history(value) for name, value in hub.get("log_scalars", {}).items()}
        hub["runtime_info"] = {name: _number(value) for name, value in hub.get("runtime_info", {}).items()}
    return checkpoint


def _history(value: Any) -> Any:
    """mmengine's HistoryBuffer from what a file says of it."""
    if not isinstance(value, Inert):
        return value
    state = value.state
    return HistoryBuffer(state["_log_history"].tolist(), state["_count_history"].tolist(), state["max_length"])


def _number(value: Any) -> Any:
    """numpy's scalars are read as tensors without dimensions."""
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


class AtomicLocalBackend(LocalBackend):
    """Local files, of which a process that is killed while it writes leaves no halves under their names."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with atomic_write(Path(filepath)) as partial:
            super().put(obj, partial)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        with atomic_write(Path(filepath)) as partial:
            super().put_text(obj, partial, encoding)


def register() -> None:
    """For local files and addresses; mmengine's other schemes (open-mmlab://, s3://, ...) stay its own."""
    CheckpointLoader.register_scheme(prefixes=("", "http://", "https://"), loader=load, force=True)
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")
    io.backend_instances.clear()  # those that are there already


def refuse_backbones_alone() -> None:
    """Makes mmengine's Runner stop at a `load_from` that holds a backbone alone, such as a classification file: it
    would find no tensor of a detector in it, warn of hundreds of names, and train from random weights."""
    plain = runner._load_checkpoint_to_model
    if not hasattr(plain, "__wrapped__"):
        runner._load_checkpoint_to_model = _checked(plain)


def _checked(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def load_checkpoint_to_model(model: torch.nn.Module, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        found = next(((path, m) for path, m in model.named_modules() if isinstance(m, BackboneBase)), None)
        if found and found[0]:
            path, backbone = found
            state = tensors(checkpoint)
            alone = backbone.state_dict().keys() & state.keys() or huggingface.find_prefix(state) is not None
            if alone and not model.state_dict().keys() & state.keys():
                raise ValueError(
                    f"load_from: the file has a backbone alone and no tensor of this {type(model).__name__}, which "
                    f"would keep random weights; give the file to the backbone instead: model.{path}.init_cfg="
                    'dict(type="Pretrained", checkpoint=FILE), and load_from=None'
                )
        return plain(model, checkpoint, *args, **kwargs)

    return load_checkpoint_to_model
