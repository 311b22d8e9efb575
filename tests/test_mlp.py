"""The MLP and its linear layers on a CPU: what is computed differently gives the same, and nobody is passed over."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinat_backbones import DiNAT, mlp
from helpers import SMALL, assert_near


@pytest.fixture
def fused(monkeypatch):
    """Calls of oneDNN's linear layer: what follows each."""
    if mlp._LINEAR_POINTWISE is None:
        pytest.skip("this machine or build of torch has no linear layer of oneDNN")
    calls, function = [], mlp._LINEAR_POINTWISE

    def counted(x, weight, bias, after, *others):
        calls.append(after)
        return function(x, weight, bias, after, *others)

    monkeypatch.setattr(mlp, "_LINEAR_POINTWISE", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 24), (1, 24), (3, 24)])
def test_fused_linear(fused, shape, gelu, bias):
    layer, x = torch.nn.Linear(24, 40, bias=bias), 2 * torch.randn(shape)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    expected = torch.nn.functional.gelu(expected) if gelu else expected
    with torch.no_grad():
        assert_near([mlp.linear(layer, x, gelu=gelu)], [expected], 1e-6)
        assert fused == ["gelu" if gelu else "none"]
        assert_near([mlp.linear(layer, x.transpose(0, -2).contiguous().transpose(0, -2), gelu=gelu)], [expected], 1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            half = mlp.linear(layer, x, gelu=gelu)
        assert half.dtype == torch.bfloat16
        assert_near([half], [expected], 1e-2)
    assert not mlp.linear(layer, x[:0], gelu=gelu).numel()


def test_model_fuses_all_its_linear_layers(fused):
    model, image = DiNAT(**SMALL).eval(), torch.randn(1, 3, 40, 50)
    expected = [out.detach() for out in model(image)]
    assert not fused  # gradients are on
    with torch.inference_mode():
        assert_near(model(image), expected)
    blocks = sum(SMALL["depths"])
    assert sorted(fused) == sorted(["none", "none", "gelu", "none"] * blocks)


def test_what_watches_a_linear_layer_is_not_passed_over(fused):
    layer, x, seen = torch.nn.Linear(8, 8), torch.randn(4, 8), []

    class Other(torch.nn.Linear):
        pass

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, x):
            return mlp.linear(self.layer, x, gelu=True)

    with torch.no_grad():
        handle = layer.register_forward_hook(lambda *call: seen.append(call))
        mlp.linear(layer, x)
        handle.remove()
        mlp.linear(Other(8, 8), x)
        mlp.linear(layer.double(), x.double())
        torch.vmap(lambda row: mlp.linear(layer, row))(x.double())
        torch.func.jvp(lambda row: mlp.linear(layer, row), (x.double(),), (x.double(),))
        assert "gelu" in str(torch.jit.trace(Net(), x, check_trace=False).graph)
        assert "gelu" in torch.fx.symbolic_trace(Net()).code
    mlp.linear(layer.float(), x).sum().backward()
    assert len(seen) == 1 and layer.weight.grad is not None
    assert not fused


def test_what_onednn_would_not_check_goes_to_torch(fused, monkeypatch):
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    strided, expanded, scalar, meta = (torch.nn.Linear(8, 8) for _ in range(4))
    strided.bias = torch.nn.Parameter(torch.randn(16)[::2])
    expanded.bias = torch.nn.Parameter(torch.randn(1).expand(8))
    scalar.bias = torch.nn.Parameter(torch.randn(1))
    with torch.no_grad():
        for module in (strided, expanded, scalar):
            assert torch.equal(mlp.linear(module, x), module(x))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            mlp.linear(layer, x[:, :7])
        with pytest.raises((RuntimeError, NotImplementedError)):
            mlp.linear(meta.to("meta"), x)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            mlp.linear(layer, x.long())
        with torch.backends.mkldnn.flags(enabled=False):
            mlp.linear(layer, x)
        with torch.device("cpu"):  # a mode that sees functions of torch
            mlp.linear(layer, x)
        monkeypatch.setattr(layer, "forward", lambda x: "replaced", raising=False)
        assert mlp.linear(layer, x) == "replaced"
    assert not fused


def test_counters_of_flops_see_fused_layers():
    model, image = DiNAT(**SMALL).eval(), torch.randn(1, 3, 40, 50)
    counts = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            model(image)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("gradients", [True, False])
