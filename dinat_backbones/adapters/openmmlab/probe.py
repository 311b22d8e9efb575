"""What parts of a model of mmdet or mmseg give and read: channels and strides of feature maps, found by running the
parts without weights on torch's meta device."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS

IMAGE_SIZE = 256  # divisible by every stride; larger where the backbone names a size of its own

WEIGHTS = ("init_cfg", "pretrained", "teacher_ckpt")


class SwapError(ValueError):
    """The model is tied to its backbone; the message is the reason."""


class FeatureMap(NamedTuple):
    """What is known of one map ``[B, channels, H / stride, W / stride]``."""

    channels: int
    stride: int

    def zeros(self, device: str, size: int = IMAGE_SIZE) -> torch.Tensor:
        """Two of these maps, for images of `size` x `size`."""
        side = max(1, size // self.stride)
        return torch.zeros(2, self.channels, side, side, device=device)


def backbone_maps(cfg: dict[str, Any]) -> list[FeatureMap]:
    """The maps that the backbone of a config returns.

    Raises:
        SwapError: it cannot be built or run, or gives anything but one map per image and level.
    """
    name = cfg["type"]
    size = cfg.get("img_size") or cfg.get("pretrain_img_size") or IMAGE_SIZE
    size = size if isinstance(size, int) else max(size)
    image = FeatureMap(cfg.get("in_channels") or 3, 1)
    backbone = build(cfg, "backbone")
    try:
        outputs = run(backbone, [image], size, single=True)
    except Exception as error:
        raise SwapError(f"backbone {name} does not run on an image of {size} x {size}: {one_line(error)}") from error
    try:
        backbone.train()
        training = run(backbone, [image], size, single=True)
    except Exception:  # such as a norm that wants a GPU: nothing can be said
        training = outputs
    if [map.shape for map in as_maps(training, name)] != [map.shape for map in as_maps(outputs, name)]:
        raise SwapError(f"backbone {name} gives its head other maps in training than in evaluation")
    return [FeatureMap(map.shape[1], max(1, round(size / map.shape[3]))) for map in as_maps(outputs, name)]


def as_maps(outputs: Any, name: str) -> list[torch.Tensor]:
    """The outputs of a module as a list of maps; SwapError if there is anything else among them."""
    maps = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs) if is_sequence(outputs) else [outputs]
    for map in maps:
        if not isinstance(map, torch.Tensor) or map.dim() != 4:
            what = f"{map.dim()}-dimensional tensors" if isinstance(map, torch.Tensor) else f"a {type(map).__name__}"
            raise SwapError(f"{name} gives {what} where a DiNAT gives maps [B, C, H, W]")
        if map.shape[0] != 2:
            raise SwapError(f"{name} gives {map.shape[0]} maps for 2 images")
    return maps


def neck_maps(cfg: Any, inputs: Sequence[FeatureMap]) -> tuple[list[FeatureMap], list[int]]:
    """The maps that a neck makes of `inputs`, and the indices of the inputs that it reads.

    Raises:
        SwapError: it cannot be built or run for these inputs.
    """
    name = type_name(cfg)
    neck = build(cfg, "neck")
    neck.train()
    try:
        with torch.enable_grad():
            outputs, leaves = run(neck, inputs, IMAGE_SIZE, single=False, with_inputs=True)
            tensors = [t for t in flatten(outputs) if t.requires_grad]
            grads = torch.autograd.grad([t.sum() for t in tensors], leaves, allow_unused=True)
    except Exception as error:
        channels = [map.channels for map in inputs]
        raise SwapError(f"neck {name} does not run on maps of {channels} channels: {one_line(error)}") from error
    read = [i for i, grad in enumerate(grads) if grad is not None]
    tensors = flatten(outputs)
    if any(t.dim() != 4 for t in tensors):  # pooled: a vector per image
        return [FeatureMap(t.shape[1], 0) for t in tensors], read
    if any(0 in t.shape for t in tensors):
        raise SwapError(f"neck {name} gives empty maps")
    return [FeatureMap(t.shape[1], max(1, round(IMAGE_SIZE / t.shape[3]))) for t in tensors], read


def read_by_head(cfg: Any, inputs: Sequence[FeatureMap], size: int) -> list[int] | None:
    """The indices of the maps that a head of mmseg computes with, which may be fewer than it lists.

    Args:
        size: of the images.

    Returns:
        None if it does not run: on these maps, or because its forward wants more than maps, as that of a query-based
        head does.

    Raises:
        SwapError: it cannot be built.
    """
    head = build(cfg, "head")
    head.train()
    try:
        with torch.enable_grad():
            outputs, leaves = run(head, inputs, size, single=False, with_inputs=True)
            tensors = [t.sum() for t in flatten(outputs) if t.requires_grad]
            grads = torch.autograd.grad(tensors, leaves, allow_unused=True)
    except Exception:
        return None
    return [i for i, grad in enumerate(grads) if grad is not None]


def build(cfg: Any, part: str) -> Any:
    """A module of a config, on the meta device and in evaluation mode; its weights are not initialized or loaded.

    Raises:
        SwapError: it cannot be built.
    """
    cfg = without_weights(cfg)
    try:
        try:
            with torch.device("meta"):
                module = MODELS.build(cfg)
        except Exception:  # some compute with the values of tensors, such as torch.linspace(...).item()
            module = MODELS.build(cfg)
    except Exception as error:
        raise SwapError(f"{part} {type_name(cfg)} cannot be built: {one_line(error)}") from error
    module = revert_sync_batchnorm(module)
    for part in module.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.eps == 0:
            part.eps = 1e-5  # new versions of torch refuse 0, which a backbone of NAS-FCOS has
    module.eval()  # which returns nothing in mmdet's backbones
    return module


def run(module: Any, inputs: Sequence[FeatureMap], size: int, *, single: bool, with_inputs: bool = False) -> Any:
    """What a module makes of zeros, on the meta device, or on the CPU if an operator has no shape function."""
    for device in ("meta", "cpu"):
        try:
            module = module.to_empty(device="cpu") if device == "cpu" else module.to(device)
            for tensor in (*module.parameters(), *module.buffers()):
                torch.nn.init.zeros_(tensor)  # deformable convolutions crash on offsets of any size
            side = size if device == "meta" or single else IMAGE_SIZE  # a neck or head computes for long
            maps = [map.zeros(device, side).requires_grad_(with_inputs) for map in inputs]
            outputs = module(maps[0] if single else tuple(maps))
        except Exception:
            if device == "cpu":
                raise
            continue
        return (outputs, maps) if with_inputs else outputs
    raise AssertionError("unreachable")


def without_weights(cfg: Any) -> Any:
    """A copy of a part's config in which nothing names a checkpoint."""
    if isinstance(cfg, dict):
        kept = {key: without_weights(value) for key, value in cfg.items() if key not in WEIGHTS}
        return ConfigDict(kept)
    return type(cfg)(map(without_weights, cfg)) if isinstance(cfg, (list, tuple)) else cfg


def flatten(outputs: Any) -> list[torch.Tensor]:
    """All tensors in nested sequences and dicts, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [tensor for item in outputs for tensor in flatten(item)] if is_sequence(outputs) else []


def is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, dict, torch.Tensor))


def type_name(cfg: Any) -> str:
    """The type of a part, or of the first one in a list of parts."""
    first = cfg[0] if isinstance(cfg, (list, tuple)) else cfg
    return str(first.get("type"))


def one_line(error: Exception) -> str:
    """The first line of an error, with its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:200]}"
