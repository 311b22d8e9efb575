"""The op's numbers against references that share no code with it: a loop in float64, golden arrays, natten itself."""

import math

import numpy as np
import pytest
import torch

from dinat_backbones import neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked
from dinat_backbones.ops.backends import reference
from helpers import EVERYWHERE, GOLDEN, assert_near, draw, load_golden, run, sample, taking, to_dtype

pytestmark = pytest.mark.usefixtures("poison")
SHAPES = 520
OP_GOLDEN = sorted(path.stem for path in GOLDEN.glob("op_*.npz"))


def brute_force(query, key, value, rpb, kernel_size, dilation, scale):
    """Query by query: list the positions of its dilation group, take the K nearest that fit, attend. NumPy float64."""
    batch, height, width, heads, _ = query.shape
    out = np.empty(query.shape)

    def neighbors(at, length):
        group = [i for i in range(length) if i % dilation == at % dilation]
        here = group.index(at)
        window = min(
            (group[s : s + kernel_size] for s in range(len(group) - kernel_size + 1)),
            key=lambda w: abs(group.index(w[0]) + kernel_size // 2 - here),
        )
        return window, [group.index(i) - here + kernel_size - 1 for i in window]

    rows = [neighbors(y, height) for y in range(height)]
    columns = [neighbors(x, width) for x in range(width)]
    for y, (window_rows, bias_rows) in enumerate(rows):
        for x, (window_columns, bias_columns) in enumerate(columns):
            keys = key[:, window_rows][:, :, window_columns]  # [B, K, K, heads, dim]
            logits = scale * np.einsum("bhd,bijhd->bhij", query[:, y, x], keys)
            if rpb is not None:
                logits = logits + rpb[:, bias_rows][:, :, bias_columns]
            weights = np.exp(logits - logits.max(axis=(2, 3), keepdims=True))
            weights /= weights.sum(axis=(2, 3), keepdims=True)
            out[:, y, x] = np.einsum("bhij,bijhd->bhd", weights, value[:, window_rows][:, :, window_columns])
    return out


# ---- references


@pytest.mark.parametrize("name", OP_GOLDEN)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_golden(name, backend):
    meta, arrays = load_golden(name)
    generator = torch.Generator().manual_seed(meta["seed"])
    shape = [meta[k] for k in ("B", "heads", "H", "W", "head_dim")]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).permute(0, 2, 3, 1, 4) for _ in range(4)]
    span = 2 * meta["kernel_size"] - 1
    rpb = torch.randn(meta["heads"], span, span, generator=generator, dtype=torch.float64)
    expected = [torch.from_numpy(arrays[k]).permute(0, 2, 3, 1, 4) for k in ("out", "grad_q", "grad_k", "grad_v")]
    expected.append(torch.from_numpy(arrays["grad_rpb"]))
    settings = dict(kernel_size=meta["kernel_size"], dilation=meta["dilation"], scale=meta["scale"], backend=backend)
    # the arrays are stored in float32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 3e-7)):
        if backend not in taking(dtype):
            continue
        *tensors, grad_out, table = to_dtype([*drawn, rpb], dtype)
        assert_near(run(tensors, table, grad_out, **settings), expected, tolerance)


@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part):
    """520 shapes: `reference` forward against the loop, then every backend, with gradients, against `reference`,
    whose own gradients are checked numerically below."""
    for index in range(part, SHAPES, 10):
        case = sample(index)
        tensors, rpb, grad_out = draw(
            *case["shape"], case["kernel_size"], rpb=case["rpb"], fused=case["fused"], seed=index
        )
        settings = dict(kernel_size=case["kernel_size"], dilation=case["dilation"])
        expected = run(tensors, rpb, grad_out, backend="reference", **settings)
        arrays = [None if t is None else t.numpy() for t in (*tensors, rpb)]
        loop = brute_force(*arrays, **settings, scale=case["shape"][-1] ** -0.5)
        assert_near([expected[0]], [torch.from_numpy(loop)], 1e-13)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            *converted, table, grad = to_dtype([*tensors, rpb, grad_out], dtype)
            for backend in taking(dtype, "reference"):
                assert_near(run(converted, table, grad, backend=backend, **settings), expected, tolerance)


@pytest.mark.parametrize("backend", taking(torch.float64))
def test_gradients_numerically(backend):
    tensors, rpb, _ = draw(1, 7, 9, 1, 2, 3)
    inputs = [t.requires_grad_() for t in (*tensors, rpb)]

    def attend(*inputs):
        return neighborhood_attention_2d(*inputs, kernel_size=3, dilation=2, backend=backend)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("backend", taking(torch.float32))
