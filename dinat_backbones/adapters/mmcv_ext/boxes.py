"""Overlaps and non-maximum suppression of boxes with the arguments of mmcv's compiled functions.

Boxes are (N, 4) as x1, y1, x2, y2; `offset`, 0 or 1, is added to their widths and heights.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .torchvision_ops import supported, torchvision_ops

OPERATORS = ("bbox_overlaps", "nms", "softnms", "nms_match")


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """IoU (`mode` 0) or intersection over the area of the first box (1) into `ious`.

    Args:
        ious: (len(bboxes1), len(bboxes2)); if `aligned`, (len(bboxes1),) for pairs of boxes.
    """
    first = bboxes1 if aligned else bboxes1[:, None]
    sides = (torch.minimum(first[..., 2:], bboxes2[..., 2:]) - torch.maximum(first[..., :2], bboxes2[..., :2])) + offset
    intersection = sides.clamp(min=0).prod(-1)
    denominator = (first[..., 2:] - first[..., :2] + offset).prod(-1)
    if mode == 0:
        denominator = denominator + (bboxes2[..., 2:] - bboxes2[..., :2] + offset).prod(-1) - intersection
    if bboxes1.is_cuda:
        denominator = denominator.clamp(min=offset)  # as compiled mmcv does on CUDA only
    ious.copy_(intersection / denominator)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept, by descending score; a box whose IoU with a better one exceeds `iou_threshold` is
    dropped.

    Args:
        scores: (N,).
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    threshold = np.float32(iou_threshold)  # compiled mmcv compares in single precision
    if offset == 0:
        # boxes are sorted as mmcv sorts them before torchvision gets them, so that ties have the same order
        order = scores.sort(0, descending=True)[1]
        boxes = boxes if boxes.dtype == torch.double else boxes.float()
        ranks = torch.arange(len(order), 0, -1, dtype=boxes.dtype, device=boxes.device)
        return order[torchvision_ops().nms(boxes[order], ranks, float(threshold))]
    kept = [best for best, _ in _suppress(boxes, scores, lambda iou: iou > threshold, offset)]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For each box that non-maximum suppression keeps, its index and those of the boxes it suppresses (IoU of at least
    `iou_threshold`), by descending score.

    Args:
        dets: (N, 5) as x1, y1, x2, y2, score.
    """
    threshold = np.float32(iou_threshold)
    groups = _suppress(dets[:, :4], dets[:, 4], lambda iou: iou >= threshold, 0)
    return [[best, *suppressed.tolist()] for best, suppressed in groups]


def _suppress(
    boxes: Tensor, scores: Tensor, overlaps: Callable[[np.ndarray], np.ndarray], offset: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The index of each box kept with the indices of the boxes that it suppresses."""
    order = scores.sort(0, descending=True)[1].cpu().numpy()
    corners = supported(boxes)[0].detach().cpu().numpy()[order]
    areas = _areas(corners, offset)
    left = np.arange(len(order))
    while len(left):
        best, left = left[0], left[1:]
        suppressed = overlaps(_ious(corners[best], areas[best], corners[left], areas[left], offset))
        yield int(order[best]), order[left[suppressed]]
        left = left[~suppressed]


def _areas(corners: np.ndarray, offset: int) -> np.ndarray:
    return (corners[:, 2] - corners[:, 0] + offset) * (corners[:, 3] - corners[:, 1] + offset)


def _ious(box: np.ndarray, area: np.ndarray, corners: np.ndarray, areas: np.ndarray, offset: int) -> np.ndarray:
    """IoU of one box with many. The order of operations is mmcv's, for the same rounding of an IoU at the threshold."""
    width = np.minimum(box[2], corners[:, 2]) - np.maximum(box[0], corners[:, 0]) + offset
    height = np.minimum(box[3], corners[:, 3]) - np.maximum(box[1], corners[:, 1]) + offset
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # boxes without area
        return intersection / (area + areas - intersection)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression, where a box loses score by its overlap with better ones; the indices of those kept.

    Args:
        scores: (N,).
        dets: (N, 5) on the CPU; its first rows receive the boxes kept and their new scores.
        method: a score is set to 0 (0) or multiplied by 1 - IoU (1) where the IoU reaches `iou_threshold`, or always
            multiplied by exp(-IoU² / sigma) (2).
        min_score: a box whose score falls below it is dropped.
    """
    corners = boxes.detach().cpu().numpy()
    areas = _areas(corners, offset)
    rows = dets.numpy()
    threshold, sigma, min_score = np.float32(iou_threshold), np.float32(sigma), np.float32(min_score)
    kept: list[int] = []
    # mmcv's algorithm reorders the boxes in place, and that order decides between equal scores
    left, score = np.arange(len(corners)), scores.detach().cpu().numpy().copy()
    while len(left):
        position = 0 if np.isnan(score[0]) else int(np.nanargmax(score))  # NaN as in mmcv's loop
        best = int(left[position])
        rows[len(kept)] = (*corners[best], score[position])
        kept.append(best)
        left[position], score[position] = left[0], score[0]
        left, score = left[1:], score[1:]
        iou = _ious(corners[best], areas[best], corners[left], areas[left], offset)
        if method == 2:
            exponent = -(iou * iou) / sigma
            score *= np.exp(exponent.astype(np.float64)).astype(iou.dtype)
        else:
            score[iou >= threshold] *= (1 - iou[iou >= threshold]) if method == 1 else 0
        dropped = score < min_score
        count = len(left) - int(dropped.sum())
        # each dropped box is replaced by the last one that stays
        gaps, last = np.flatnonzero(dropped[:count]), count + np.flatnonzero(~dropped[count:])[::-1]
        left[gaps], score[gaps] = left[last], score[last]
        left, score = left[:count], score[:count]
    return torch.tensor(kept, dtype=torch.long)
