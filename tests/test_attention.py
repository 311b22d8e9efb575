"""The module around the op: padding, cropping, dropout, attention maps."""

import contextlib
from types import MethodType

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dinat_backbones import NeighborhoodAttention2D
from dinat_backbones.ops.backends import reference
from helpers import EVERYWHERE, assert_near


def module(dim=16, heads=2, kernel_size=7, dilation=1, **kwargs):
    torch.manual_seed(0)
    attention = NeighborhoodAttention2D(dim, heads, kernel_size, dilation, **kwargs)
    if attention.rpb is not None:
        torch.nn.init.normal_(attention.rpb)
    torch.nn.init.normal_(attention.proj.bias)
    return attention


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 30), (13, 14), (14, 13), (14, 14), (20, 9)])
def test_small_maps_attend_to_the_padding(height, width, backend):
    """Written out: padded keys and values are the bias of qkv; the golden networks hold the same numbers."""
    attention = module(kernel_size=7, dilation=2, backend=backend)
    x = torch.randn(2, height, width, 16, requires_grad=True)
    got = attention(x)
    assert got.shape == x.shape

    padded_height, padded_width = max(height, 14), max(width, 14)
    qkv = attention.qkv.bias.view(3, 2, 8).expand(2, padded_height, padded_width, 3, 2, 8).clone()
    qkv[:, :height, :width] = (x @ attention.qkv.weight.T + attention.qkv.bias).view(2, height, width, 3, 2, 8)
    weights = reference.weights(qkv[..., 0, :, :], qkv[..., 1, :, :], attention.rpb, 7, 2, 8**-0.5)
    out = reference.apply_weights(weights, qkv[..., 2, :, :], 7, 2)[:, :height, :width]
    expected = attention.proj(out.flatten(-2))
    assert torch.allclose(got, expected, atol=1e-5)

    parameters = [x, *attention.parameters()]
    grad_out = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, parameters, grad_out), torch.autograd.grad(expected, parameters, grad_out), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_has_the_size_of_the_padded_map(gradients):
    attention, x = module(kernel_size=7, dilation=3), torch.randn(2, 10, 30, 16)
    padded, found = [], []
    for hooked in (False, True):
        if hooked:
            attention.qkv.register_forward_hook(lambda module, inputs, out: padded.append(tuple(out.shape)))
        with torch.set_grad_enabled(gradients), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
            attention(x)
        shapes = [shape for event in run.key_averages(group_by_input_shape=True) for shape in event.input_shapes]
        found.append(any(shape[:1] == [2 * 21 * 30] or shape[:3] == [2, 21, 30] for shape in shapes))
    assert padded == [(2, 21, 30, 48)]  # who watches sees the padded map
    assert found == [False, True]


def _sigmoid_of_linear(self, x):
    return (x @ self.weight.T + self.bias).sigmoid()


