"""Files that mmengine loads (`load_from`, `--resume`, `init_cfg` of any module) pass the reader of `checkpoint`, which
runs nothing that they bring."""

import os
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from ...checkpoint import Inert, read


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


def register() -> None:
    """For local files and addresses; mmengine's other schemes (open-mmlab://, s3://, ...) stay its own."""
    CheckpointLoader.register_scheme(prefixes=("", "http://", "https://"), loader=load, force=True)
