"""Maps smaller than kernel size times dilation: the op's `padding`, which the kernel for CPUs adds without copies."""

import random
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dinat_backbones import neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.backends import reference
from helpers import EVERYWHERE, assert_near, taking

pytestmark = pytest.mark.usefixtures("poison")
CPU = BACKENDS["cpu"]

# height, width, heads, head_dim, kernel_size, dilation: both axes short, or one; one pixel; fewer rows than dilation,
# so that some groups have no query; one position short; several strips of columns; a map that is large enough
SHAPES = [
    (5, 9, 2, 8, 5, 2),
    (4, 30, 1, 16, 7, 1),
    (33, 6, 2, 3, 3, 5),
    (1, 1, 2, 32, 7, 1),
    (2, 3, 1, 8, 3, 7),
    (20, 20, 2, 32, 7, 3),
    (6, 150, 1, 40, 7, 3),
    (150, 10, 1, 33, 5, 4),
    (16, 21, 2, 8, 5, 3),
]


def draw(height, width, heads, head_dim, kernel_size, *, batch=2, seed=0):
    """qkv, rpb, padding and the gradient of the output, in float64."""
    generator = torch.Generator().manual_seed(seed)
    span = 2 * kernel_size - 1
    sizes = (batch, height, width, 3, heads, head_dim), (heads, span, span), (3, heads, head_dim)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return *tensors, torch.randn(batch, height, width, heads, head_dim, generator=generator, dtype=torch.float64)


def written_out(qkv, rpb, padding, kernel_size, dilation):
    """Padded by hand, attended in `reference`, and cropped."""
    batch, height, width = qkv.shape[:3]
    reach = kernel_size * dilation
    whole = padding.expand(batch, max(height, reach), max(width, reach), *padding.shape).clone()
    whole[:, :height, :width] = qkv
    query, key, value = whole.unbind(3)
    weights = reference.weights(query, key, rpb, kernel_size, dilation, qkv.shape[-1] ** -0.5)
    return reference.apply_weights(weights, value, kernel_size, dilation)[:, :height, :width]


def derivatives(function, inputs, grad_out, *settings, **named):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs, *settings, **named)
    # where nothing is padded, the result need not depend on the padding
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out, materialize_grads=True)]


def packed(qkv, rpb, padding, **settings):
    return neighborhood_attention_2d_qkvpacked(qkv, rpb, padding=padding, **settings)


def apart(qkv, rpb, padding, **settings):
    return neighborhood_attention_2d(*qkv.unbind(3), rpb, padding=padding, **settings)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_with_all_gradients(backend, shape):
    *sizes, kernel_size, dilation = shape
    *inputs, grad_out = draw(*sizes, kernel_size)
    expected = derivatives(written_out, inputs, grad_out, kernel_size, dilation)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        if backend not in taking(dtype):
            continue
        converted = [t.to(dtype) for t in inputs]
        for function in (packed, apart):
            settings = dict(kernel_size=kernel_size, dilation=dilation, backend=backend)
            got = derivatives(function, converted, grad_out.to(dtype), **settings)
            assert_near(got, expected, tolerance)


@cache
def case(seed, dtype):
    """The arguments of `derivatives` for `packed`, and what is expected."""
    rng = random.Random(seed)
    kernel_size, dilation = rng.choice([3, 5, 7, 7, 9]), rng.choice([1, 2, 3, 5])
    reach = kernel_size * dilation
    height, width = (rng.choice([rng.randint(1, reach), reach, reach + 9]) for _ in range(2))
    sizes = height, width, rng.randint(1, 3), rng.choice([1, 8, 31, 32, 40])
    qkv, rpb, padding, grad_out = draw(*sizes, kernel_size, batch=rng.randint(1, 2), seed=seed)
    inputs, grad_out = (qkv.to(dtype), rpb.float(), padding.to(dtype)), grad_out.to(dtype)
    exact = [t.double() for t in inputs]
    expected = derivatives(written_out, exact, grad_out.double(), kernel_size, dilation)
    return inputs, grad_out, dict(kernel_size=kernel_size, dilation=dilation, backend="cpu"), expected


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_instruction_sets(name):
    best = CPU.instruction_set()
    if not CPU.use_instruction_set(name):
        pytest.skip(f"this machine or build has no {name}")
    try:
        for seed in range(40):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
                inputs, grad_out, settings, expected = case(seed, dtype)
                assert_near(derivatives(packed, inputs, grad_out, **settings), expected, tolerance)
    finally:
        CPU.use_instruction_set(best)


