"""Deformable convolution and attention with the arguments of mmcv's compiled functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .torchvision_ops import gradients, supported, torchvision_ops

OPERATORS = (
    "deform_conv_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "modulated_deform_conv_forward",
    "modulated_deform_conv_backward",
    "ms_deform_attn_forward",
    "ms_deform_attn_backward",
)


def _complete(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """The tensors as torchvision takes them: always with a mask and a bias."""
    mask = input.new_zeros(len(input), 1) if mask is None else mask
    bias = input.new_zeros(len(weight)) if bias is None else bias
    return supported(input, weight, offset, mask, bias)


def _read_as(values: Tensor, output: Tensor) -> Tensor:
    """Offsets or masks (N, C, ...) in the size of `output`.

    DyHead passes them for a larger map. mmcv then reads their numbers one after the other, as many as it needs.
    """
    shape = (len(values), values.shape[1], *output.shape[2:])
    return values if values.shape == shape else values.flatten(1)[:, : output[0, 0].numel() * shape[1]].reshape(shape)


def _gradients(grad_output: Tensor, tensors: tuple[Tensor, ...], geometry: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The gradients with respect to input, weight, offset, mask and bias.

    Exactly one pixel outside, as with offsets of 0 and padding, the interpolated value is not differentiable: mmcv's
    derivative with respect to the offset is 0 there, torchvision's is the one towards the inside.
    """
    grads = torchvision_ops()._deform_conv2d_backward(*supported(grad_output), *tensors, *geometry)
    offset, (kernel_h, kernel_w), (height, width) = tensors[2], tensors[1].shape[2:], tensors[2].shape[2:]
    shape = (len(offset), -1, kernel_h, kernel_w, 2, height, width)
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = geometry[:6]
    y, x = offset.reshape(shape).unbind(4)
    by_y, by_x = grads[2].view(shape).unbind(4)
    rows = _positions(kernel_h, height, stride_h, pad_h, dilation_h, offset.device)
    columns = _positions(kernel_w, width, stride_w, pad_w, dilation_w, offset.device)
    by_y.masked_fill_(y + rows[:, None, :, None] == -1, 0)
    by_x.masked_fill_(x + columns[:, None, :] == -1, 0)
    return grads


def _positions(kernel: int, size: int, stride: int, padding: int, dilation: int, device: torch.device) -> Tensor:
    """The row (or column) of the input for each pair of one of the kernel and one of the output, (kernel, size)."""
    return (
        torch.arange(kernel, device=device)[:, None] * dilation + torch.arange(size, device=device) * stride - padding
    )


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int,
    deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Deformable convolution without mask (version 1) into `output`; `columns` and `ones` are not needed here."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group, False)
    output.copy_(torchvision_ops().deform_conv2d(*_complete(input, weight, offset, None, None), *geometry))


def deform_conv_backward_input(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor, weight: Tensor,
    columns: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int,
    deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Adds the gradients of version 1 to `gradInput` and `gradOffset`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group, False)
    tensors = _complete(input, weight, offset, None, None)
    grads = _gradients(gradOutput, tensors, geometry)
    gradInput.add_(grads[0])
    gradOffset.add_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int,
    deformable_group: int, scale: float, im2col_step: int,
) -> None:  # fmt: skip
    """Adds `scale` times the gradient of version 1 to `gradWeight`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group, False)
    tensors = _complete(input, torch.zeros_like(gradWeight), offset, None, None)
    grads = _gradients(gradOutput, tensors, geometry)
    gradWeight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, output: Tensor,
    columns: Tensor,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int,
    dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Deformable convolution with mask (version 2) into `output`; `bias` is used if `with_bias`."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, True)
    offset, mask = (_read_as(values, output) for values in (offset, mask))
    tensors = _complete(input, weight, offset, mask, bias if with_bias else None)
    output.copy_(torchvision_ops().deform_conv2d(*tensors, *geometry))


def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, columns: Tensor,
    grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int,
    dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Adds the gradients of version 2 to the `grad_*` tensors."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, True)
    offset, mask = (_read_as(values, grad_output) for values in (offset, mask))
    tensors = _complete(input, weight, offset, mask, bias if with_bias else None)
    grads = _gradients(grad_output, tensors, geometry)
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=False):
        unread = target[:1].numel() - grad[:1].numel()
        target.add_(grad if unread == 0 else F.pad(grad.flatten(1), (0, unread)).view_as(target))
    if with_bias:
        grad_bias.add_(grads[4])


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention by mmcv's own PyTorch version, (batch, queries, channels)."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    shapes = value_spatial_shapes.tolist()
    return multi_scale_deformable_attn_pytorch(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Adds the gradients of `ms_deform_attn_forward` to the last three tensors."""

    def forward(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, locations, weights, im2col_step
        )

    grads = gradients(forward, (value, sampling_locations, attention_weights), grad_output)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.add_(grad)
