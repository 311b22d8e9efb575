"""The op under torch's own machinery: torch.library, compile, autocast, torch.func, second derivatives, copies."""

import copy
import pickle
import threading

import pytest
import torch

from dinat_backbones import NeighborhoodAttention2D, neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked
from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.registration import CompiledBackend
from helpers import EVERYWHERE, assert_near, draw, run, taking

COMPILED = [name for name in EVERYWHERE if isinstance(BACKENDS[name], CompiledBackend)]


def inputs_of(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


# ---- torch.library


@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="torch.library.opcheck came with torch 2.4")
@pytest.mark.parametrize("with_rpb", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", COMPILED)
def test_opcheck(name, packed, with_rpb):
    tensors, rpb, grad_out = draw(1, 9, 11, 2, 8, 7, dtype=torch.float32, rpb=with_rpb)
    qkv = [torch.stack(tensors, 3)] if packed else tensors
    backend = BACKENDS[name]
    out, lse = backend.op(qkv, rpb, 7, 1, 0.25)
    saved = (out, lse) if backend.keeps_lse else (None, None)
    torch.library.opcheck(backend.backward_op, (grad_out, *saved, qkv, rpb, 7, 1, 0.25))
    qkv = [t.requires_grad_() for t in qkv]
    torch.library.opcheck(backend.op, (qkv, rpb.requires_grad_() if with_rpb else None, 7, 1, 0.25))


BAD_CALLS = {
    "an rpb of one element": (dict(rpb=torch.zeros(1, 1, 1)), "rpb has shape"),
    "an rpb of another head count": (dict(rpb=torch.zeros(3, 13, 13)), "rpb has shape"),
    "an rpb of integers": (dict(rpb=torch.zeros(2, 13, 13, dtype=torch.int64)), "rpb must have a floating dtype"),
    "a window wider than the map": (dict(dilation=5), "14x14 map is smaller than kernel_size"),
    "an even kernel": (dict(kernel_size=6), "kernel_size=6: expected an odd"),
    "no dilation": (dict(dilation=0), "dilation=0: expected at least 1"),
    "two tensors": (dict(qkv=[torch.zeros(1, 14, 14, 2, 8)] * 2), "got 2 tensors"),
    "unlike shapes": (
        dict(qkv=[torch.zeros(1, 14, 14, 2, 8), torch.zeros(1, 14, 14, 2, 4), torch.zeros(1, 14, 14, 2, 8)]),
        "must share one shape",
    ),
    "a packed tensor of two": (dict(qkv=[torch.zeros(1, 14, 14, 2, 2, 8)]), r"qkv must be \[B, H, W, 3"),
    "integers": (dict(qkv=[torch.zeros(1, 14, 14, 3, 2, 8, dtype=torch.int32)]), "floating dtype"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("change, message", BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize("name", COMPILED)
def test_ops_called_directly_are_checked(name, change, message, device):
    """Each would read or write out of bounds; forward, backward and Meta refuse with the sentence of the public op."""
    call = dict(qkv=[torch.zeros(1, 14, 14, 2, 8)] * 3, rpb=None, kernel_size=7, dilation=1, scale=1.0) | change
    call["qkv"] = [t.to(device) for t in call["qkv"]]
    call["rpb"] = None if call["rpb"] is None else call["rpb"].to(device)
    backend = BACKENDS[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        backend.op(*call.values())
    saved = [torch.zeros(1, 14, 14, 2, 8, device=device), *[None] * 2]
    with pytest.raises((ValueError, RuntimeError), match=message):
        backend.backward_op(*saved, *call.values())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape, dtype", [((1, 13, 14, 2, 8), torch.float32), ((1, 14, 14, 2, 8), torch.float64)])
@pytest.mark.parametrize("name", COMPILED)
def test_gradients_of_another_shape_or_dtype_are_refused(name, shape, dtype, device):
    qkv = [torch.zeros(1, 14, 14, 2, 8, device=device)] * 3
    grad_out = torch.zeros(shape, dtype=dtype, device=device)
    with pytest.raises((ValueError, RuntimeError), match="grad_out must be like query"):
        BACKENDS[name].backward_op(grad_out, None, None, qkv, None, 7, 1, 1.0)


def test_dtypes_without_kernel_are_refused_when_called_directly():
    qkv = [torch.zeros(1, 14, 14, 2, 8, dtype=torch.float16)] * 3
    with pytest.raises(RuntimeError, match="cannot run this call: dtype torch.float16 is not one of"):
        BACKENDS["cpu"].op(qkv, None, 7, 1, 1.0)


# ---- torch.compile


@pytest.mark.parametrize("backend", [None, *taking(torch.float32)])
def test_compile_fullgraph(backend):
    tensors, rpb, grad_out = draw(1, 15, 17, 2, 16, 7, dtype=torch.float32)

    def attend(query, key, value, table):
        return 2 * neighborhood_attention_2d(query + 1, key, value, table, kernel_size=7, dilation=2, backend=backend)

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = inputs_of(*tensors, rpb)
        out = function(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad_out)])
    assert_near(*results, 1e-5)


def test_compile_under_autocast():
    tensors, rpb, _ = draw(1, 15, 17, 2, 16, 7, dtype=torch.float32)

    def attend(query, key, value, table):
        with torch.autocast("cpu", torch.bfloat16):
            return neighborhood_attention_2d(query, key, value, table, kernel_size=7)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors, rpb)
    assert compiled.dtype == torch.bfloat16 and torch.equal(compiled, attend(*tensors, rpb))


# ---- autocast


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", [None, *EVERYWHERE])
def test_autocast_casts_query_key_and_value(backend, packed):
    """float32 inputs under autocast equal inputs that were bfloat16, in output and gradients, on every backend."""
    tensors, rpb, grad_out = draw(2, 9, 11, 2, 8, 7, dtype=torch.float32)
    half = [t.bfloat16() for t in tensors]
    expected = run(half, rpb, grad_out.bfloat16(), kernel_size=7, backend=backend)

    inputs = inputs_of(*([torch.stack(tensors, 3)] if packed else tensors), rpb)
    attend = neighborhood_attention_2d_qkvpacked if packed else neighborhood_attention_2d
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, kernel_size=7, backend=backend)
    grads = torch.autograd.grad(out, inputs, grad_out.bfloat16())
    assert out.dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in grads)
    *grad_qkv, grad_rpb = grads
    grad_qkv = grad_qkv[0].unbind(3) if packed else grad_qkv
    assert_near([out, *grad_qkv, grad_rpb], expected, 1e-6)


