"""Train or evaluate Mask2Former, or another model of Detectron2, with NAT, DiNAT or DiNAT_s:

    dinat train --config-file CONFIG.yaml --num-gpus 8 [--resume] [KEY VALUE ...]
    dinat train --config-file CONFIG.yaml --eval-only MODEL.WEIGHTS FILE [TEST.AUG.ENABLED True]
    python mask2former/train_net.py --config-file CONFIG.yaml ...                                # from a checkout
    PYTHONPATH=. dinat train --config-file CONFIG.yaml --import my_data                          # data of one's own

Data is looked for in $DETECTRON2_DATASETS (./datasets by default); --import names a module that registers further data
sets. Before training, the model's number of classes is compared with the data's, and evaluation's metadata are checked.
--eval-only needs weights of the whole model. Several machines: --num-machines, --machine-rank and
--dist-url. `--num-gpus 0` runs on the CPU; on a machine without GPUs, --num-gpus is the number of processes (gloo).
Evaluation also writes its figures to OUTPUT_DIR/inference/results.json. TEST.AUG.ENABLED adds an evaluation of the
semantic result over several scales and flips. With SEED set, a run that was killed and resumed ends with the same
weights as an uninterrupted one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters.detectron2.maskformer_compat import get_config  # before Detectron2: says what is missing

# isort: split
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..adapters.detectron2 import (
    Checkpointer,
    shapes_datasets,  # noqa: F401  # registers them
)
from ..adapters.detectron2.data_checks import check_registered
from ..adapters.detectron2.trainer import Trainer
from ..zoo import find_config
from .common import import_modules, stop


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line.

    Raises:
        SystemExit: the config does not exist or has a wrong key or value.
    """
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="registers data sets; repeatable",
    )
    args = parser.parse_args(arguments)
    if args.config_file:
        args.config_file = str(find_config(args.config_file))  # Detectron2 reads the file itself, too
    try:
        cfg = config_of(args)  # reports errors once, before any process starts
        check_registered(cfg, train=not args.eval_only)
    except (FileNotFoundError, KeyError, ValueError) as error:
        stop(str(error))
    trained = cfg.MODEL.WEIGHTS or (args.resume and Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file())
    if args.eval_only and not trained:
        stop("--eval-only has no weights: add MODEL.WEIGHTS FILE, or --resume for the last checkpoint of OUTPUT_DIR")
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def set_up(args: argparse.Namespace) -> Any:
    """The frozen config of the command line, with loggers and seeds set up as Detectron2 does it."""
    cfg = config_of(args)
    cfg.freeze()
    default_setup(cfg, args)
    for name in ("mask2former", "dinat_backbones"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    return cfg


def config_of(args: argparse.Namespace) -> Any:
    """The config of the command line, on the CPU with --num-gpus 0 or without a GPU. Imports --import's modules."""
    import_modules(args.imports)
    cfg = get_config(args.config_file or None, args.opts)
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def run(args: argparse.Namespace) -> Any:
    """Train or evaluate; called in each process of the command line."""
    cfg = set_up(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    if missing := checkpointer.missing:
        stop(
            f"--eval-only: the checkpoint lacks {len(missing)} parameters of the model, which would be random "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); MODEL.WEIGHTS has to be a trained model"
        )
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_augmentation(cfg, model))
    return results