class _SigmoidAfterLinear(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out.sigmoid() if function is F.linear and len(args[1]) == 48 else out


def _replace(owner, function):
    return lambda layer, patch: patch.setattr(owner or layer, "forward", function(layer), raising=False)


CHANGES = {
    "module": lambda layer, patch: torch.nn.Sequential(layer, torch.nn.Sigmoid()),
    "parametrization": lambda layer, patch: torch.nn.utils.parametrizations.weight_norm(layer),
    "function in the instance": _replace(None, lambda layer: lambda x: _sigmoid_of_linear(layer, x)),
    "method in the instance": _replace(None, lambda layer: MethodType(_sigmoid_of_linear, layer)),
    "method in the class": _replace(torch.nn.Linear, lambda layer: _sigmoid_of_linear),
    "function of torch": lambda layer, patch: patch.setattr(F, "linear", lambda x, w, b=None: (x @ w.T + b).sigmoid()),
    "mode": lambda layer, patch: None,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
def test_projections_of_another_kind_see_the_padding(kind, compiled, monkeypatch):
    """What they make of zeros need not be a bias."""
    attention, x = module(kernel_size=5, dilation=2), torch.randn(2, 4, 12, 16)
    attention.qkv = CHANGES[kind](attention.qkv, monkeypatch) or attention.qkv
    with _SigmoidAfterLinear() if kind == "mode" else contextlib.nullcontext():
        _compare_with_padding_before(attention, x, compiled)


def _compare_with_padding_before(attention, x, compiled):
    qkv = attention.qkv(F.pad(x, (0, 0, 0, 0, 0, 6))).unflatten(-1, (3, 2, 8))
    weights = reference.weights(qkv[..., 0, :, :], qkv[..., 1, :, :], attention.rpb, 5, 2, 8**-0.5)
    out = reference.apply_weights(weights, qkv[..., 2, :, :], 5, 2)[:, :4]
    torch.compiler.reset()
    got = (torch.compile(attention, backend="aot_eager") if compiled else attention)(x)
    assert_near([got], [attention.proj(out.flatten(-2))])


def test_a_cropped_map_is_projected_in_one_product():
    # of a map that is not contiguous, torch multiplies each row by a copy of the weight
    layer = NeighborhoodAttention2D(16, 2, kernel_size=5, dilation=3).eval()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:  # with gradients: see mlp.linear
        layer(torch.randn(1, 9, 10, 16))
    called = {event.key: event.count for event in recorded.key_averages()}
    assert called["aten::addmm"] == 2 and "aten::bmm" not in called, called  # qkv and proj


def test_dense_attention_where_the_window_is_the_map():
    """With K = H = W every query sees everything: plain attention with the bias laid out by relative position."""
    attention = module(kernel_size=7)
    x = torch.randn(1, 7, 7, 16)
    query, key, value = attention.qkv(x).view(1, 49, 3, 2, 8).permute(2, 0, 3, 1, 4)
    position = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    relative = position[None] - position[:, None] + 6
    bias = attention.rpb[:, relative[..., 0], relative[..., 1]]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    expected = attention.proj(out.transpose(1, 2).reshape(1, 7, 7, 16))
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_attention_maps():
    attention = module(kernel_size=5, dilation=2)
    x = torch.randn(2, 8, 13, 16)
    out, maps = attention(x, return_attention=True)
    assert maps.shape == (2, 8, 13, 2, 5, 5)
    assert torch.allclose(maps.sum((-1, -2)), torch.ones(()), atol=1e-6)
    assert torch.allclose(out, attention(x), atol=1e-5)


def test_attention_dropout():
    attention = module(attn_drop=0.5)
    x = torch.randn(1, 9, 9, 16)
    assert torch.equal(attention.eval()(x), attention(x))
    attention.train()
    assert not torch.allclose(attention(x), attention(x))
    # unbiased: the mean over many draws is the output without dropout
    mean = torch.stack([attention(x) for _ in range(200)]).mean(0)
    assert (mean - attention.eval()(x)).abs().max() < 0.2


def test_without_bias():
    attention = module(rel_pos_bias=False)
    assert "rpb" not in attention.state_dict()
    with_zeros = module()
    with_zeros.load_state_dict({**attention.state_dict(), "rpb": torch.zeros(2, 13, 13)})
    x = torch.randn(1, 9, 9, 16)
    assert torch.allclose(attention(x), with_zeros(x), atol=1e-6)


def test_qk_scale():
    attention, scaled = module(), module(qk_scale=0.1)
    with torch.no_grad():  # the same product of query and key
        attention.qkv.weight[:16] *= 0.1 / 8**-0.5
        attention.qkv.bias[:16] *= 0.1 / 8**-0.5
    x = torch.randn(1, 9, 9, 16)
    assert torch.allclose(attention(x), scaled(x), atol=1e-5)


def test_autocast_keeps_gradients_finite():
    attention = module(dim=64)
    x = torch.randn(1, 15, 17, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
    assert attention.rpb.grad.dtype == torch.float32
    exact = attention(x)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=16, num_heads=3), "dim=16 is not a multiple of num_heads=3"),
        (dict(dim=16, num_heads=0), "num_heads=0"),
        (dict(kernel_size=4), "kernel_size=4: expected an odd"),
        (dict(dilation=0), "dilation=0: expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(**(dict(dim=16, num_heads=2, kernel_size=7) | arguments))


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_activation_checkpointing(backend):
    """The same gradients, whatever computes them."""
    module = NeighborhoodAttention2D(8, 2, 3, 2, backend=backend)
    x = torch.randn(1, 7, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x).square().sum(), inputs)
    got = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), inputs)
    assert_near(got, expected, 1e-5)
