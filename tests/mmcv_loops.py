"""What mmcv's operators compute, as loops over plain numbers."""

import math

import numpy as np


def bilinear(plane, y, x):
    """RoI operators: a point up to one pixel outside lies on the border, further outside it counts as 0."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    return bilinear_of_zeros(plane, y, x)


def bilinear_of_zeros(plane, y, x):
    """Deformable operators, precise RoI pooling: pixels outside are 0."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def roi_align(input, rois, bins, scale, ratio, mode, aligned, offset=None, gamma=0.1):
    """RoIAlign; with `offset` (R, 2, *bins), or an empty one, deformable RoI pooling."""
    output = np.zeros((len(rois), input.shape[1], *bins))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (corner * scale - (0.5 if aligned else 0) for corner in corners)
        size = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1), max(x2 - x1, 1))
        grid = [ratio or max(math.ceil(s / b), 0) for s, b in zip(size, bins, strict=True)]
        for c, i, j in np.ndindex(output.shape[1:]):
            dy, dx = 0.0, 0.0
            if offset is not None and offset.size:
                dx, dy = gamma * size[1] * offset[r, 0, i, j], gamma * size[0] * offset[r, 1, i, j]
            values = [
                bilinear(
                    input[int(image), c],
                    y1 + dy + (i + (a + 0.5) / grid[0]) * size[0] / bins[0],
                    x1 + dx + (j + (b + 0.5) / grid[1]) * size[1] / bins[1],
                )
                for a in range(grid[0])
                for b in range(grid[1])
            ]
            if mode == "max":
                output[r, c, i, j] = max([-10000.0, *values])
            else:
                output[r, c, i, j] = sum(values) / max(len(values), 1)
    return output


def roi_pool(input, rois, bins, scale):
    output = np.zeros((len(rois), input.shape[1], *bins))
    for r, (image, x1, y1, x2, y2) in enumerate(rois):
        edges = []
        for low, high, count, pixels in ((y1, y2, bins[0], input.shape[2]), (x1, x2, bins[1], input.shape[3])):
            start, size = low * scale, (high + 1) * scale - low * scale
            points = [start + size / count * k for k in range(count + 1)] if size > 0 else [0] * (count + 1)
            edges.append(
                [
                    (max(math.floor(points[k]), 0), min(math.ceil(points[k + 1]), pixels)) if size > 0 else (0, 0)
                    for k in range(count)
                ]
            )
        for c, i, j in np.ndindex(output.shape[1:]):
            (top, bottom), (left, right) = edges[0][i], edges[1][j]
            if top < bottom and left < right:
                output[r, c, i, j] = input[int(image), c, top:bottom, left:right].max()
    return output


def precise_roi_pool(input, rois, bins, scale):
    """The mean of the bilinear map over a bin. The mean over a part of one cell is the value in its middle."""
    output = np.zeros((len(rois), input.shape[1], *bins))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (corner * scale for corner in corners)
        height, width = max(y2 - y1, 0) / bins[0], max(x2 - x1, 0) / bins[1]
        if height * width == 0:
            continue
        for c, i, j in np.ndindex(output.shape[1:]):
            top, left = y1 + i * height, x1 + j * width
            total = 0.0
            for row in range(math.floor(top), math.ceil(top + height)):
                for column in range(math.floor(left), math.ceil(left + width)):
                    y = max(top, row), min(top + height, row + 1)
                    x = max(left, column), min(left + width, column + 1)
                    middle = bilinear_of_zeros(input[int(image), c], sum(y) / 2, sum(x) / 2)
                    total += (y[1] - y[0]) * (x[1] - x[0]) * middle
            output[r, c, i, j] = total / (height * width)
    return output


def deformable_convolution(input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups):
    n, channels, height, width = input.shape
    outputs, per_group, kh, kw = weight.shape
    out_h = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    output = np.zeros((n, outputs, out_h, out_w))
    for image, out, h, w in np.ndindex(output.shape):
        for c, i, j in np.ndindex(per_group, kh, kw):
            channel = out // (outputs // groups) * per_group + c
            point = channel // (channels // offset_groups) * kh * kw + i * kw + j
            y = h * stride[0] - padding[0] + i * dilation[0] + offset[image, 2 * point, h, w]
            x = w * stride[1] - padding[1] + j * dilation[1] + offset[image, 2 * point + 1, h, w]
            value = weight[out, c, i, j] * bilinear_of_zeros(input[image, channel], y, x)
            output[image, out, h, w] += value * (1 if mask is None else mask[image, point, h, w])
        output[image, out, h, w] += 0 if bias is None else bias[out]
    return output


