"""adapters/mmcv_ext on boxes: next to compiled mmcv where there is one and next to loops everywhere."""

import mmcv_loops
import numpy as np
import pytest
import torch

pytest.importorskip("mmcv", reason="mmcv is not installed: pip install 'dinat_backbones[openmmlab]'")

from mmcv_cases import ROUNDS, Case, assert_same, in_use, mmcv, not_compiled, operators, stand_in


def scored_boxes(seed, ties=True):
    """Up to 30 boxes in up to 4 places, with equal scores and IoUs at the thresholds among them."""
    case = Case(seed)
    count = 0 if case.empty else case.integer(1, 30)
    boxes = case.boxes(count, extent=12.0)
    scores = torch.tensor(case.rng.permutation(count) + 1, dtype=torch.float32) / (count + 1)
    if ties and case.choice(True, False):
        scores = (scores * 4).round() / 4
    if not ties:
        scores = torch.tensor(case.rng.random(count), dtype=torch.float32)
    threshold, offset = case.choice(0.1, 0.3, 1 / 3, 0.5, 0.7), case.choice(0, 1)
    return case, boxes, scores, threshold, offset


def test_nms_keeps_the_boxes_of_the_loops():
    for seed in range(ROUNDS):
        _, boxes, scores, threshold, offset = scored_boxes(seed)
        order = scores.sort(0, descending=True)[1]  # as compiled mmcv has it for equal scores
        expected = mmcv_loops.nms(boxes.numpy(), order.tolist(), threshold, offset)
        with operators(stand_in):
            dets, kept = mmcv.ops.nms(boxes, scores, threshold, offset)
        assert kept.tolist() == [group[0] for group in expected], seed
        assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], 1))


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_keeps_the_boxes_of_the_loops(method):
    for seed in range(ROUNDS):
        case, boxes, scores, threshold, offset = scored_boxes(seed, ties=False)
        boxes[:, 2:] += 0.5  # none without area, whose IoU is not a number
        arguments = (threshold, case.choice(0.3, 0.5), case.choice(1e-3, 0.05, 0.3), method, offset)
        expected = mmcv_loops.soft_nms(boxes.numpy(), scores.numpy(), *arguments)
        with operators(stand_in):
            dets, kept = mmcv.ops.soft_nms(boxes, scores, *arguments)
        assert kept.tolist() == [index for index, _ in expected], seed
        assert torch.equal(dets[:, :4], boxes[kept])
        assert_same([dets[:, 4]], [torch.tensor([score for _, score in expected])], 1e-6)


@not_compiled
def test_compiled_mmcv_keeps_the_same_boxes():
    for seed in range(ROUNDS):
        case, boxes, scores, threshold, offset = scored_boxes(seed)
        labels = torch.tensor(case.rng.integers(0, 3, len(boxes)))
        sigma, least, score_threshold = case.choice(0.3, 0.5), case.choice(1e-3, 0.05, 0.3), case.choice(0, 0.3)
        limit = case.choice(-1, 3)
        found = []
        for module in (stand_in, in_use):
            with operators(module):
                calls = [mmcv.ops.nms(boxes, scores, threshold, offset, score_threshold, limit)]
                calls += [
                    mmcv.ops.soft_nms(boxes, scores, threshold, sigma, least, method, offset)
                    for method in ("naive", "linear", "gaussian")
                ]
                if len(boxes):
                    for split in (10000, 5):
                        settings = dict(type="nms", iou_threshold=threshold, split_thr=split, max_num=limit)
                        calls.append(mmcv.ops.batched_nms(boxes, scores, labels, settings))
                    soft = dict(type="soft_nms", iou_threshold=threshold, min_score=least)
                    calls.append(mmcv.ops.batched_nms(boxes, scores, labels, soft))
                matches = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), threshold)
            found.append((calls, [match.tolist() for match in matches]))
        for (got, kept), (expected, expected_kept) in zip(*(calls for calls, _ in found), strict=True):
            assert torch.equal(kept, expected_kept), seed
            assert torch.equal(got.isnan(), expected.isnan())  # scores by the IoU of boxes without area
            assert_same([got.nan_to_num()], [expected.nan_to_num()], 1e-5)
        assert found[0][1] == found[1][1], seed


def test_nms_match_groups_all_boxes():
    for seed in range(ROUNDS):
        _, boxes, scores, threshold, _ = scored_boxes(seed)
        # its comparison includes the threshold itself: the loops exclude it, so the next smaller number is passed
        below = np.nextafter(np.float32(threshold), np.float32(0))
        expected = mmcv_loops.nms(boxes.numpy(), scores.sort(0, descending=True)[1].tolist(), below, 0)
        with operators(stand_in):
            got = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), threshold)
        assert [group.tolist() for group in got] == expected


@pytest.mark.parametrize("aligned", [False, True])
def test_bbox_overlaps(aligned):
    for seed in range(ROUNDS):
        case = Case(seed)
        count = 0 if case.empty else case.integer(1, 8)
        first, second = case.boxes(count), case.boxes(count if aligned else case.integer(1, 8))
        mode, offset = case.choice("iou", "iof"), 1  # no area is 0
        with operators(stand_in):
            got = mmcv.ops.bbox_overlaps(first, second, mode, aligned, offset)
        expected = torch.zeros(got.shape)
        for index in np.ndindex(*got.shape):
            a, b = first[index[0]].double(), second[index[-1]].double()
            sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2]) + offset).clamp(min=0)
            areas = [((box[2:] - box[:2]) + offset).prod() for box in (a, b)]
            whole = areas[0] if mode == "iof" else areas[0] + areas[1] - sides.prod()
            expected[index] = sides.prod() / whole
        assert_same([got], [expected], 1e-5)
