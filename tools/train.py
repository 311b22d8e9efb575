#!/usr/bin/env python
"""Train a detector or a segmentor:

    python tools/train.py CONFIG [--work-dir DIR] [--amp] [--auto-scale-lr] [--resume [CHECKPOINT]]
                          [--cfg-options KEY=VALUE ...] [--launcher none|pytorch|slurm|mpi]

This hands over to the training script that mmdet (or mmseg, mmpretrain: the config's `default_scope`) installs, after
checking what its tracebacks explain badly, and makes this checkout importable where the package is not installed.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def main(script: str) -> None:
    """Run the framework's own `script` ("train.py", "test.py") with the arguments of this process."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    config = None
    for word in sys.argv[1:]:
        if word.startswith("-") or "=" in word or "://" in word or not word.endswith((".py", ".pth", ".pt")):
            continue
        if not Path(word).is_file():
            sys.exit(f"{sys.argv[0]}: {'config' if word.endswith('.py') else 'checkpoint'} {word} is not there")
        config = config or (word if word.endswith(".py") else None)
    scope = _scope(config)
    spec = find_spec(scope)
    path = Path(spec.origin or "").parent / ".mim" / "tools" / script if spec else None
    if path is None or not path.is_file():
        sys.exit(
            f'{sys.argv[0]}: {scope} with its packaged tools is not installed: pip install "dinat_backbones[openmmlab]"'
        )
    if scope == "mmseg" and script == "train.py":
        sys.argv[1:] = _for_mmseg(sys.argv[1:])
    runpy.run_path(str(path), run_name="__main__")


def _scope(config: str | None) -> str:
    if config is None:
        return "mmdet"  # whose parser will say what is missing, or print the help
    try:
        from mmengine.config import Config
    except ModuleNotFoundError:
        sys.exit(f'{sys.argv[0]}: mmengine is not installed: pip install "dinat_backbones[openmmlab]"')
    return Config.fromfile(config, import_custom_modules=False).get("default_scope", "mmdet")


def _for_mmseg(words: list[str]) -> list[str]:
    """mmseg's script lacks two of mmdet's flags, `--auto-scale-lr` and the value of `--resume`; configs have both."""
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
    main("train.py")
