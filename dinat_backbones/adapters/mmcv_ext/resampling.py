"""CARAFE, masked convolution and PSAMask with the arguments of mmcv's compiled functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .torchvision_ops import gradients

OPERATORS = (
    "carafe_forward",
    "carafe_backward",
    "carafe_naive_forward",
    "carafe_naive_backward",
    "masked_im2col_forward",
    "masked_col2im_forward",
    "psamask_forward",
    "psamask_backward",
)


def _carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Each output pixel is the sum over its window of `features` (N, C, H, W), weighted by `masks` (N, groups * window,
    H * scale, W * scale)."""
    n, c, h, w = features.shape
    if features.numel() == 0:
        return features.new_zeros(n, c, h * scale_factor, w * scale_factor) + 0 * (features.sum() + masks.sum())
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2)
    windows = windows.view(n, group_size, c // group_size, kernel_size**2, h, w)
    masks = masks.view(n, group_size, kernel_size**2, h, scale_factor, w, scale_factor)
    return torch.einsum("ngckhw,ngkhawb->ngchawb", windows, masks).reshape(n, c, h * scale_factor, w * scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """CARAFE into `output` (N, C, H * scale, W * scale)."""
    output.copy_(_carafe(features, masks, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Adds the gradients of CARAFE to `bottom_grad` and `mask_grad`."""

    def forward(features: Tensor, masks: Tensor) -> Tensor:
        return _carafe(features, masks, kernel_size, group_size, scale_factor)

    grads = gradients(forward, (features, masks), top_grad)
    bottom_grad.add_(grads[0])
    mask_grad.add_(grads[1])


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """CARAFE into `output`, and a copy of the features into `rfeatures` for the backward pass."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Adds the gradients of CARAFE to `bottom_grad` and `mask_grad`; the other buffers are not needed."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """The windows of `im` (1, C, H, W) at the given positions of the output into `col` (C * window, positions)."""
    padded = F.pad(im[0], (pad_w, kernel_w, pad_h, kernel_h))
    rows = mask_h_idx[:, None, None] + torch.arange(kernel_h, device=im.device)[:, None]
    columns = mask_w_idx[:, None, None] + torch.arange(kernel_w, device=im.device)
    col.copy_(padded[:, rows, columns].permute(0, 2, 3, 1).flatten(0, 2))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """The values `col` (C, positions) into the given positions of `im` (1, C, height, width)."""
    im[0, :, mask_h_idx, mask_w_idx] = col


def _mask_channels(
    h_feature: int, w_feature: int, h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each pair of pixels the channel of the first one's mask that describes the second, and whether the mask
    extends to it. Both are (H * W of the second pixel, H, W of the first).
    """
    inside, place = [], []
    for pixels, size, half in ((h_feature, h_mask, half_h_mask), (w_feature, w_mask, half_w_mask)):
        position = torch.arange(pixels, device=device)
        distance = position[:, None] - position + half
        inside.append((distance >= 0) & (distance < size))
        place.append(distance.clamp(0, size - 1))
    channels = place[0][:, None, :, None] * w_mask + place[1][None, :, None, :]
    reached = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    return channels.flatten(0, 1), reached.flatten(0, 1)


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spreads the masks `input` (N, h_mask * w_mask, H, W) over the whole map into `output` (N, H * W, H, W).

    Channels of `output` are the pixels that a mask describes and positions are the masks' own pixels (`psa_type` 0,
    collect), or the other way round (1, distribute).
    """
    channels, reached = _mask_channels(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    spread = torch.where(reached, input.gather(1, channels.expand(num_, -1, -1, -1)), 0)
    if psa_type == 1:
        spread = spread.flatten(2).transpose(1, 2).view_as(output)
    output.copy_(spread)


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Adds the gradient of PSAMask to `grad_input`."""
    channels, reached = _mask_channels(
        h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, grad_output.device
    )
    if psa_type == 1:
        grad_output = grad_output.flatten(2).transpose(1, 2).reshape(grad_output.shape)
    grad_input.scatter_add_(1, channels.expand(num_, -1, -1, -1), torch.where(reached, grad_output, 0))