def test_gradients_numerically_in_float32(backend):
    """For those that have no float64: coarse steps, which are exact enough to see a wrong gradient."""
    tensors, rpb, _ = draw(1, 7, 9, 1, 2, 3, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (*tensors, rpb)]

    def attend(*inputs):
        return neighborhood_attention_2d(*inputs, kernel_size=3, dilation=2, backend=backend)

    assert torch.autograd.gradcheck(attend, inputs, eps=1e-2, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("dim", [1, 8, 17, 32, 48, 64, 100, 128])
@pytest.mark.parametrize("kernel_size, dilation", [(7, 1), (5, 4), (15, 1)])
def test_head_dims_and_large_kernels(dim, kernel_size, dilation):
    tensors, rpb, grad_out = draw(1, 24, 41, 2, dim, kernel_size)
    settings = dict(kernel_size=kernel_size, dilation=dilation)
    expected = run(tensors, rpb, grad_out, backend="reference", **settings)
    *singles, table, grad = to_dtype([*tensors, rpb, grad_out], torch.float32)
    for backend in taking(torch.float32, "reference"):
        assert_near(run(singles, table, grad, backend=backend, **settings), expected, 1e-5)


# ---- dtypes


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_bfloat16_is_as_good_as_eager(backend):
    """Error against float64 no worse than that of plain PyTorch all in bfloat16, plus a tolerance."""
    tensors, rpb, grad_out = draw(1, 30, 37, 2, 32, 7, dtype=torch.bfloat16)
    settings = dict(kernel_size=7, dilation=2)
    expected = run(*[[t.double() for t in tensors], rpb.double(), grad_out.double()], backend="reference", **settings)

    inputs = [t.detach().requires_grad_() for t in (*tensors, rpb)]
    rows, row_bias = reference.window(30, 7, 2, torch.device("cpu"))
    columns, column_bias = reference.window(37, 7, 2, torch.device("cpu"))
    query, key, value, table = inputs
    logits = torch.einsum("bhwnd,bhiwjnd->bhwnij", query * 32**-0.5, key[:, rows][:, :, :, columns])
    logits = logits + table[:, row_bias[:, None, :, None], column_bias[None, :, None, :]].permute(1, 2, 0, 3, 4)
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, (7, 7))
    out = torch.einsum("bhwnij,bhiwjnd->bhwnd", weights, value[:, rows][:, :, :, columns])
    eager = [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]

    got = run(tensors, rpb.float(), grad_out, backend=backend, **settings)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    assert got[-1].dtype == torch.float32
    for a, plain, b in zip(got, eager, expected, strict=True):
        assert (a - b).abs().max() <= (plain - b).abs().max() + 1e-2 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", range(4))  # query, key, value, gradient of the output
def test_infinities_and_nans_stay_in_their_windows(which, dtype):
    *tensors, rpb, grad_out = (
        t for part in draw(1, 20, 50, 1, 8, 5, dtype=dtype) for t in (part if isinstance(part, list) else [part])
    )
    wrong = (*tensors, grad_out)[which]
    wrong[0, 3, 20, 0, 2] = math.nan
    wrong[0, 0, 1, 0, 4] = math.inf
    bad = {
        backend: [
            ~t.isfinite() for t in run(tensors, rpb.float(), grad_out, kernel_size=5, dilation=2, backend=backend)
        ]
        for backend in ("reference", "cpu")
    }
    assert any(b.any() for b in bad["reference"])
    for ours, expected in zip(bad["cpu"], bad["reference"], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place, value", [((0, 0, 4), math.nan), ((0, 0, 4), math.inf), ((0, 4, 0), -math.inf)])
def test_biases_that_are_not_finite_stay_in_their_windows(place, value, dtype):
    tensors, rpb, grad_out = draw(1, 5, 24, 1, 4, 3, dtype=dtype)
    rpb = torch.zeros_like(rpb, dtype=torch.float32)
    rpb[place] = value
    bad = [
        [~t.isfinite() for t in run(tensors, rpb, grad_out, kernel_size=3, backend=backend)]
        for backend in ("reference", "cpu")
    ]
    assert value < 0 or bad[0][2].any()
    for expected, ours in zip(*bad, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_bias_masks_neighbors_by_the_lowest_number(dtype, tolerance):
    tensors, rpb, grad_out = draw(1, 5, 24, 1, 8, 3, dtype=dtype)
    rpb = torch.zeros_like(rpb, dtype=torch.float32)
    rpb[:, :, :3] = torch.finfo(torch.float32).min
    exact = [t.double() for t in (*tensors, rpb, grad_out)]
    expected = run(exact[:3], exact[3], exact[4], kernel_size=3, backend="reference")
    assert all(t.isfinite().all() for t in expected)
    assert_near(run(tensors, rpb, grad_out, kernel_size=3, backend="cpu"), expected, tolerance)


# ---- layouts


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_strided_inputs(backend):
    tensors, rpb, grad_out = draw(2, 21, 33, 2, 16, 7, dtype=torch.float32)
    expected = run(tensors, rpb, grad_out, kernel_size=7, dilation=3, backend="reference")
    heads_first = [t.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for t in tensors]
    dims_first = [t.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1) for t in tensors]
    wide = [torch.stack([t, t * math.nan], -1)[..., 0] for t in tensors]
    for layout in (heads_first, dims_first, wide):
        assert not layout[0].is_contiguous()
        got = run(layout, rpb, grad_out.expand_as(grad_out), kernel_size=7, dilation=3, backend=backend)
        assert_near(got, expected, 1e-5)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_apart(backend, dtype):
    tensors, rpb, grad_out = draw(2, 15, 23, 2, 32, 7, dtype=dtype, fused=True)
    settings = dict(kernel_size=7, dilation=2, scale=0.3, backend=backend)
    out, *grads, grad_rpb = run(tensors, rpb, grad_out, **settings)
    inputs = [torch.stack(tensors, 3).requires_grad_(), rpb.requires_grad_()]
    packed = neighborhood_attention_2d_qkvpacked(*inputs, **settings)
    grad_qkv, packed_grad_rpb = torch.autograd.grad(packed, inputs, grad_out)
    assert_near([packed, *grad_qkv.unbind(3), packed_grad_rpb], [out, *grads, grad_rpb], 0)


@pytest.mark.parametrize("backend", taking(torch.float32, "reference"))
def test_expanded_gradient(backend):
    tensors, rpb, _ = draw(1, 9, 9, 1, 8, 7, dtype=torch.float32)
    results = []
    for name in ("reference", backend):
        inputs = [t.detach().requires_grad_() for t in (*tensors, rpb)]
        out = neighborhood_attention_2d(*inputs, kernel_size=7, backend=name)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])  # the gradient of a sum has strides of zero
    expected, got = results
    # Output, values and bias; those of query and key are sums that cancel out, up to the rounding of their terms.
    assert_near([got[0], got[3]], [expected[0], expected[3]], 1e-5)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * expected[3].abs().max()


