#!/usr/bin/env python
"""Train or evaluate Mask2Former, or another model of Detectron2, with NAT, DiNAT or DiNAT_s:

    python mask2former/train_net.py --config-file CONFIG.yaml --num-gpus 8 [--resume] [KEY VALUE ...]
    python mask2former/train_net.py --config-file CONFIG.yaml --eval-only MODEL.WEIGHTS FILE [TEST.AUG.ENABLED True]

Data is looked for in $DETECTRON2_DATASETS (./datasets by default). Several machines: --num-machines, --machine-rank and
--dist-url. `--num-gpus 0` runs on the CPU; on a machine without GPUs, --num-gpus is the number of processes (gloo).
Evaluation also writes its figures to OUTPUT_DIR/inference/results.json. TEST.AUG.ENABLED adds an evaluation of the
semantic result over several scales and flips. With SEED set, a run that was killed and resumed ends with the very
weights of one that never stopped.
"""

import argparse
import itertools
import json
import os
import sys
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    from dinat_backbones.adapters.detectron2 import Checkpointer
    from dinat_backbones.adapters.mask2former import get_config, mask2former
except ModuleNotFoundError as error:
    sys.exit(f"{sys.argv[0]}: {error}")

import register_shapes  # noqa: F401  # registers them
from detectron2.data import DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, create_ddp_model, default_argument_parser, default_setup, launch
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from resumable import SeedSteps, build_loader

# INPUT.DATASET_MAPPER_NAME, as Mask2Former calls them, and Detectron2's own for its models
MAPPERS = {
    "mask_former_semantic": mask2former.MaskFormerSemanticDatasetMapper,
    "mask_former_panoptic": mask2former.MaskFormerPanopticDatasetMapper,
    "mask_former_instance": mask2former.MaskFormerInstanceDatasetMapper,
    "coco_instance_lsj": mask2former.COCOInstanceNewBaselineDatasetMapper,
    "coco_panoptic_lsj": mask2former.COCOPanopticNewBaselineDatasetMapper,
    "detectron2": DatasetMapper,
}
NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.LocalResponseNorm)
OPTIMIZERS = {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}


