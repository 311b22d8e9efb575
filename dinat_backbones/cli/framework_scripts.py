"""Runs the train and test scripts that mmdet, mmseg and mmpretrain install, after checking what their tracebacks
explain badly."""

import argparse
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .common import load_config, stop
from .config import replace_config

# Given the scope, the config (None if there is none) and the arguments; returns the arguments for the script.
Prepare = Callable[[str, Any, list[str]], list[str]]


def run_framework_script(script: str, prepare: Prepare, arguments: Sequence[str] | None = None) -> None:
    """Run "train.py" or "test.py" of the framework that the config's `default_scope` names.

    Args:
        script: the script's file name.
        prepare: adapts the arguments to the framework.
        arguments: of the command line; None for those of this process.

    Raises:
        SystemExit: a file that does not exist, a framework that is not installed, and whatever the script ends with.
    """
    words = replace_config(sys.argv[1:] if arguments is None else arguments)
    config = None
    for word in words:
        if word.startswith("-") or "=" in word or "://" in word or not word.endswith((".py", ".pth", ".pt")):
            continue
        if not Path(word).exists():  # checkpoints of FSDP may be folders
            stop(f"{'config' if word.endswith('.py') else 'checkpoint'} {word} is not there")
        config = config or (word if word.endswith(".py") else None)
    cfg = load_config(config, import_custom_modules=False) if config else None
    if cfg:
        _merge_options(cfg, words)
        _check_slide(cfg)
    scope = cfg.get("default_scope", "mmdet") if cfg else "mmdet"  # without a config: prints mmdet's help
    spec = find_spec(scope)
    path = Path(spec.origin or "").parent / ".mim" / "tools" / script if spec else None
    if path is None or not path.is_file():
        stop(f'{scope} with its packaged tools is not installed: pip install "dinat_backbones[openmmlab]"')
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's
        _end_after_parent(os.getppid())
    sys.argv[1:] = _without_gpu(prepare(scope, cfg, words), cfg)
    runpy.run_path(str(path), run_name="__main__")


def _merge_options(cfg: Any, words: list[str]) -> None:
    """Puts the `--cfg-options` of the command line into a config, as the frameworks' scripts will do."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(prog=sys.argv[0], add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    options = parser.parse_known_args(words)[0].cfg_options
    if options:
        cfg.merge_from_dict(options)


def _check_slide(cfg: Any) -> None:
    model = cfg.get("model") or {}
    head = model.get("decode_head") or {}
    slides = (model.get("test_cfg") or {}).get("mode") in ("slide", "slide_flip")
    padded = (model.get("data_preprocessor") or {}).get("test_cfg")
    if slides and padded and str(head.get("type")).endswith(("MaskFormerHead", "Mask2FormerHead")):
        stop(
            f"model.test_cfg.mode='slide' with {head['type']} and model.data_preprocessor.test_cfg={dict(padded)}: "
            "mmseg would resize the masks of each crop to the padded image; add --cfg-options "
            "model.data_preprocessor.test_cfg=None, which leaves images unpadded, or use mode='whole'"
        )


def _end_after_parent(parent: int) -> None:
    """End this process soon after its parent has gone.

    Otherwise the processes of a torchrun that was killed alone go on training, and write into the folder of a run that
    has been resumed meanwhile.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        print(f"torchrun (process {parent}) is gone; ending", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _without_gpu(words: list[str], cfg: Any) -> list[str]:
    """Options for several processes without GPUs: mmengine's launchers assume a GPU per process."""
    if cfg is None or not any(word.startswith("--launcher") for word in words):
        return words
    import torch

    if torch.cuda.is_available():
        return words
    torch.cuda.set_device = lambda device: None
    options = ["env_cfg.dist_cfg.backend=gloo"]
    strategy = cfg.get("strategy") or {}
    if str(strategy.get("type")).endswith("FSDPStrategy"):
        options.append("strategy.model_wrapper.device_id=cpu")
        if isinstance(strategy.get("state_dict_cfg"), dict):  # offloading memory of the CPU to the CPU frees it
            parts = [f"strategy.state_dict_cfg.{part}" for part in ("state_dict_config", "optim_state_dict_config")]
            options += [f"{part}.{flag}=False" for part in parts for flag in ("offload_to_cpu", "rank0_only")]
    elif not strategy and not cfg.get("model_wrapper_cfg"):
        wrapper = dict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )
        options += [f"model_wrapper_cfg.{key}={value}" for key, value in wrapper.items()]
    return [*words, "--cfg-options", *options]
