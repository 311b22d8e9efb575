"""torchvision's operators, imported when first called: mmcv itself does not need torchvision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def torchvision_ops() -> Any:
    """`torch.ops.torchvision`; raises ModuleNotFoundError without torchvision."""
    try:
        import torchvision.ops  # noqa: F401  # registers the operators
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torchvision":
            raise
        raise ModuleNotFoundError(
            "mmcv was installed without compiled operators, and dinat_backbones computes this one with torchvision: "
            "pip install torchvision",
            name="torchvision",
        ) from error
    return torch.ops.torchvision


def supported(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in a dtype that torchvision's operators support: float32 instead of bfloat16."""
    return tuple(tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in tensors)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `function(*inputs)` with respect to `inputs`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_output)
