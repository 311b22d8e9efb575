"""Pooling of regions of interest with the arguments of mmcv's compiled functions.

`rois` are always (R, 5): the image's index in the batch, then x1, y1, x2, y2 in pixels of the image.
"""

from torch import Tensor

from .torchvision_ops import torchvision_ops

OPERATORS = ("roi_align_forward", "roi_align_backward")


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of `input` (N, C, H, W) into `output` (R, C, aligned_height, aligned_width)."""
    if pool_mode == 0:
        raise NotImplementedError("roi_align with pool_mode='max'")
    output.copy_(
        torchvision_ops().roi_align(input, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds the gradient of RoIAlign to `grad_input` (N, C, H, W)."""
    grad_input.add_(
        torchvision_ops()._roi_align_backward(
            grad_output,
            rois,
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )
