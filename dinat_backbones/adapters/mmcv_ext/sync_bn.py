"""The steps of mmcv's SyncBatchNorm with the arguments of its compiled functions; mmcv reduces the statistics itself.

`input`, `output`, `norm` and the gradients of the maps are (N, C, pixels), the statistics (C,) in float32.
"""

import torch
from torch import Tensor

OPERATORS = (
    "sync_bn_forward_mean",
    "sync_bn_forward_var",
    "sync_bn_forward_output",
    "sync_bn_backward_param",
    "sync_bn_backward_data",
)


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """The mean of each channel into `mean`."""
    mean.copy_(input.mean((0, 2), dtype=torch.float32))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """The mean squared distance from `mean` of each channel into `var`."""
    var.copy_((input.float() - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float,
    group_size: int,
) -> None:
    """The normalised input into `norm`, the standard deviation into `std`, the scaled and shifted input into `output`.

    Updates the running statistics, if there are any.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None] if weight.numel() else norm)
    if running_mean.numel():
        count = input.shape[0] * input.shape[2] * group_size
        unbiased = var * count / (count - 1) if count > 1 else var
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """This process's gradients with respect to weight and bias into `grad_weight` and `grad_bias`."""
    grad_weight.copy_((grad_output * norm).sum((0, 2)))
    grad_bias.copy_(grad_output.sum((0, 2), dtype=torch.float32))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """The gradient with respect to the input into `grad_input`; those of weight and bias are means over processes."""
    shared = (grad_weight[:, None] * norm + grad_bias[:, None]) / (grad_output.shape[0] * grad_output.shape[2])
    grad_input.copy_(weight[:, None] * (grad_output.float() - shared) / std[:, None])