def test_hooked_or_replaced_layers_of_the_mlp_see_whole_maps(monkeypatch, gradients):
    monkeypatch.setattr(mlp, "LARGE_BYTES", 0)
    monkeypatch.setattr(mlp, "PIECE_BYTES", 1)
    x, shapes = torch.randn(2, 5, 7, 16), []

    def hook(module, inputs, *output):
        shapes.append(tuple(inputs[0].shape))

    class Recorder(torch.nn.Linear):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return super().forward(x)

    def replace(module):
        module.fc1 = Recorder(16, 32)

    watch = [
        (lambda module: module.fc1.register_forward_hook(hook), [(2, 5, 7, 16)]),
        (lambda module: module.fc2.register_forward_pre_hook(hook), [(2, 5, 7, 32)]),
        (lambda module: module.drop.register_forward_hook(hook), [(2, 5, 7, 32), (2, 5, 7, 16)]),
        (replace, [(2, 5, 7, 16)]),
    ]
    for start, expected in watch:
        module = mlp.Mlp(16, 32, drop=0.0).eval()
        start(module)
        with torch.set_grad_enabled(gradients):
            assert module(x).shape == x.shape
        assert shapes == expected
        shapes.clear()
    module = mlp.Mlp(16, 32, drop=0.0).eval()
    handle = torch.nn.modules.module.register_module_forward_hook(hook)  # of all modules
    try:
        with torch.set_grad_enabled(gradients):
            module(x)
    finally:
        handle.remove()
    assert set(shapes) == {(2, 5, 7, 16), (2, 5, 7, 32)}


# ---- training on a CPU


def saved_for_backward(function):
    """What `function` returns, and the shapes of the tensors that autograd keeps for its gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return out, list(kept.values())


def linear_of_gelu_in_float64(layer, hidden):
    tensors = [hidden, layer.weight, *([] if layer.bias is None else [layer.bias])]
    hidden, weight, *bias = (tensor.detach().double().requires_grad_() for tensor in tensors)
    hidden_of_gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    out = hidden_of_gelu @ weight.T
    return out + bias[0] if bias else out, [hidden, weight, *bias]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 24), (3, 24), (1, 24)])
@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_linear_of_gelu(shape, bias, precision, tolerance):
    layer, hidden = torch.nn.Linear(24, 40, bias=bias), (2 * torch.randn(shape)).to(precision).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        out, kept = saved_for_backward(lambda: mlp.linear_of_gelu(layer, hidden))
    assert out.dtype == precision
    assert sorted(kept) == sorted([(hidden.numel() // 24, 24), (40, 24)])  # and not GELU
    expected, inputs = linear_of_gelu_in_float64(layer, hidden)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, [hidden, *layer.parameters()], grad.to(precision))
    assert_near([out, *gradients], [expected, *torch.autograd.grad(expected, inputs, grad)], tolerance)


def test_second_derivatives_of_linear_of_gelu():
    layer, hidden = torch.nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *_: mlp.linear_of_gelu(layer, hidden), (hidden, *layer.parameters()))
    assert torch.autograd.gradcheck(lambda *_: mlp.linear_of_gelu(layer, hidden), (hidden, *layer.parameters()))


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_linear_of_gelu_where_something_is_frozen(frozen):
    layer, hidden = torch.nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    tensors = dict(hidden=hidden, weight=layer.weight, bias=layer.bias)
    tensors.pop(frozen).requires_grad_(False)
    expected = torch.autograd.grad(layer(torch.nn.functional.gelu(hidden)).square().sum(), tuple(tensors.values()))
    assert_near(
        torch.autograd.grad(mlp.linear_of_gelu(layer, hidden).square().sum(), tuple(tensors.values())), expected
    )


def test_training_keeps_one_hidden_layer_of_each_mlp():
    module, x = mlp.Mlp(16, 48, drop=0.0).train(), torch.randn(2, 5, 7, 16, requires_grad=True)
    _, kept = saved_for_backward(lambda: module(x))
    assert kept.count((2, 5, 7, 48)) + kept.count((70, 48)) == 1, kept
    with_dropout = mlp.Mlp(16, 48, drop=0.5).train()
    out, kept = saved_for_backward(lambda: with_dropout(x))
    assert kept.count((2, 5, 7, 48)) + kept.count((70, 48)) > 1 and (out == 0).float().mean() > 0.3


def test_the_result_of_an_mlp_can_be_changed_in_place():
    module, x = mlp.Mlp(8, 16, drop=0.0), torch.randn(2, 3, 8, requires_grad=True)
    changed = torch.autograd.grad(module(x).mul_(2).sum(), x)
    assert_near(changed, torch.autograd.grad(2 * module(x).sum(), x))


def test_batched_gradients_and_vectors():
    module, x = mlp.Mlp(8, 16, drop=0.0), torch.randn(4, 8, requires_grad=True)
    out, grads = module(x), torch.randn(3, 4, 8)
    expected = torch.stack([torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads])
    assert_near(torch.autograd.grad(out, x, grads, retain_graph=True, is_grads_batched=True), [expected])
    vectorized = torch.func.vmap(lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0])(grads)
    assert_near([vectorized], [expected])
    rows = [torch.autograd.grad(module(row).sum(), row)[0] for row in x.detach().requires_grad_()]
    assert_near(rows, torch.autograd.grad(module(x).sum(), x)[0])
