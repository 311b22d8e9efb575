"""Pooling of regions of interest with the arguments of mmcv's compiled functions.

`rois` are (R, 5): the index of the image in the batch, then x1, y1, x2, y2 in its pixels; times `spatial_scale` they
are in pixels of `input` (N, C, H, W). `output` is (R, C, bins in height, bins in width).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .torchvision_ops import gradients, supported, torchvision_ops

OPERATORS = (
    "roi_align_forward",
    "roi_align_backward",
    "roi_pool_forward",
    "roi_pool_backward",
    "deform_roi_pool_forward",
    "deform_roi_pool_backward",
    "prroi_pool_forward",
    "prroi_pool_backward",
    "prroi_pool_coor_backward",
)
MAX_SAMPLES = 1 << 24  # numbers in one tensor of sampled values


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
    """RoIAlign into `output`.

    A bin's value is the mean of its samples (`pool_mode` 1), or their maximum (0), whose position goes into `argmax_y`
    and `argmax_x`.
    """
    bins = aligned_height, aligned_width
    if pool_mode == 1:
        input, rois = supported(input, rois)
        output.copy_(torchvision_ops().roi_align(input, rois, spatial_scale, *bins, sampling_ratio, aligned))
        return
    for chunk, y, x in _sample_points(
        rois, bins, input.shape, spatial_scale, sampling_ratio, 0.5 * aligned, not aligned
    ):
        indices, weights = _corners(y, x, *input.shape[2:])
        values = _corner_values(input, rois[chunk], indices).mul_(weights[:, None]).sum(-1)
        # mmcv's maximum starts at -10000 with position -1
        values, y, x = (F.pad(tensor, (1, 0), value=start) for tensor, start in ((values, -10000), (y, -1), (x, -1)))
        best = values.max(-1, keepdim=True)
        output[chunk] = best.values[..., 0]
        for target, position in ((argmax_y, y), (argmax_x, x)):
            target[chunk] = position[:, None].expand_as(values).gather(-1, best.indices)[..., 0]


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
    """Adds the gradient of RoIAlign to `grad_input`."""
    if pool_mode == 1:
        grad_output, rois = supported(grad_output, rois)
        geometry = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
        grad_input.add_(torchvision_ops()._roi_align_backward(grad_output, rois, *geometry))
        return
    indices, weights = _corners(argmax_y, argmax_x, *grad_input.shape[2:])
    weights = torch.where((argmax_y == -1)[..., None], 0, weights)  # no sample was above the start value
    _add_at(grad_input, rois, indices.flatten(2), (grad_output[..., None] * weights).flatten(2))


def _sample_points(
    rois: Tensor,
    bins: tuple[int, int],
    shape: torch.Size,
    spatial_scale: float,
    sampling_ratio: int,
    shift: float,
    least_size: float,
    start_shift: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of RoIs with equally many samples per bin: indices, and y and x of the samples (chunk, *bins, samples).

    Args:
        shape: of the input, (N, C, H, W).
        shift: subtracted from the RoIs' corners, in pixels of the input.
        least_size: of a RoI, in pixels of the input.
        start_shift: (R, 2, *bins), y and x added to the samples of each bin, in units of the RoI's height and width.
    """
    corners = rois[:, 1:] * spatial_scale - shift
    start = corners[:, [1, 0]]
    size = corners[:, [3, 2]] - start
    if least_size:
        size = size.clamp(min=least_size)
    bin_size = size / rois.new_tensor(bins)
    grid = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().clamp(min=0)
    for samples in grid.int().unique(dim=0).tolist():
        same = (grid == grid.new_tensor(samples)).all(1).nonzero()[:, 0]
        per_roi = 4 * shape[1] * bins[0] * bins[1] * max(samples[0] * samples[1], 1)
        for chunk in same.split(max(MAX_SAMPLES // per_roi, 1)):
            axes = []
            for axis in (0, 1):
                step = bin_size[chunk, axis, None, None]
                bin_index = torch.arange(bins[axis], device=rois.device)[:, None]
                sample = torch.arange(samples[axis], device=rois.device) + 0.5
                axes.append(start[chunk, axis, None, None] + bin_index * step + sample * step / samples[axis])
            y = axes[0][:, :, None, :, None].expand(-1, -1, bins[1], -1, samples[1]).flatten(3)
            x = axes[1][:, None, :, None, :].expand(-1, bins[0], -1, samples[0], -1).flatten(3)
            if start_shift is not None:
                moved = start_shift[chunk] * size[chunk, :, None, None]
                y, x = y + moved[:, 0, ..., None], x + moved[:, 1, ..., None]
            yield chunk, y, x


def _corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation at y, x: the indices of the four pixels in a flattened map, and their weights, (..., 4).

    A point up to one pixel outside is moved onto the border; further outside the weights are 0.
    """
    outside = (y < -1) | (y > height) | (x < -1) | (x > width)
    low, high, fraction = [], [], []
    for position, size in ((y, height), (x, width)):
        position = position.clamp(0, size - 1)
        low.append(position.floor().long())
        high.append((low[-1] + 1).clamp(max=size - 1))
        fraction.append(position - low[-1])
    (y_low, x_low), (y_high, x_high), (v, u) = low, high, fraction
    indices = torch.stack([row * width + column for row in (y_low, y_high) for column in (x_low, x_high)], -1)
    weights = torch.stack([(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u], -1)
    return indices, torch.where(outside[..., None], 0, weights)


def _corner_values(input: Tensor, rois: Tensor, indices: Tensor) -> Tensor:
    """The pixels of each RoI's image at `indices` (R, ...), as (R, C, ...)."""
    image = rois[:, 0].long().view(-1, *[1] * (indices.dim() - 1))
    return input.flatten(2)[image, :, indices].movedim(-1, 1)


def _add_at(grad_input: Tensor, rois: Tensor, indices: Tensor, values: Tensor) -> None:
    """Adds `values` (R, C, S) to the pixels at `indices` (R, C or 1, S) of each RoI's image."""
    planes = rois[:, 0].long()[:, None] * grad_input.shape[1] + torch.arange(grad_input.shape[1], device=rois.device)
    flat = planes[..., None] * (grad_input.shape[2] * grad_input.shape[3]) + indices
    total = torch.zeros_like(grad_input, memory_format=torch.contiguous_format)
    grad_input.add_(total.view(-1).index_add_(0, flat.flatten(), values.to(total.dtype).flatten()).view_as(total))


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """The maximum of each bin into `output` and its index in the flattened map, -1 for an empty bin, into `argmax`.

    A RoI without area leaves its part of both as it is.
    """
    height, width = input.shape[2:]
    start = rois[:, 1:3] * spatial_scale
    size = (rois[:, 3:5] + 1) * spatial_scale - start
    for index in (size > 0).all(1).nonzero()[:, 0].tolist():
        inside = []
        for axis, pixels, bins in ((1, height, pooled_height), (0, width, pooled_width)):
            edges = torch.arange(bins + 1, device=rois.device) * (size[index, axis] / bins) + start[index, axis]
            position = torch.arange(pixels, device=rois.device)
            inside.append((position >= edges[:-1, None].floor()) & (position < edges[1:, None].ceil()))
        image = input[rois[index, 0].long()]
        lowest = torch.finfo(input.dtype).min
        in_columns = torch.where(inside[1], image[:, :, None], lowest).max(-1)  # (C, H, bins in width)
        in_rows = torch.where(inside[0][:, :, None], in_columns.values[:, None], lowest).max(2)
        column = in_columns.indices.gather(1, in_rows.indices)
        empty = ~(inside[0].any(1)[:, None] & inside[1].any(1))
        output[index] = torch.where(empty, 0, in_rows.values)
        argmax[index] = torch.where(empty | (in_rows.values == lowest), -1, in_rows.indices * width + column)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds the gradient of RoI pooling to `grad_input`."""
    _add_at(
        grad_input, rois, argmax.long().clamp(min=0).flatten(2), torch.where(argmax == -1, 0, grad_output).flatten(2)
    )


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """RoIAlign whose bins are moved by `offset` (R, 2, *bins), x and y in units of `gamma` times the RoI's size, into
    `output`. `offset` may be empty."""
    for chunk, y, x in _deformed_points(
        input.shape, rois, offset, (pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma
    ):
        indices, weights = _corners(y, x, *input.shape[2:])
        values = _corner_values(input, rois[chunk], indices).mul_(weights[:, None])
        output[chunk] = values.flatten(4).sum(-1) / max(y.shape[-1], 1)


def _deformed_points(
    shape: torch.Size,
    rois: Tensor,
    offset: Tensor,
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    start_shift = gamma * offset.reshape(len(rois), 2, *bins).flip(1) if offset.numel() else None
    return _sample_points(rois, bins, shape, spatial_scale, sampling_ratio, 0.5, 0, start_shift)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Adds the gradients of deformable RoI pooling to `grad_input` and `grad_offset`."""
    height, width = input.shape[2:]
    size = (rois[:, 3:5] - rois[:, 1:3]) * spatial_scale
    for chunk, y, x in _deformed_points(
        input.shape, rois, offset, (pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma
    ):
        if y.shape[-1] == 0:
            continue
        grad = grad_output[chunk] / y.shape[-1]
        indices, weights = _corners(y, x, height, width)
        _add_at(
            grad_input, rois[chunk], indices.flatten(1)[:, None], (grad[..., None, None] * weights[:, None]).flatten(2)
        )
        if not offset.numel():
            continue
        # mmcv's derivative: at the border it extrapolates from the last pixels
        outside = (y < -1) | (y > height) | (x < -1) | (x > width)
        y_low, y_high = indices[..., 0] // width, indices[..., 3] // width
        x_low, x_high = indices[..., 0] % width, indices[..., 3] % width
        v00, v01, v10, v11 = (_corner_values(input, rois[chunk], indices) * grad[..., None, None]).sum(1).unbind(-1)
        by_x = v11 * (y - y_low) + v01 * (y_high - y) + v10 * (y_low - y) + v00 * (y - y_high)
        by_y = v11 * (x - x_low) + v10 * (x_high - x) + v01 * (x_low - x) + v00 * (x - x_high)
        for axis, by in enumerate((by_x, by_y)):
            by = torch.where(outside, 0, by).sum(-1)
            grad_offset.view(len(rois), 2, *by.shape[1:])[chunk, axis] += gamma * size[chunk, axis, None, None] * by


def _precise_pool(input: Tensor, rois: Tensor, bins: tuple[int, int], spatial_scale: float) -> Tensor:
    """The mean of the bilinearly interpolated map over each bin: an integral over y times one over x for each pixel."""
    corners = rois[:, 1:].double() * spatial_scale
    integrals, area = [], corners.new_ones(())
    for axis in (1, 0):
        start = corners[:, axis, None]
        step = (corners[:, axis + 2, None] - start).clamp(min=0) / bins[1 - axis]
        edges = start + step * torch.arange(bins[1 - axis] + 1, device=rois.device)
        distance = (edges[..., None] - torch.arange(input.shape[3 - axis], device=rois.device)).clamp(-1, 1)
        up_to_edge = 0.5 + distance - 0.5 * distance * distance.abs()  # of 1 - |distance|, from -1
        integrals.append(up_to_edge[:, 1:] - up_to_edge[:, :-1])
        area = area * step
    total = input.new_zeros(len(rois), input.shape[1], *bins, dtype=torch.double)
    for index, image in enumerate(rois[:, 0].long().tolist()):
        total[index] = integrals[0][index] @ input[image].double() @ integrals[1][index].T
    area = area[:, :, None, None]
    return torch.where(area > 0, total / torch.where(area > 0, area, 1), 0).to(input.dtype)


def prroi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Precise RoI pooling into `output`."""
    output.copy_(_precise_pool(input, rois, (pooled_height, pooled_width), spatial_scale))


def prroi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds the gradient of precise RoI pooling with respect to its input to `grad_input`."""

    def forward(input: Tensor) -> Tensor:
        return _precise_pool(input, rois, (pooled_height, pooled_width), spatial_scale)

    grad_input.add_(gradients(forward, [torch.zeros_like(grad_input)], grad_output)[0])


def prroi_pool_coor_backward(
    output: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    grad_rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds the gradient of precise RoI pooling with respect to the corners of the RoIs to `grad_rois`."""

    def forward(rois: Tensor) -> Tensor:
        return _precise_pool(input, rois, (pooled_height, pooled_width), spatial_scale)

    grad_rois.add_(gradients(forward, [rois], grad_output)[0])
