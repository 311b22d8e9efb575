"""Train a detector, a segmentor or a classifier:

    dinat train CONFIG [--work-dir DIR] [--amp] [--auto-scale-lr] [--resume [CHECKPOINT]]
                       [--cfg-options KEY=VALUE ...] [--launcher none|pytorch|slurm|mpi]
                       [--backbone ARCH] [--dilations SETTING] [--checkpoint-backbone FILE|none] [--keep-optimizer]
    torchrun --nproc-per-node 8 -m dinat_backbones train CONFIG --launcher pytorch
    dinat train --config-file CONFIG.yaml [--num-gpus N] [--resume] [KEY VALUE ...]          # Detectron2

CONFIG is a file or a packaged name such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py. With --backbone its model
gets a NAT, DiNAT or DiNAT_s for a backbone, see `dinat config --help`.

Runs the training script that mmdet, mmseg or mmpretrain (the config's `default_scope`) installs; `dinat train CONFIG
--help` lists its options. With --config-file it is Detectron2's trainer, see cli/train_detectron2.py.
"""

import sys
from collections.abc import Sequence
from typing import Any

from .common import stop
from .framework_scripts import run_framework_script


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--help"], ["-h"]):  # with a config, the help of its framework's script
        print(__doc__)
        return
    if any(word.startswith("--config-file") for word in words):
        from .train_detectron2 import main as train_detectron2

        train_detectron2(words)
        return
    if any(word.endswith((".yaml", ".yml")) for word in words if not word.startswith("-") and "=" not in word):
        stop("YAML configs are Detectron2's: dinat train --config-file CONFIG.yaml [--num-gpus N] [KEY VALUE ...]")
    run_framework_script("train.py", _arguments_for_training, words)


def _arguments_for_training(scope: str, cfg: Any, words: list[str]) -> list[str]:
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
