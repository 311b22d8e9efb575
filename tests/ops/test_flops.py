"""ops/flops.py against what torch counts in the reference, and `dinat flops` against the published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinat_backbones import DiNAT, NeighborhoodAttention2D, neighborhood_attention_2d, zoo
from dinat_backbones.cli import flops as get_flops
from dinat_backbones.ops.flops import attention_macs, count_macs

ROWS = [*zoo.DETECTION.values(), *zoo.SEGMENTATION.values()]
NEEDS_MMDET = "mmdet and mmseg are not installed: pip install 'dinat_backbones[openmmlab]'"


def tensors(device, height, width, heads=2, head_dim=4, kernel_size=3):
    with torch.device(device):
        span = 2 * kernel_size - 1
        return *(torch.zeros(2, height, width, heads, head_dim) for _ in range(3)), torch.zeros(heads, span, span)


@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (3, 4), (7, 2)])
def test_products_are_those_of_the_reference(kernel_size, dilation):
    """The reference does nothing but what is needed, and torch counts its two products; the bias is a sum there."""
    height, width, heads, head_dim = 14, 17, 2, 4
    query, key, value, _ = tensors("cpu", height, width, heads, head_dim)
    with FlopCounterMode(display=False) as counter:
        neighborhood_attention_2d(query, key, value, kernel_size=kernel_size, dilation=dilation, backend="reference")
    products = counter.get_total_flops() // 2
    assert products == attention_macs(2 * height * width, heads, head_dim, kernel_size, bias=False)
    bias = attention_macs(2 * height * width, heads, head_dim, kernel_size) - products
    assert bias == 2 * height * width * heads * kernel_size**2


@pytest.mark.parametrize("bias", [False, True])
def test_op_on_meta_tensors(bias):
    query, key, value, rpb = tensors("meta", 9, 11)

    def call():
        return neighborhood_attention_2d(query, key, value, rpb if bias else None, kernel_size=3, dilation=3)

    assert call().shape == query.shape and call().is_meta
    assert count_macs(call) == 2 * 9 * 11 * 2 * 9 * (4 + 4 + bias)
    with FlopCounterMode(display=False) as counter:  # the formula is known to torch's own counter
        call()
    assert counter.get_total_flops() == 2 * count_macs(call)


def test_padding_counts():
    """A map smaller than kernel x dilation is attended to in its padded size, and projected in its own."""
    with torch.device("meta"):
        layer = NeighborhoodAttention2D(8, num_heads=2, kernel_size=3, dilation=4).eval()
        macs = count_macs(layer, torch.empty(1, 5, 20, 8))
    padded, own = 12 * 20, 5 * 20
    assert macs == padded * 8 * 24 + attention_macs(padded, 2, 4, 3) + own * 8 * 8


def test_layer_norm_costs_five():
    with torch.device("meta"):
        assert count_macs(torch.nn.LayerNorm(8), torch.empty(3, 7, 8)) == 5 * 3 * 7 * 8


def test_backbone_on_meta_agrees_with_the_reference():
    shape = dict(embed_dim=8, depths=[2, 1], num_heads=[1, 2], kernel_size=3, dilations=[[1, 4], [2]], mlp_ratio=2.0)
    counts = []
    for device, backend in (("cpu", "reference"), ("meta", None)):
        with torch.device(device):
            counts.append(count_macs(DiNAT(**shape, backend=backend).eval(), torch.zeros(1, 3, 40, 56)))
    # queries x heads: the second block pads its 10 x 14 map to 12 x 14, the third its 5 x 7 map to 6 x 7
    queries = 10 * 14 + 12 * 14 + 6 * 7 * 2
    assert counts[1] - counts[0] == queries * 9  # the bias, which the reference adds rather than multiplies


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_parameters_and_macs(row):
    for package in ("mmdet", "mmseg"):
        pytest.importorskip(package, reason=NEEDS_MMDET)
    counted = get_flops.count(row.name)
    assert round(counted.params / 1e6) == row.params_m
    assert counted.macs / 1e9 == pytest.approx(row.gmacs, rel=0.002)
    assert counted.failures == []


# Published with fewer parameters than the rounded ones: see PARAMS_M in the tool.
NOT_ROUNDED = {"dinat_large": 201, "dinat_large_384": 201, "dinat_large_384_11x11": 201, "vitrpb_base": 87}


@pytest.mark.parametrize("row", zoo.CLASSIFICATION.values(), ids=lambda row: row.name)
def test_published_parameters_and_macs_of_classifiers(row):
    counted = get_flops.count(row.name)
    assert counted.size == (row.resolution, row.resolution)
    assert round(counted.params / 1e6) == NOT_ROUNDED.get(row.name, row.params_m)
    assert abs(counted.params / 1e6 - row.params_m) < 1.2
    assert counted.macs / 1e9 == pytest.approx(row.gmacs, rel=0.01)
    assert counted.failures == []


def test_all_rows_with_a_config_and_all_classifiers_are_counted():
    assert len(get_flops.NAMES) == 22 + len(get_flops.CONFIGS) >= 22 + 34


def test_differences_are_reported():
    row = zoo.DETECTION["mask_rcnn_dinat_mini"]
    wrong = get_flops.Count(row.name, row, params=41_000_000, macs=226_000_000_000, size=(1280, 800))
    assert wrong.failures == ["41.00 M parameters do not round to 40 M", "226.0 G is +0.44% from 225 G"]
    row = zoo.CLASSIFICATION["dinat_large"]
    wrong = get_flops.Count(row.name, row, params=200_000_000, macs=31_000_000_000, size=(224, 224))
    assert wrong.failures == ["200.00 M parameters do not round to 201 M", "31.0 G is +1.31% from 30.6 G"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mask_rcnn_dinat_minni"], "mask_rcnn_dinat_minni is neither a config file nor one of: nat_mini, "),
        ([], "give either models or --all"),
        (["mask_rcnn_dinat_mini", "--all"], "give either models or --all"),
        (["mask_rcnn_dinat_mini", "--size", "160", "-1"], "'-1': expected a whole number of at least 1"),
        (["mask_rcnn_dinat_mini", "--size", "160", "0"], "'0': expected a whole number of at least 1"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        get_flops.main(arguments)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
