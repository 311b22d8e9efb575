"""ops/backends/natten_backend.py: an installed NATTEN behind our op equals the reference, and says what it cannot do.

The modern stack has a NATTEN without bias, whose CPU path is FlexAttention in eager mode; torch refuses gradients
there, though its own backward works, so that these tests lift the refusal. The classic one has 0.14.6 with bias.
"""

import builtins
import sys
import types

import pytest
import torch

from dinat_backbones import DiNAT, neighborhood_attention_2d
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.backends import natten_backend as natten
from helpers import assert_near, draw, run

NATTEN = BACKENDS["natten"]

# small: FlexAttention in eager mode holds all pairs of pixels
SHAPES = [(9, 11, 7, 1), (7, 7, 7, 1), (17, 16, 5, 3), (21, 23, 3, 7), (19, 13, 13, 1), (14, 19, 7, 2)]


@pytest.fixture
def found(monkeypatch):
    if natten.installed().missing:
        pytest.skip(natten.installed().missing)
    if natten.installed().fused:
        flex = pytest.importorskip("torch.nn.attention.flex_attention")
        monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    return natten.installed()


@pytest.mark.parametrize("height, width, kernel_size, dilation", SHAPES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "packed"])
def test_against_reference(found, height, width, kernel_size, dilation, fused):
    """Forward and every gradient, of strided views, too."""
    has_bias = not found.fused
    tensors, rpb, grad_out = draw(
        2, height, width, 2, 16, kernel_size, rpb=has_bias, dtype=torch.float32, fused=fused, seed=height
    )
    settings = dict(kernel_size=kernel_size, dilation=dilation, scale=0.3)
    expected = run(*[[t.double() for t in tensors], rpb.double() if has_bias else None], grad_out.double(), **settings)
    inputs = [t.detach().requires_grad_() for t in (*tensors, *([rpb] if has_bias else []))]
    out = NATTEN.attention(inputs[:3], inputs[3] if has_bias else None, kernel_size, dilation, 0.3)
    got = [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]
    assert out.shape == tensors[0].shape and out.dtype == torch.float32
    assert_near(got, expected, 1e-5)


def test_old_releases_run_without_bias_too(found):
    if found.fused:
        pytest.skip(f"natten {found.version} never has a bias")
    tensors, _, grad_out = draw(1, 15, 17, 2, 8, 7, rpb=False, dtype=torch.float32)
    settings = dict(kernel_size=7, dilation=2)
    expected = run(tensors, None, grad_out, backend="reference", **settings)
    assert_near(run(tensors, None, grad_out, backend="natten", **settings), expected, 1e-5)


def test_half_precision_is_rounded_once(found):
    """The bias gradient is float32, and the output is as near to the expected as bfloat16 can be."""
    has_bias = not found.fused
    tensors, rpb, _ = draw(1, 20, 23, 2, 16, 7, rpb=has_bias, dtype=torch.bfloat16)
    expected = neighborhood_attention_2d(
        *[t.double() for t in tensors], rpb.double() if has_bias else None, kernel_size=7, backend="reference"
    )
    table = rpb.float().requires_grad_() if has_bias else None
    out = NATTEN.attention(tensors, table, 7, 1, 16**-0.5)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()
    if has_bias:
        assert torch.autograd.grad(out.float().sum(), table)[0].dtype == torch.float32


def test_model_trains_without_bias(found):
    """One step of a whole DiNAT with rel_pos_bias=False through NATTEN has the gradients of our own op."""
    models = []
    for backend in ("natten", "reference"):
        torch.manual_seed(0)
        model = DiNAT(
            embed_dim=16, depths=[1, 2], num_heads=[2, 4], dilations=[[2], [1, 3]], mlp_ratio=2.0, drop_path_rate=0.0,
            rel_pos_bias=False, backend=backend,
        )  # fmt: skip
        models.append(model)
    x = torch.randn(2, 3, 41, 57)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NATTEN, "unsupported", lambda *call: [])
        gradients = []
        for model in models:
            sum(out.square().mean() for out in model(x)).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(gradients[0]) > 30
    # relative to the largest of all: some gradients, as those of the keys' bias, are sums that cancel out
    largest = max(b.abs().max() for b in gradients[1])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * largest


def test_reasons(found):
    def reasons(rpb=False, dim=16, dtype=torch.float32, grad=False, kernel_size=7, device="cpu"):
        tensors = [torch.zeros(1, 15, 15, 2, dim, dtype=dtype, device=device, requires_grad=grad) for _ in range(3)]
        table = torch.zeros(2, 2 * kernel_size - 1, 2 * kernel_size - 1, device=device) if rpb else None
        return "; ".join(NATTEN.unsupported(tensors, table, kernel_size, 1, 1.0))

    assert reasons() == ""
    assert "the tensors are on meta" in reasons(device="meta")
    if found.fused:
        assert "has no relative positional bias" in reasons(rpb=True)
        assert "no kernels for torch.float64" in reasons(dtype=torch.float64)
        assert "no gradients on a CPU" in reasons(grad=True)
        assert "not 24" in reasons(dim=24)
        several = reasons(rpb=True, dim=24, grad=True)
        assert several.count(";") == 2
    else:
        assert reasons(rpb=True, grad=True, dim=24, dtype=torch.float64) == ""
        assert "kernels up to 13, this one is 15" in reasons(kernel_size=15)


def test_named_natten_is_refused_with_its_reasons(found):
    tensors, rpb, _ = draw(1, 9, 9, 1, 8, 7, dtype=torch.float64)
    if not found.fused:
        pytest.skip(f"natten {found.version} takes this call")
    with pytest.raises(
        RuntimeError, match=r"backend='natten' cannot run this call: natten .* no relative.*; .*float64"
    ):
        neighborhood_attention_2d(*tensors, rpb, kernel_size=7, backend="natten")


@pytest.fixture
def fresh():
    natten.installed.cache_clear()
    yield
    natten.installed.cache_clear()


def test_missing_natten(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "natten", None)
    real = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name.split(".")[0] == "natten" and arguments and arguments[3:4] != (1,):
            raise ModuleNotFoundError("No module named 'natten'", name="natten")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RuntimeError, match=r'natten is not installed: pip install "dinat_backbones\[natten\]"'):
        neighborhood_attention_2d(*[torch.zeros(1, 9, 9, 1, 8)] * 3, kernel_size=7, backend="natten")


def test_other_releases_are_named(monkeypatch, fresh):
    strange = types.ModuleType("natten")
    strange.__version__, strange.functional = "0.12.0", types.ModuleType("natten.functional")
    monkeypatch.setitem(sys.modules, "natten", strange)
    monkeypatch.setitem(sys.modules, "natten.functional", strange.functional)
    assert natten.installed().missing == f"natten 0.12.0 is installed; expected {natten.RELEASES}"
