"""FLOP counters of torch, mmengine, mmdet and fvcore on models with the op, against `count_macs`."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinat_backbones import DiNAT, neighborhood_attention_2d
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.flops import count_macs
from helpers import ROOT, environment

SHAPE = dict(embed_dim=32, depths=[2, 1], num_heads=[1, 2], kernel_size=7, dilations=[[1, 2], [1]], mlp_ratio=2.0)
CPU_KERNEL = pytest.mark.skipif(
    bool(BACKENDS["cpu"].unsupported([torch.zeros(1, 3, 3, 1, 8)] * 3, None, 3, 1, 1.0)), reason="no compiled kernel"
)


@CPU_KERNEL
@pytest.mark.parametrize("bias", [False, True])
def test_backward_is_counted_as_that_of_torchs_attention(bias):
    """The formula of torch for its fused attention, each query with K * K keys."""
    flops = pytest.importorskip("torch.utils.flop_counter")
    height, width, heads, dim, kernel_size = 14, 17, 2, 4, 3
    inputs = [torch.randn(2, height, width, heads, dim, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(heads, 5, 5, requires_grad=True) if bias else None
    with FlopCounterMode(display=False) as counter:
        out = neighborhood_attention_2d(*inputs, rpb, kernel_size=kernel_size, backend="cpu")
        forward = counter.get_total_flops()
        out.sum().backward()
    queries, keys = (2 * height * width, heads, 1, dim), (2 * height * width, heads, kernel_size**2, dim)
    expected = flops.sdpa_backward_flop_count(queries, queries, keys, keys)
    of_bias = 2 * 2 * height * width * heads * kernel_size**2
    assert forward == flops.sdpa_flop_count(queries, keys, keys) + bias * of_bias
    assert counter.get_total_flops() - forward == expected + bias * 2 * of_bias


@CPU_KERNEL
def test_torchs_counter_on_a_backbone():
    """Forward and backward; without the backward formula a third would be missing."""
    model, image = DiNAT(**SHAPE), torch.randn(1, 3, 64, 96)
    with FlopCounterMode(display=False) as counter:
        outs = model(image)
    norms = 5 * sum(module_elements for module_elements in norm_elements(model, image))
    assert counter.get_total_flops() / 2 + norms == pytest.approx(count_macs(model.eval(), image), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        sum(out.sum() for out in outs).backward()
    assert any("na2d_cpu_backward" in str(op) for op in counter.get_flop_counts()["Global"])


def norm_elements(model, image):
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, inputs, output: found.append(output.numel()))
    with torch.no_grad():
        model(image)
    return found


@CPU_KERNEL
@pytest.mark.parametrize("gradients", [False, True])
def test_mmengine(gradients):
    analysis = pytest.importorskip("mmengine.analysis", reason="mmengine is not installed")
    import dinat_backbones.adapters.openmmlab  # noqa: F401

    model, image = DiNAT(**SHAPE).eval(), torch.randn(1, 3, 224, 320)
    with torch.set_grad_enabled(gradients):
        counted = analysis.get_model_complexity_info(model, inputs=image, show_table=False, show_arch=False)
    assert counted["flops"] == pytest.approx(count_macs(model, image), rel=0.01)
    assert counted["params"] == sum(parameter.numel() for parameter in model.parameters())


@CPU_KERNEL
def test_fvcore():
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import dinat_backbones.adapters.detectron2  # noqa: F401

    model, image = DiNAT(**SHAPE).eval(), torch.randn(1, 3, 224, 320)
    assert fvcore.FlopCountAnalysis(model, image).total() == pytest.approx(count_macs(model, image), rel=0.01)


GET_FLOPS = """
import argparse, runpy, sys
from pathlib import Path
import mmdet, torch
path, config = Path(mmdet.__file__).parent / ".mim/tools/analysis_tools/get_flops.py", sys.argv[1]
script = runpy.run_path(str(path))
result = script["inference"](argparse.Namespace(config=config, num_images=1, cfg_options=None), None)
from mmengine.config import Config
from dinat_backbones.ops.flops import count_macs
model = script["MODELS"].build(Config.fromfile(config).model).eval()
print(result["flops"], count_macs(model, torch.zeros(1, 3, *result["pad_shape"])))
"""
RETINANET = """
_base_ = "{root}/configs/demo/mask-rcnn_dinat_shapes.py"
model = dict(
    _delete_=True,
    type="RetinaNet",
    data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
    backbone=dict(type="DiNAT", embed_dim=32, depths=[1, 2, 2], num_heads=[1, 2, 4], mlp_ratio=2.0),
    neck=dict(type="FPN", in_channels=[32, 64, 128], out_channels=32, num_outs=3),
    bbox_head=dict(type="RetinaHead", num_classes=3, in_channels=32, stacked_convs=1, feat_channels=32,
                   anchor_generator=dict(type="AnchorGenerator", ratios=[1.0], scales=[4], strides=[4, 8, 16])))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root="{data}/"))
"""


@CPU_KERNEL
def test_mmdets_get_flops(tmp_path):
    """mmdet's own script, on a config with the adapter among its custom_imports."""
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from dinat_backbones.cli import shapes

    shapes.main([str(tmp_path / "shapes"), "--train", "1", "--val", "1"])
    config = tmp_path / "config.py"
    config.write_text(RETINANET.format(root=ROOT, data=tmp_path / "shapes"))
    done = subprocess.run(
        [sys.executable, "-c", GET_FLOPS, str(config)],
        capture_output=True, text=True, env=environment(ROOT), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = done.stdout.split()[-2:]
    assert theirs.endswith("G") and float(theirs[:-1]) * 1e9 == pytest.approx(int(ours), rel=0.01)