@pytest.mark.parametrize("backend", taking(torch.float64))
def test_autocast_leaves_float64(backend):
    tensors, rpb, grad_out = draw(1, 9, 11, 2, 8, 7)
    expected = run(tensors, rpb, grad_out, kernel_size=7, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(tensors, rpb, grad_out, kernel_size=7, backend=backend)
    assert_near(got, expected, 1e-14)


@pytest.mark.parametrize("name", COMPILED)
def test_autocast_of_ops_called_directly(name):
    tensors, rpb, _ = draw(1, 9, 11, 2, 8, 7, dtype=torch.float32)
    expected = BACKENDS[name].op([t.bfloat16() for t in tensors], rpb, 7, 1, 0.25)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(BACKENDS[name].op(tensors, rpb, 7, 1, 0.25)[0], expected)


# ---- derivatives of every kind


@pytest.mark.parametrize("backend", [None, *taking(torch.float64)])
def test_second_derivatives(backend):
    tensors, rpb, _ = draw(1, 5, 6, 1, 2, 3)
    inputs = inputs_of(*tensors, rpb)

    def attend(*inputs):
        return neighborhood_attention_2d(*inputs, kernel_size=3, backend=backend)

    assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", taking(torch.float32, "reference"))
def test_second_derivatives_in_float32(backend, packed):
    """A gradient penalty, as far as one trains with it, against the reference in float64."""
    tensors, rpb, _ = draw(1, 7, 8, 2, 4, 5)

    def penalty_gradients(dtype, backend):
        inputs = inputs_of(*(t.to(dtype) for t in (*([torch.stack(tensors, 3)] if packed else tensors), rpb)))
        attend = neighborhood_attention_2d_qkvpacked if packed else neighborhood_attention_2d
        out = attend(*inputs, kernel_size=5, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    assert_near(penalty_gradients(torch.float32, backend), penalty_gradients(torch.float64, "reference"), 2e-5)


def function_of(tensors, rpb, backend=None):
    def attend(query):
        return neighborhood_attention_2d(query, *tensors[1:], rpb, kernel_size=3, backend=backend)

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [None, "tiled", "exportable", "reference"])
def test_transforms_of_torch_func(backend, dtype):
    """grad, vmap, jvp and their compositions; float32, which on a CPU is the kernel's outside of them, too."""
    (query, *others), rpb, tangent = draw(3, 5, 6, 1, 2, 3, dtype=dtype)
    attend = function_of([query, *others], rpb, backend)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5

    def loss(query):
        return attend(query).square().sum()

    leaf = query.clone().requires_grad_()
    expected_grad = torch.autograd.grad(loss(leaf), leaf)[0]
    assert_near([torch.func.grad(loss)(query)], [expected_grad], tolerance)

    step = 1e-6 if dtype == torch.float64 else 1e-2
    difference = (attend(query + step * tangent) - attend(query - step * tangent)) / (2 * step)
    out, derivative = torch.func.jvp(attend, (query,), (tangent,))
    assert_near([out], [attend(query)], tolerance)
    assert_near([derivative], [difference], 1e-8 if dtype == torch.float64 else 1e-3)
    with torch.autograd.forward_ad.dual_level():
        dual = attend(torch.autograd.forward_ad.make_dual(query, tangent))
        assert_near([torch.autograd.forward_ad.unpack_dual(dual).tangent], [derivative], tolerance)

    def one(query, key, value):
        return neighborhood_attention_2d(query[None], key[None], value[None], rpb, kernel_size=3, backend=backend)[0]

    assert_near([torch.func.vmap(one)(query, *others)], [attend(query)], tolerance)
    per_image = torch.func.vmap(torch.func.grad(lambda *qkv: one(*qkv).square().sum()))(query, *others)
    assert_near([per_image], [expected_grad], tolerance)


@pytest.mark.parametrize("name", COMPILED)
def test_transforms_of_a_kernel_name_a_backend_that_has_them(name):
    tensors, rpb, tangent = draw(1, 5, 6, 1, 2, 3, dtype=torch.float32)
    named = function_of(tensors, rpb, name)

    def direct(query):
        return BACKENDS[name].op([query, *tensors[1:]], rpb, 3, 1, 0.5)[0]

    for attend in (named, direct):
        for transform in (
            lambda attend=attend: torch.func.grad(lambda query: attend(query).sum())(tensors[0]),
            lambda attend=attend: torch.func.jvp(attend, (tensors[0],), (tangent,)),
            lambda attend=attend: torch.func.vmap(attend)(tensors[0][None]),
        ):
            with pytest.raises(RuntimeError, match="plain operations, which backend='tiled' consists of"):
                transform()


# ---- the module, copied and shared


@pytest.mark.parametrize("backend", [None, *EVERYWHERE])
def test_copies_of_the_module(backend):
    module = NeighborhoodAttention2D(16, 2, 3, 2, backend=backend)
    x = torch.randn(1, 7, 5, 16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert other.rpb is not module.rpb and other.backend == backend


@pytest.mark.parametrize("backend", taking(torch.float32))
def test_calls_from_several_threads(backend):
    """Forward and backward passes of different shapes at once, each equal to the same alone."""
    cases = [draw(1, 12 + seed, 30 - seed, 2, 8, 5, dtype=torch.float32, seed=seed) for seed in range(6)]
    expected = [run(*case, kernel_size=5, dilation=2, backend=backend) for case in cases]
    got = {}

    def work(index):
        got[index] = [run(*cases[index], kernel_size=5, dilation=2, backend=backend) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in enumerate(expected):
        for result in got[index]:
            assert_near(result, results, 1e-6)