def test_no_table_and_strided_inputs():
    qkv, _, padding, grad_out = draw(9, 5, 2, 16, 5)
    expected = derivatives(lambda q, p: written_out(q, None, p, 5, 2), [qkv, padding], grad_out)
    apart_in_memory = [t.float().transpose(-1, -2).contiguous().transpose(-1, -2) for t in (qkv, padding)]
    assert all(t.stride(-1) != 1 for t in apart_in_memory)
    got = derivatives(lambda q, p: packed(q, None, p, kernel_size=5, dilation=2), apart_in_memory, grad_out.float())
    assert_near(got, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_reaches_those_who_attend_to_it(dtype):
    """A map one row short: the last row of the padding's group attends to it, the other group does not."""
    qkv, rpb, padding, grad_out = (t.to(dtype) for t in draw(13, 20, 2, 32, 7))
    settings = dict(kernel_size=7, dilation=2, backend="cpu")
    clean = derivatives(packed, (qkv, rpb.float(), padding), grad_out, **settings)
    for part in (1, 2):
        broken = padding.clone()
        broken[part, 0, 3] = torch.nan
        out, *gradients = derivatives(packed, (qkv, rpb.float(), broken), grad_out, **settings)
        odd_rows = torch.zeros(13, dtype=torch.bool)
        odd_rows[1::2] = True
        finite = out.isfinite().all(-1)
        assert not finite[:, odd_rows, :, 0].any()
        assert finite[:, ~odd_rows].all() and finite[..., 1].all()
        assert torch.allclose(out[:, ~odd_rows], clean[0][:, ~odd_rows], rtol=2e-2, atol=1e-2)
        assert gradients[2][:, 1].isfinite().all() and not gradients[2][1, 0].isfinite().all()


def test_a_thousand_images_or_none():
    settings = dict(kernel_size=3, dilation=2)
    for batch in (0, 1000):
        *inputs, grad_out = (t.float() for t in draw(4, 3, 1, 2, 3, batch=batch))
        expected = derivatives(written_out, inputs, grad_out, 3, 2)
        got = derivatives(packed, inputs, grad_out, backend="cpu", **settings)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    *inputs, grad_out = draw(3, 4, 1, 2, 3, batch=1)

    def twice(function, inputs, **settings):
        inputs = [t.detach().requires_grad_() for t in inputs]
        gradients = torch.autograd.grad(
            function(*inputs, **settings), inputs, grad_out.to(inputs[0]), create_graph=True
        )
        return [t.detach() for t in torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)]

    expected = twice(lambda *t: written_out(*t, 3, 2), inputs)
    singles = [t.float() for t in inputs]
    assert_near(twice(packed, singles, kernel_size=3, dilation=2, backend="cpu"), expected, 1e-4)


def test_autocast():
    *inputs, grad_out = (t.float() for t in draw(6, 9, 2, 16, 5))
    settings = dict(kernel_size=5, dilation=2, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        got = derivatives(packed, inputs, grad_out.bfloat16(), **settings)
    assert got[0].dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in got[1:])
    assert_near(got, derivatives(written_out, inputs, grad_out, 5, 2), 3e-2)
    with torch.autocast("cpu", torch.bfloat16):  # qkv of a linear layer, and its bias
        out = packed(inputs[0].bfloat16(), *inputs[1:], **settings)
    assert torch.equal(out, got[0])


@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="torch.library.opcheck came with torch 2.4")
def test_opcheck():
    qkv, rpb, padding, grad_out = (t.float() for t in draw(5, 9, 2, 8, 5))
    call = [qkv], rpb, 5, 2, 0.25, padding
    torch.library.opcheck(CPU.backward_op, (grad_out, None, None, *call))
    for tensor in (qkv, rpb, padding):
        tensor.requires_grad_()
    torch.library.opcheck(CPU.op, call)


BAD = {
    "two parts": (torch.zeros(2, 2, 8), r"padding must be \[3, heads, head_dim\] = \[3, 2, 8\]"),
    "flat": (torch.zeros(48), r"got \[48\]"),
    "of another dtype": (torch.zeros(3, 2, 8, dtype=torch.float64), "torch.float32 on cpu, like qkv; got"),
    "on another device": (torch.zeros(3, 2, 8, device="meta"), "in torch.float32 on meta"),
}


@pytest.mark.parametrize("padding, message", BAD.values(), ids=BAD)
def test_padding_that_does_not_fit_is_refused(padding, message):
    qkv = torch.zeros(1, 5, 9, 3, 2, 8)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_2d_qkvpacked(qkv, kernel_size=5, dilation=2, padding=padding)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_2d(*qkv.unbind(3), kernel_size=5, dilation=2, padding=padding)
    with pytest.raises((ValueError, RuntimeError), match=message):
        CPU.op([qkv], None, 5, 2, 1.0, padding)
    with pytest.raises(ValueError, match="a 5x9 map is smaller than kernel_size"):
        neighborhood_attention_2d_qkvpacked(qkv, kernel_size=5, dilation=2)


def test_kernels_that_do_not_pad_refuse_it():
    qkv, padding = torch.zeros(1, 5, 9, 3, 2, 16), torch.zeros(3, 2, 16)
    with pytest.raises(RuntimeError, match="its kernels do not pad"):
        BACKENDS["triton"].op([qkv], None, 5, 2, 1.0, padding)


def test_nothing_is_copied():
    qkv, padding = torch.randn(2, 20, 24, 3, 2, 8), torch.randn(3, 2, 8)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        neighborhood_attention_2d_qkvpacked(qkv, kernel_size=7, dilation=5, padding=padding, backend="cpu")
    called = {event.key for event in recorded.key_averages()}
    assert "dinat_backbones::na2d_cpu" in called and not called & {"aten::copy_", "aten::constant_pad_nd"}, called
