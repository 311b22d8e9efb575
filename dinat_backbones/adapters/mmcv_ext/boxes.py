"""Non-maximum suppression with the arguments of mmcv's compiled functions."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .torchvision_ops import torchvision_ops

OPERATORS = ("nms", "softnms", "nms_match")


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept, by falling score: a box goes if its IoU with a better one exceeds `iou_threshold`.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        offset: 0 or 1, added to widths and heights.
    """
    threshold = float(np.float32(iou_threshold))  # compiled mmcv compares single precision
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    if offset == 0:
        return torchvision_ops().nms(boxes, scores, threshold)
    groups = _suppress(boxes, scores, lambda iou: iou > np.float32(threshold), offset)
    return torch.tensor([best for best, _ in groups], dtype=torch.long, device=boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For each box that non-maximum suppression keeps, its index and those of the boxes it suppresses (IoU of at least
    `iou_threshold`), both by falling score.

    Args:
        dets: (N, 5) as x1, y1, x2, y2, score.
    """
    groups = _suppress(dets[:, :4], dets[:, 4], lambda iou: iou >= np.float32(iou_threshold), 0)
    return [[int(best), *map(int, suppressed)] for best, suppressed in groups]


def _suppress(boxes: Tensor, scores: Tensor, overlaps, offset: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each box kept, with the boxes that it suppresses."""
    order = scores.sort(0, descending=True)[1].cpu().numpy()
    corners = boxes.detach().cpu().numpy()[order]
    areas = _areas(corners, offset)
    left = np.arange(len(order))
    while len(left):
        best, left = left[0], left[1:]
        suppressed = overlaps(_ious(corners[best], areas[best], corners[left], areas[left], offset))
        yield order[best], order[left[suppressed]]
        left = left[~suppressed]


def _areas(corners: np.ndarray, offset: int) -> np.ndarray:
    return (corners[:, 2] - corners[:, 0] + offset) * (corners[:, 3] - corners[:, 1] + offset)


def _ious(box: np.ndarray, area: np.ndarray, corners: np.ndarray, areas: np.ndarray, offset: int) -> np.ndarray:
    """IoU of one box with many, in the order of operations of mmcv's code: ties at a threshold are broken alike."""
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
    """Soft non-maximum suppression: overlapping boxes lose score instead of being removed at once.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        dets: (N, 5), receives the kept boxes and their new scores in its first rows.
        method: 0 score 0 from `iou_threshold` on, 1 score times 1 - IoU from there on, 2 score times exp(-IoU² / sigma).
        min_score: boxes whose score falls below it are dropped.
        offset: 0 or 1, added to widths and heights.

    Returns the indices of the kept boxes.
    """
    corners = boxes.detach().cpu().numpy()
    areas = _areas(corners, offset)
    # the boxes not yet chosen stand in the order in which mmcv's in-place algorithm has them: it decides between equal scores
    left, score = np.arange(len(corners)), scores.detach().cpu().numpy().copy()
    single = np.float32
    kept: list[int] = []
    rows = dets.numpy()
    while len(left):
        best = int(score.argmax())
        index, value = left[best], score[best]
        rows[len(kept)] = (*corners[index], value)
        kept.append(int(index))
        left[best], score[best] = left[0], score[0]
        left, score = left[1:], score[1:]
        iou = _ious(corners[index], areas[index], corners[left], areas[left], offset)
        if method == 0:
            weight = np.where(iou >= single(iou_threshold), single(0), single(1))
        elif method == 1:
            weight = np.where(iou >= single(iou_threshold), 1 - iou, single(1))
        else:
            exponent = -(iou * iou) / single(sigma)
            weight = np.exp(exponent.astype(np.float64)).astype(iou.dtype)
        score = score * weight
        dropped = score < single(min_score)
        count = len(left) - int(dropped.sum())
        holes, fillers = np.flatnonzero(dropped[:count]), count + np.flatnonzero(~dropped[count:])[::-1]
        left[holes], score[holes] = left[fillers], score[fillers]
        left, score = left[:count], score[:count]
    return torch.tensor(kept, dtype=torch.long)
