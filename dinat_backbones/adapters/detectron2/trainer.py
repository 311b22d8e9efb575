"""Detectron2's trainer with Mask2Former's optimizer, data mappers and evaluators, for GPUs and CPUs."""

import itertools
import json
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, create_ddp_model
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

from ...optim import layer_scales
from .checkpointer import Checkpointer
from .data_checks import check_classes
from .maskformer_compat import CocoInstanceMapper, mask2former
from .resumable_loader import SeedSteps, build_loader

# By INPUT.DATASET_MAPPER_NAME: Mask2Former's names, and "detectron2" for the mapper of Detectron2's own models
MAPPERS = {
    "mask_former_semantic": mask2former.MaskFormerSemanticDatasetMapper,
    "mask_former_panoptic": mask2former.MaskFormerPanopticDatasetMapper,
    "mask_former_instance": mask2former.MaskFormerInstanceDatasetMapper,
    "coco_instance_lsj": CocoInstanceMapper,
    "coco_panoptic_lsj": mask2former.COCOPanopticNewBaselineDatasetMapper,
    "detectron2": DatasetMapper,
}
NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.LocalResponseNorm)
OPTIMIZERS = {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}


class Trainer(DefaultTrainer):
    """Detectron2's trainer; with cfg.SEED set, a resumed run repeats an uninterrupted one.

    Raises:
        ValueError: mixed precision on a CPU, an unknown mapper, optimizer or sampler, a batch size that is not a
            multiple of the number of processes, fewer classes than the data has.
    """

    def __init__(self, cfg: Any):
        # not DefaultTrainer.__init__, which needs GPUs for several processes and unpickles checkpoints
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
        if hasattr(self.scheduler, "max_iters"):  # WarmupPolyLR has that of the checkpoint, which may be shorter
            self.scheduler.max_iters = self.cfg.SOLVER.MAX_ITER
        self._trainer.data_loader.batch_sampler.start = self.start_iter

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        name = cfg.INPUT.DATASET_MAPPER_NAME
        if name not in MAPPERS:
            raise ValueError(f"INPUT.DATASET_MAPPER_NAME={name}: expected one of {', '.join(MAPPERS)}")
        if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
            raise ValueError(f"DATALOADER.SAMPLER_TRAIN={cfg.DATALOADER.SAMPLER_TRAIN}: expected TrainingSampler")
        dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        check_classes(cfg, dicts)
        return build_loader(
            dicts,
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
        """Mask2Former's optimizer: the groups of `parameter_groups`, and gradients clipped by their total norm."""
        if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
            raise ValueError(f"SOLVER.OPTIMIZER={cfg.SOLVER.OPTIMIZER}: expected one of {', '.join(OPTIMIZERS)}")
        arguments = {"momentum": cfg.SOLVER.MOMENTUM} if cfg.SOLVER.OPTIMIZER == "SGD" else {}
        optimizer = OPTIMIZERS[cfg.SOLVER.OPTIMIZER](parameter_groups(cfg, model), cfg.SOLVER.BASE_LR, **arguments)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
            return maybe_add_gradient_clipping(cfg, optimizer)
        if clip.CLIP_VALUE > 0:
            # Detectron2's own clipping is per parameter
            def clip_all(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
                torch.nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

            optimizer.register_step_pre_hook(clip_all)
        return optimizer

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, folder: str | None = None) -> Any:
        """The evaluators for the `evaluator_type` of a data set and the kinds of results that the config turns on."""
        evaluator_type = MetadataCatalog.get(dataset_name).evaluator_type
        folder = folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        results = cfg.MODEL.MASK_FORMER.TEST
        evaluators: list[Any] = []
        if evaluator_type.endswith("panoptic_seg") and results.PANOPTIC_ON:
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        if evaluator_type == "sem_seg" or (
            evaluator_type in ("coco_panoptic_seg", "ade20k_panoptic_seg") and results.SEMANTIC_ON
        ):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if evaluator_type == "coco" or (evaluator_type == "coco_panoptic_seg" and results.INSTANCE_ON):
            evaluators.append(COCOEvaluator(dataset_name, output_dir=folder))
        if evaluator_type == "ade20k_panoptic_seg" and results.INSTANCE_ON:
            evaluators.append(mask2former.InstanceSegEvaluator(dataset_name, output_dir=folder))
        if evaluator_type == "cityscapes_sem_seg" or (
            evaluator_type == "cityscapes_panoptic_seg" and results.SEMANTIC_ON
        ):
            evaluators.append(CityscapesSemSegEvaluator(dataset_name))
        if evaluator_type == "cityscapes_instance" or (
            evaluator_type == "cityscapes_panoptic_seg" and results.INSTANCE_ON
        ):
            evaluators.append(CityscapesInstanceEvaluator(dataset_name))
        if not evaluators:
            raise ValueError(
                f"{dataset_name} has the evaluator type {evaluator_type}, and none of its results is turned on; set "
                "SEMANTIC_ON, INSTANCE_ON or PANOPTIC_ON of MODEL.MASK_FORMER.TEST"
            )
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg: Any, model: torch.nn.Module, evaluators: Any = None, folder: str = "inference") -> OrderedDict:
        """As DefaultTrainer.test; also writes the metrics, by task, to results.json in `folder` of OUTPUT_DIR."""
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
        """Evaluate semantic results averaged over the scales of TEST.AUG and flips; result names end with "_TTA"."""
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
    """Parameter groups of an optimizer.

    The learning rate of the backbone is BACKBONE_MULTIPLIER times the base rate and decays by LAYER_DECAY from layer to
    layer (see `optim.layer_scales`). The weight decay is WEIGHT_DECAY_NORM for norms, WEIGHT_DECAY_EMBED for embeddings
    and WEIGHT_DECAY otherwise.

    WEIGHT_DECAY includes the bias tables `rpb`, as in the original trainer; in the recipes of the detectors their decay
    is 0.
    """
    solver = cfg.SOLVER
    scales = layer_scales(model, solver.get("LAYER_DECAY", 1.0))
    groups = []
    seen = set()
    for module_name, module in model.named_modules():
        decay = solver.WEIGHT_DECAY
        if isinstance(module, NORMS):
            decay = solver.WEIGHT_DECAY_NORM
        elif isinstance(module, torch.nn.Embedding):
            decay = solver.WEIGHT_DECAY_EMBED
        factor = solver.BACKBONE_MULTIPLIER if "backbone" in module_name else 1.0
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                scale = factor * scales[f"{module_name}.{name}" if module_name else name]
                groups.append(dict(params=[parameter], lr=solver.BASE_LR * scale, weight_decay=decay))
    return reduce_param_groups(groups)