def iou(a, b, offset):
    """In single precision and in mmcv's order: a tie at a threshold depends on how it is rounded."""
    one = np.float32(offset)
    area = [(box[2] - box[0] + one) * (box[3] - box[1] + one) for box in (a, b)]
    w = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]) + one)
    h = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]) + one)
    with np.errstate(all="ignore"):
        return w * h / (area[0] + area[1] - w * h)


def nms(boxes, order, threshold, offset):
    """The boxes kept, each with those it suppresses at an IoU above the threshold; a list of lists, best first."""
    groups, left = [], list(order)
    while left:
        best = left[0]
        gone = [i for i in left[1:] if iou(boxes[best], boxes[i], offset) > np.float32(threshold)]
        groups.append([best, *gone])
        left = [i for i in left[1:] if i not in gone]
    return groups


def soft_nms(boxes, scores, threshold, sigma, least, method, offset):
    """The boxes kept and their scores. Without equal scores the order in memory does not matter."""
    score = {i: np.float32(s) for i, s in enumerate(scores)}
    kept = []
    while score:
        best = max(score, key=score.get)
        kept.append((best, score.pop(best)))
        for i in list(score):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                score[i] *= np.float32(math.exp(-(overlap * overlap) / np.float32(sigma)))
            elif overlap >= np.float32(threshold):
                score[i] *= np.float32(1) - overlap if method == "linear" else np.float32(0)
            if score[i] < np.float32(least):
                del score[i]
    return kept


def sigmoid_focal_loss(logits, target, weight, gamma, alpha):
    loss = np.zeros(logits.shape)
    for n, c in np.ndindex(logits.shape):
        p = 1 / (1 + math.exp(-logits[n, c]))
        loss[n, c] = (
            -alpha * (1 - p) ** gamma * math.log(p) if target[n] == c else -(1 - alpha) * p**gamma * math.log(1 - p)
        ) * (1 if weight is None else weight[target[n]])
    return loss


def softmax_focal_loss(logits, target, weight, gamma, alpha):
    loss = np.zeros(len(logits))
    for n, row in enumerate(logits):
        if target[n] >= 0:
            p = math.exp(row[target[n]]) / sum(math.exp(value) for value in row)
            loss[n] = -alpha * (1 - p) ** gamma * math.log(p) * (1 if weight is None else weight[target[n]])
    return loss


def carafe(features, masks, kernel, groups, scale):
    n, channels, height, width = features.shape
    output = np.zeros((n, channels, height * scale, width * scale))
    for image, c, h, w in np.ndindex(output.shape):
        group = c // (channels // groups)
        for i, j in np.ndindex(kernel, kernel):
            y, x = h // scale + i - kernel // 2, w // scale + j - kernel // 2
            if 0 <= y < height and 0 <= x < width:
                output[image, c, h, w] += (
                    features[image, c, y, x] * masks[image, group * kernel**2 + i * kernel + j, h, w]
                )
    return output


def psa_mask(masks, collect, size):
    n, _, height, width = masks.shape
    output = np.zeros((n, height * width, height, width))
    for image, h, w, y, x in np.ndindex(n, height, width, height, width):
        i, j = y - h + (size[0] - 1) // 2, x - w + (size[1] - 1) // 2
        if 0 <= i < size[0] and 0 <= j < size[1]:
            value = masks[image, i * size[1] + j, h, w]
            if collect:
                output[image, y * width + x, h, w] = value
            else:
                output[image, h * width + w, y, x] = value
    return output


def deformable_attention(value, shapes, locations, weights):
    n, _, heads, dim = value.shape
    output = np.zeros((n, locations.shape[1], heads, dim))
    for image, query, head, d in np.ndindex(output.shape):
        start = 0
        for level, (h, w) in enumerate(shapes):
            plane = value[image, start : start + h * w, head, d].reshape(h, w)
            for point in range(locations.shape[4]):
                x, y = locations[image, query, head, level, point]
                sampled = bilinear_of_zeros(plane, y * h - 0.5, x * w - 0.5)
                output[image, query, head, d] += weights[image, query, head, level, point] * sampled
            start += h * w
    return output.reshape(n, locations.shape[1], heads * dim)
