"""The backbones under torch.compile: the eager results, one graph for all sizes, and maps stored as they are read."""

import re

import pytest
import torch

from dinat_backbones import DiNAT, DiNAT_s, NeighborhoodAttention2D, layers
from helpers import SMALL, assert_near, fill_by_name


def test_compile_fullgraph():
    model, x = fill_by_name(DiNAT(**SMALL, dilations=[[2], [1, 2]])).eval(), torch.randn(1, 3, 33, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), model(x))


@pytest.mark.parametrize("family, with_cp", [(DiNAT, False), (DiNAT_s, True)])
def test_one_graph_for_all_sizes(family, with_cp):
    """dynamic=True: maps larger and smaller than kernel size x dilation, along either axis, share one graph."""
    testing = pytest.importorskip("torch._dynamo.testing")
    if torch.__version__ < "2.7":
        pytest.skip(f"torch {torch.__version__} compiles per size: its dynamic shapes are younger")
    torch.compiler.reset()
    small = SMALL | dict(depths=[1, 1], dilations=[[7], [5]], drop_path_rate=0.0)
    model = fill_by_name(family(**small, with_cp=with_cp)).train()
    counter = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for height, width in ((97, 131), (60, 160), (193, 50), (70, 71)):
        x = torch.randn(5, 3, height, width)  # torch itself branches on the size of smaller convolutions
        results = []
        for network in (compiled, model):
            outs = network(x)
            gradients = torch.autograd.grad(sum(out.square().mean() for out in outs), tuple(model.parameters()))
            results.append([*outs, *gradients])
        assert_near(*results)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_small_map(strict):
    attention, x = NeighborhoodAttention2D(16, 2, kernel_size=5, dilation=3).eval(), torch.randn(2, 9, 20, 16)
    program = torch.export.export(attention, (x,), strict=strict)
    assert_near([program.module()(x)], [attention(x)])


def test_small_maps_are_not_padded_by_the_graph():
    if torch.__version__ < "2.7":
        pytest.skip(f"dynamo of torch {torch.__version__} cannot tell whether a layer was changed")
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    attention, x = NeighborhoodAttention2D(16, 2, kernel_size=5, dilation=3), torch.randn(2, 9, 20, 16)
    assert_near([torch.compile(attention, fullgraph=True, backend=record)(x)], [attention(x)])
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and not any("pad" in name for name in called), called


def test_inductor_trains_convolutions_at_open_sizes():
    if torch.__version__ < "2.7":
        pytest.skip(f"torch {torch.__version__} compiles per size: its dynamic shapes are younger")
    torch.compiler.reset()
    tokenizer = layers.ConvTokenizer(3, 8, torch.nn.LayerNorm)
    model = torch.nn.Sequential(tokenizer, layers.ConvDownsampler(8, torch.nn.LayerNorm))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for height, width in ((99, 114), (86, 125)):
        x = torch.randn(2, 3, height, width)
        results = []
        for function in (compiled, model):
            out = function(x)
            results.append([out, *torch.autograd.grad(out.exp().mean(), tuple(model.parameters()))])
        assert_near(*results)


def test_inductor_keeps_the_channels_of_a_pixel_together():
    """It would store maps with a stride of H between channels, because a convolution follows, and be slow."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    model = fill_by_name(DiNAT(**SMALL | dict(depths=[2, 1]), dilations=[[1, 2], [1]])).train()
    compiled, x = torch.compile(model), torch.randn(2, 3, 44, 60)

    def step(model):
        outs = model(x)
        return [*outs, *torch.autograd.grad(sum(out.square().mean() for out in outs), tuple(model.parameters()))]

    results, code = run_and_get_code(step, compiled)
    assert_near(results, step(model), 1e-4)
    numbers = r"(\d+), (\d+), (\d+), (\d+)"
    buffers = re.findall(rf"empty_strided_cpu\(\({numbers}\), \({numbers}\)", "\n".join(code))
    maps = [buffer for buffer in buffers if buffer[3] in ("16", "32")]  # [B, H, W, C]
    assert all(buffer[7] == "1" for buffer in maps), maps
    assert "empty_strided_cpu((2, 165, 16), (2640, 16, 1)" in "\n".join(code)  # a map of 11 x 15


@pytest.mark.parametrize("wide", [False, True])
def test_compiled_layer_norms_are_called_on_maps_where_someone_can_tell(wide):
    """Hooks of a norm, and norms of more than the channels."""
    norm = torch.nn.LayerNorm((5, 6, 16) if wide else 16)
    attention = NeighborhoodAttention2D(16, 2, 3)
    block = layers.Block(16, 2.0, 0.0, 0.0, lambda dim: norm, None, attention).eval()
    if not wide:
        norm.register_forward_hook(lambda module, inputs, out: out * torch.arange(out.shape[1])[:, None, None])
    x = torch.randn(2, 5, 6, 16)
    torch.compiler.reset()
    assert_near([torch.compile(block, backend="eager")(x)], [block(x)])