def test_empty_batch():
    tensors, rpb, grad_out = draw(0, 9, 9, 1, 8, 7, dtype=torch.float32)
    for backend in EVERYWHERE:
        out, *_, grad_rpb = run(tensors, rpb, grad_out, kernel_size=7, backend=backend)
        assert out.shape == (0, 9, 9, 1, 8)
        assert not grad_rpb.any()


# ---- natten


def natten_functions():
    natten = pytest.importorskip("natten", reason="natten is not installed")
    if not hasattr(natten.functional, "natten2dqkrpb"):
        pytest.skip(
            f"natten {natten.__version__} has no relative positional bias; 0.14.6 is tested in the classic environment"
        )
    return natten.functional.natten2dqkrpb, natten.functional.natten2dav


@pytest.mark.parametrize("part", range(4))
def test_against_natten_with_bias(part):
    """Forward and all gradients over 200 random shapes, float64 where the backend takes it."""
    qkrpb, av = natten_functions()
    for index in range(1000 + part, 1200, 4):
        case = sample(index)
        if case["kernel_size"] > 13:
            continue
        tensors, rpb, grad_out = draw(*case["shape"], case["kernel_size"], seed=index)
        settings = dict(kernel_size=case["kernel_size"], dilation=case["dilation"])
        inputs = [t.detach().requires_grad_() for t in (*tensors, rpb)]
        query, key, value = (t.permute(0, 3, 1, 2, 4).contiguous() for t in inputs[:3])
        logits = qkrpb(query * case["shape"][-1] ** -0.5, key, inputs[3], *settings.values())
        out = av(logits.softmax(-1), value, *settings.values()).permute(0, 2, 3, 1, 4)
        expected = [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            *converted, table, grad = to_dtype([*tensors, rpb, grad_out], dtype)
            for backend in taking(dtype):
                assert_near(run(converted, table, grad, backend=backend, **settings), expected, tolerance)


def test_against_present_natten_without_bias():
    natten = pytest.importorskip("natten", reason="natten is not installed")
    if not hasattr(natten, "na2d"):
        pytest.skip(f"natten {natten.__version__} has no na2d; 0.21 is tested in the modern environment")
    for seed, (height, width, kernel_size, dilation) in enumerate([(9, 11, 7, 1), (21, 22, 5, 3), (28, 33, 7, 4)]):
        tensors, _, _ = draw(1, height, width, 2, 32, kernel_size, rpb=False, seed=seed, dtype=torch.float32)
        try:  # on the CPU it has no gradients
            expected = natten.na2d(*tensors, kernel_size=kernel_size, dilation=dilation)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            pytest.skip(f"natten {natten.__version__} does not run here: {error}")
        for backend in EVERYWHERE:
            got = neighborhood_attention_2d(*tensors, kernel_size=kernel_size, dilation=dilation, backend=backend)
            assert_near([got], [expected], 1e-5)
