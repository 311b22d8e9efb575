"""Mask2Former on Detectron2 with this package's backbones: one import, one config.

    from dinat_backbones.adapters.detectron2.maskformer_compat import get_config
    cfg = get_config("mask2former/configs/coco/panoptic-segmentation/....yaml", ["SOLVER.MAX_ITER", 1000])

Works with PyPI's `maskformer2` and with the original repository on PYTHONPATH, with and without the CUDA build of their
deformable attention; the differences are handled here.
"""

import contextlib
import importlib
import importlib.util
import inspect
import logging
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import log_first_n
from torch import Tensor

from ...zoo import find_config
from .config import add_dinat_config

INSTALL = (
    "pip install --no-deps --no-build-isolation maskformer2==0.1 (its dependencies are pinned to URLs; install "
    "timm==0.9.16, scipy and panopticapi-lite), or put a checkout of facebookresearch/Mask2Former on PYTHONPATH"
)
_CUDA_OP = "MultiScaleDeformableAttention"
_HAS_CUDA_OP = importlib.util.find_spec(_CUDA_OP) is not None


@contextlib.contextmanager
def _placeholder_for_cuda_op() -> Iterator[None]:
    """An empty module in place of a missing CUDA op: the original repository fails to import without the op, although
    it has a PyTorch version of it."""
    if not _HAS_CUDA_OP:
        sys.modules[_CUDA_OP] = types.ModuleType(_CUDA_OP)
    try:
        yield
    finally:
        if not _HAS_CUDA_OP:
            del sys.modules[_CUDA_OP]


try:
    with _placeholder_for_cuda_op():
        mask2former: Any = importlib.import_module("mask2former")
        if getattr(mask2former, "__file__", None) is None:  # the folder mask2former/ of this project's checkout
            raise ModuleNotFoundError("no module named 'mask2former'", name="mask2former")
        maskformer_model: Any = importlib.import_module("mask2former.maskformer_model")
        ms_deform_attn: Any = importlib.import_module("mask2former.modeling.pixel_decoder.ops.modules.ms_deform_attn")
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "mask2former":
        raise
    raise ModuleNotFoundError(
        f"Detectron2's Mask2Former models need Mask2Former: {INSTALL}", name="mask2former"
    ) from error


class _PyTorchDeformableAttention:
    """Replaces `MSDeformAttnFunction` where its CUDA op is missing. Mask2Former would call the op, catch the error and
    call the same PyTorch function, in every layer."""

    @staticmethod
    def apply(
        value: Tensor, shapes: Tensor, level_start: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
    ) -> Tensor:
        log_first_n(
            logging.INFO,
            "MSDeformAttn: no CUDA build of it is installed; its PyTorch version (grid_sample) runs instead",
            name=__name__,
            key="message",
        )
        return ms_deform_attn.ms_deform_attn_core_pytorch(value, shapes, locations, weights)


if not _HAS_CUDA_OP:
    ms_deform_attn.MSDeformAttnFunction = _PyTorchDeformableAttention


class _WeightDictCriterion(maskformer_model.SetCriterion):
    """maskformer2 0.1's criterion with the arguments of the original repository, which `MaskFormer.from_config` passes:
    0.1 itself expects separate weights in place of `weight_dict`."""

    def __init__(self, num_classes: int, matcher: Any, weight_dict: dict[str, float], **kwargs: Any):
        super().__init__(
            num_classes,
            matcher,
            class_weight=weight_dict["loss_ce"],
            mask_weight=weight_dict["loss_mask"],
            dice_weight=weight_dict["loss_dice"],
            num_layers=sum(name.startswith("loss_ce_") for name in weight_dict),
            **kwargs,
        )


# TorchScript recompiles the gradient of a function after its first calls and then rounds differently, so a resumed run
# would differ from an uninterrupted one. Both repositories also have the plain functions, which replace those.
for _module in map(importlib.import_module, ("mask2former.modeling.criterion", "mask2former.modeling.matcher")):
    for _name in [name for name in vars(_module) if name.endswith("_jit")]:
        setattr(_module, _name, getattr(_module, _name.removesuffix("_jit")))


if "weight_dict" not in inspect.signature(maskformer_model.SetCriterion).parameters:
    maskformer_model.SetCriterion = _WeightDictCriterion


class CocoInstanceMapper(mask2former.COCOInstanceNewBaselineDatasetMapper):  # type: ignore[misc]  # untyped
    """Mask2Former's, for images without annotations (but for crowds), too, at which it stops."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """A training sample, or with `is_train` off an image to predict; see Mask2Former's."""
        annotations = dataset_dict.get("annotations", ())
        if not self.is_train or any(not annotation.get("iscrowd", 0) for annotation in annotations):
            return super().__call__(dataset_dict)
        sample = super().__call__({key: value for key, value in dataset_dict.items() if key != "annotations"})
        height, width = sample["image"].shape[1:]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.zeros(0, 4))
        instances.gt_classes = torch.zeros(0, dtype=torch.int64)
        instances.gt_masks = torch.zeros(0, height, width, dtype=torch.bool)
        return sample | dict(instances=instances)


def get_config(file: str | None = None, options: Sequence[Any] = ()) -> CfgNode:
    """A config with the defaults of Detectron2, its DeepLab project (poly schedule), Mask2Former and `MODEL.DINAT`.

    Args:
        file: a YAML file that is read into it, with its `_BASE_` files; as for `zoo.find_config`.
        options: alternating keys and values, as on a command line; they override the file.

    Raises:
        FileNotFoundError: `file` is not there.
        KeyError, ValueError: a key that does not exist, a value of another type.
    """
    cfg = get_cfg()
    add_deeplab_config(cfg)
    mask2former.add_maskformer2_config(cfg)
    add_dinat_config(cfg)
    if file is not None:
        path = find_config(file)
        if not path.is_file():
            raise FileNotFoundError(f"config {file} is not there")
        cfg.merge_from_file(str(path))
    cfg.merge_from_list(list(options))
    return cfg