class Trainer(DefaultTrainer):
    """Detectron2's trainer with Mask2Former's optimizer, data mappers and evaluators."""

    def __init__(self, cfg: Any):
        # DefaultTrainer's own would wrap the model for GPUs alone and read checkpoints with pickle
        TrainerBase.__init__(self)
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
            raise ValueError("SOLVER.AMP.ENABLED: automatic mixed precision needs a GPU; turn it off to train on a CPU")
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        devices = None if cfg.MODEL.DEVICE == "cpu" else [comm.get_local_rank()]
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        if cfg.SEED >= 0:
            self.register_hooks([SeedSteps(cfg.SEED)])

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self._trainer.data_loader.batch_sampler.start = self.start_iter

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        name = cfg.INPUT.DATASET_MAPPER_NAME
        if name not in MAPPERS:
            raise ValueError(f"INPUT.DATASET_MAPPER_NAME={name}: expected one of {', '.join(MAPPERS)}")
        if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
            raise ValueError(f"DATALOADER.SAMPLER_TRAIN={cfg.DATALOADER.SAMPLER_TRAIN}: expected TrainingSampler")
        return build_loader(
            get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS),
            MAPPERS[name](cfg, True),
            seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(cfg, optimizer)  # Detectron2's, and WarmupPolyLR

    @classmethod
    def build_optimizer(cls, cfg: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Mask2Former's: a smaller rate for the backbone, no decay of norms and embeddings, one clipping for all."""
        if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
            raise ValueError(f"SOLVER.OPTIMIZER={cfg.SOLVER.OPTIMIZER}: expected one of {', '.join(OPTIMIZERS)}")
        arguments = {"momentum": cfg.SOLVER.MOMENTUM} if cfg.SOLVER.OPTIMIZER == "SGD" else {}
        optimizer = OPTIMIZERS[cfg.SOLVER.OPTIMIZER](parameter_groups(cfg, model), cfg.SOLVER.BASE_LR, **arguments)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
            return maybe_add_gradient_clipping(cfg, optimizer)
        if clip.CLIP_VALUE > 0:
            # Detectron2's own ways of clipping know single parameters only
            def clip_all(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
                torch.nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

            optimizer.register_step_pre_hook(clip_all)
        return optimizer

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, folder: str | None = None) -> Any:
        """The evaluators that belong to a data set's `evaluator_type` and to the results that the model gives."""
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        folder = folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        results = cfg.MODEL.MASK_FORMER.TEST
        evaluators: list[Any] = []
        if kind.endswith("panoptic_seg") and results.PANOPTIC_ON:
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        if kind == "sem_seg" or (kind in ("coco_panoptic_seg", "ade20k_panoptic_seg") and results.SEMANTIC_ON):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind == "coco" or (kind == "coco_panoptic_seg" and results.INSTANCE_ON):
            evaluators.append(COCOEvaluator(dataset_name, output_dir=folder))
        if kind == "ade20k_panoptic_seg" and results.INSTANCE_ON:
            evaluators.append(mask2former.InstanceSegEvaluator(dataset_name, output_dir=folder))
        if kind == "cityscapes_sem_seg" or (kind == "cityscapes_panoptic_seg" and results.SEMANTIC_ON):
            evaluators.append(CityscapesSemSegEvaluator(dataset_name))
        if kind == "cityscapes_instance" or (kind == "cityscapes_panoptic_seg" and results.INSTANCE_ON):
            evaluators.append(CityscapesInstanceEvaluator(dataset_name))
        if not evaluators:
            raise ValueError(
                f"{dataset_name} is evaluated as {kind}, for which MODEL.MASK_FORMER.TEST gives no result; turn on "
                "SEMANTIC_ON, INSTANCE_ON or PANOPTIC_ON"
            )
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg: Any, model: torch.nn.Module, evaluators: Any = None, folder: str = "inference") -> OrderedDict:
        """As DefaultTrainer.test; also writes the figures, a dictionary by task, to `folder` of OUTPUT_DIR."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            path = Path(cfg.OUTPUT_DIR, folder, "results.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1))
            partial.replace(path)
        return results

    @classmethod
    def test_with_augmentation(cls, cfg: Any, model: torch.nn.Module) -> OrderedDict:
        """Evaluate the mean of the semantic results over the scales of TEST.AUG and flips; names end with "_TTA"."""
        if not cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON:
            raise ValueError("TEST.AUG.ENABLED: only semantic results can be averaged; MODEL.MASK_FORMER.TEST has none")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
        folder = "inference_TTA"
        evaluators = [
            cls.build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, folder)) for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, mask2former.SemanticSegmentorWithTTA(cfg, model), evaluators, folder)
        return OrderedDict((f"{name}_TTA", values) for name, values in results.items())


def parameter_groups(cfg: Any, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Groups for an optimizer, as few as possible: the learning rate of the backbone is BACKBONE_MULTIPLIER times the
    others', norms decay by WEIGHT_DECAY_NORM, embeddings by WEIGHT_DECAY_EMBED, all else by WEIGHT_DECAY.

    "All else" includes the bias tables `rpb`, which the original trainer's list of exceptions did not know either. The
    recipes of the detectors do not decay them; it is kept here to reproduce the published models.
    """
    solver = cfg.SOLVER
    groups = []
    seen = set()
    for module_name, module in model.named_modules():
        decay = solver.WEIGHT_DECAY
        if isinstance(module, NORMS):
            decay = solver.WEIGHT_DECAY_NORM
        elif isinstance(module, torch.nn.Embedding):
            decay = solver.WEIGHT_DECAY_EMBED
        factor = solver.BACKBONE_MULTIPLIER if "backbone" in module_name else 1.0
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                groups.append(dict(params=[parameter], lr=solver.BASE_LR * factor, weight_decay=decay))
    return reduce_param_groups(groups)


def set_up(args: argparse.Namespace) -> Any:
    """The frozen config of the command line, with loggers and seeds set up as Detectron2 does it."""
    cfg = config_of(args)
    cfg.freeze()
    default_setup(cfg, args)
    for name in ("mask2former", "dinat_backbones"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    return cfg


def config_of(args: argparse.Namespace) -> Any:
    """The config of the command line, on the CPU where that is asked for or nothing else is there."""
    cfg = get_config(args.config_file or None, args.opts)
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def main(args: argparse.Namespace) -> Any:
    """Do what the command line says, in each of its processes."""
    cfg = set_up(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_augmentation(cfg, model))
    return results


if __name__ == "__main__":
    arguments = default_argument_parser(epilog="see the head of this file").parse_args()
    try:
        config_of(arguments)  # what is wrong with it is said once, before any process starts
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
