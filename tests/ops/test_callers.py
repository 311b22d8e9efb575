"""The op and its module under other callers: spawned processes, replicas, torch.fx, torch.export."""

import copy
import multiprocessing
import threading

import pytest
import torch

from dinat_backbones import NeighborhoodAttention2D
from helpers import EVERYWHERE, assert_near, output_and_gradients, send_output_and_gradients, taking


def module_and_images(backend, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    module = NeighborhoodAttention2D(16, 2, 3, 2, backend=backend).to(dtype)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return module, torch.randn(batch, 9, 5, 16, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", [None, *taking(torch.float32)])
def test_spawned_process(backend):
    """As data loaders and launchers start them where there is no fork: the module arrives as a pickle."""
    module, images = module_and_images(backend)
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=send_output_and_gradients, args=(end, module, images), daemon=True)
    process.start()
    end.close()
    assert pipe.poll(120), "the process does not answer"
    got = [torch.from_numpy(array) for array in pipe.recv()]
    process.join(30)
    assert process.exitcode == 0
    assert_near(got, output_and_gradients(module, images), 1e-6)


@pytest.mark.parametrize("backend", [None, *taking(torch.float32)])
def test_replicas_in_threads(backend):
    """DataParallel without GPUs: a replica and a part of the batch for each thread, gradients added to one module."""
    module, images = module_and_images(backend)
    expected = output_and_gradients(module, images)
    outputs: dict[int, torch.Tensor] = {}

    def work(index):
        replica = copy.copy(module)  # shares its parameters, as those of DataParallel on one device
        outputs[index] = replica(images[index : index + 1])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out = torch.cat([outputs[index] for index in range(len(images))])
    got = [out.detach(), *torch.autograd.grad(out.square().sum(), list(module.parameters()))]
    assert_near(got, expected, 1e-5)


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, NeighborhoodAttention2D) or super().is_leaf_module(module, qualified_name)


@pytest.mark.parametrize("backend", [None, *EVERYWHERE])
def test_symbolic_trace_with_the_module_as_a_leaf(backend):
    """What the module does depends on the size of the map, which symbolic tracing does not know."""
    module, _ = module_and_images(backend)
    model = torch.nn.Sequential(torch.nn.LayerNorm(16), module, torch.nn.Linear(16, 4))
    graph = LeafTracer().trace(model)
    traced = torch.fx.GraphModule(model, graph)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    for height, width in ((9, 5), (12, 7), (2, 3)):
        x = torch.randn(1, height, width, 16)
        assert torch.equal(traced(x), model(x))
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(module)


@pytest.mark.parametrize("backend", [None, *EVERYWHERE])
def test_graph_of_aten_operations(backend):
    """make_fx, which has sizes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module, images = module_and_images(backend)
    traced = make_fx(module)(images)
    assert_near([traced(2 * images)], [module(2 * images)], 1e-6)


@pytest.mark.parametrize("backend", [None, *EVERYWHERE])
def test_exported_program(tmp_path, backend):
    """The program computes what the module does, also after saving and loading."""
    module, images = module_and_images(backend)
    program = torch.export.export(module.eval(), (images,))
    torch.export.save(program, tmp_path / "module.pt2")
    for again in (program, torch.export.load(tmp_path / "module.pt2")):
        assert_near([again.module()(2 * images)], [module(2 * images)], 1e-5)
