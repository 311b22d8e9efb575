#!/usr/bin/env python
"""Train a detector or a segmentor:

    python tools/train.py CONFIG [--work-dir DIR] [--amp] [--auto-scale-lr] [--resume [CHECKPOINT]]
                          [--cfg-options KEY=VALUE ...] [--launcher none|pytorch|slurm|mpi]

This hands over to the training script that mmdet (or mmseg, mmpretrain: the config's `default_scope`) installs, after
checking what its tracebacks explain badly, and makes this checkout importable where the package is not installed.
"""

import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALL = 'pip install "dinat_backbones[openmmlab]"'


def hand_over(script: str, prepare: Callable[[str, Any, list[str]], list[str]]) -> None:
    """Run the framework's own `script` ("train.py", "test.py") with the arguments of this process.

    `prepare` is given the scope, the config (None if there is none) and the arguments, and returns the arguments.
    """
    words = sys.argv[1:]
    config = None
    for word in words:
        if word.startswith("-") or "=" in word or "://" in word or not word.endswith((".py", ".pth", ".pt")):
            continue
        if not Path(word).is_file():
            stop(f"{'config' if word.endswith('.py') else 'checkpoint'} {word} is not there")
        config = config or (word if word.endswith(".py") else None)
    cfg = load_config(config, import_custom_modules=False) if config else None
    scope = cfg.get("default_scope", "mmdet") if cfg else "mmdet"  # whose parser says what is missing, or helps
    spec = find_spec(scope)
    path = Path(spec.origin or "").parent / ".mim" / "tools" / script if spec else None
    if path is None or not path.is_file():
        stop(f"{scope} with its packaged tools is not installed: {INSTALL}")
    sys.argv[1:] = _without_gpu(prepare(scope, cfg, words), cfg)
    runpy.run_path(str(path), run_name="__main__")


def _without_gpu(words: list[str], cfg: Any) -> list[str]:
    """mmengine takes for granted that every process of torchrun, slurm or MPI has a GPU of its own."""
    if cfg is None or not any(word.startswith("--launcher") for word in words):
        return words
    import torch

    if torch.cuda.is_available():
        return words
    torch.cuda.set_device = lambda device: None
    options = ["env_cfg.dist_cfg.backend=gloo"]
    strategy = cfg.get("strategy") or {}
    if strategy.get("type") == "FSDPStrategy":
        options.append("strategy.model_wrapper.device_id=cpu")
    elif not strategy and not cfg.get("model_wrapper_cfg"):
        wrapper = dict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )
        options += [f"model_wrapper_cfg.{key}={value}" for key, value in wrapper.items()]
    return [*words, "--cfg-options", *options]


def load_config(path: str, **keywords: Any) -> Any:
    """mmengine's `Config.fromfile`, with this checkout importable."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if not Path(path).is_file():
        stop(f"config {path} is not there")
    try:
        from mmengine.config import Config
    except ModuleNotFoundError:
        stop(f"mmengine is not installed: {INSTALL}")
    return Config.fromfile(path, **keywords)


def stop(message: str) -> None:
    sys.exit(f"{sys.argv[0]}: {message}")


def _for_training(scope: str, cfg: Any, words: list[str]) -> list[str]:
    """mmseg's script lacks two of mmdet's flags, `--auto-scale-lr` and the value of `--resume`; configs have both."""
    if scope != "mmseg":
        return words
    options = []
    if "--auto-scale-lr" in words:
        words = [word for word in words if word != "--auto-scale-lr"]
        options.append("auto_scale_lr.enable=True")
    for i, word in enumerate(words[:-1]):
        if word == "--resume" and words[i + 1].endswith((".pth", ".pt")):
            options.append(f"load_from={words[i + 1]}")
            words = words[: i + 1] + words[i + 2 :]
            break
    return words + (["--cfg-options", *options] if options else [])


if __name__ == "__main__":
    hand_over("train.py", _for_training)
