"""The Triton op on a CUDA GPU, or with TRITON_INTERPRET=1 in Triton's interpreter on a CPU.

test_triton.py runs this file in processes of its own, because Triton reads that switch when kernels are defined.
"""

import functools
import os
import random

import pytest
import torch

from dinat_backbones import DiNAT, neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked
from dinat_backbones.ops import BACKENDS, dispatch
from dinat_backbones.ops.backends import triton_backend as triton
from dinat_backbones.ops.backends import triton_check
from dinat_backbones.ops.registration import Call
from helpers import assert_near, draw, run, to_dtype

pytestmark = pytest.mark.usefixtures("poison")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


if INTERPRETED:
    import triton_interpreter

    triton_interpreter.add_missing_operations()


@pytest.fixture(autouse=True, scope="module")
def faster_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            triton_interpreter.run_faster(patch)
        yield


def moved(values):
    """To the device, strides kept: views of one storage stay views of one storage."""
    if DEVICE == "cpu":
        return values
    storages = {}

    def move(tensor):
        if tensor is None:
            return None
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        whole = storages.setdefault(tensor.untyped_storage().data_ptr(), whole.to(DEVICE))
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return [move(value) for value in values]


def groups_of(dilation, seed):
    """Which dilation groups to go through, as (row, column)."""
    count = dilation**2
    chosen = range(count)
    if INTERPRETED and count > 3:  # it takes a tenth of a second for each tile
        chosen = sorted({(0, count - 1)[seed % 2], random.Random(seed).randrange(count)})
    return [divmod(index, dilation) for index in chosen]


def sample(index):
    """Shape number `index`: kernels of 3 to 15, dilations of 1 to 28, groups of length K and more."""
    rng = random.Random(index)
    kernel_size = rng.choice([3, 3, 5, 5, 7, 7, 7, 9, 11, 13]) if index % 20 else 15
    dilation = rng.choice([1, 1, 2, 3, 4, rng.randint(5, 28), 28])
    height, width = (
        (kernel_size + rng.choice([0, 0, 0, 1, 2, rng.randint(3, 9)])) * dilation
        + rng.choice([0, 0, rng.randrange(dilation)])
        for _ in range(2)
    )
    return dict(
        shape=(
            rng.choice([1, 1, 1, 2]),
            height,
            width,
            rng.choice([1, 1, 2]),
            rng.choice([8, 16, 20, 32] if dilation > 4 or kernel_size > 9 else [16, 32, 32, 48, 64, 128]),
        ),
        kernel_size=kernel_size,
        dilation=dilation,
        rpb=rng.random() < 0.85,
        fused=rng.random() < 0.5,
        scale=rng.choice([None, None, 0.3]),
        dtype=rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    )


@pytest.mark.parametrize("index", range(64))
def test_random_shapes(index, monkeypatch):
    """Output and all gradients against the specification in float64, group by group: each is a map without dilation."""
    case = sample(index)
    batch, dilation, dtype, scale = case["shape"][0], case["dilation"], case["dtype"], case["scale"]
    drawn = draw(*case["shape"], case["kernel_size"], rpb=case["rpb"], fused=case["fused"], seed=index, dtype=dtype)
    tensors, rpb, grad_out = drawn
    chosen = groups_of(dilation, index)
    places = [(slice(None), slice(row, None, dilation), slice(column, None, dilation)) for row, column in chosen]
    mask = torch.zeros(grad_out.shape)
    references, sums = [], 0.0
    for place in places:
        mask[place] = 1
        inputs = [t[place].double() for t in tensors]
        results = run(inputs, None if rpb is None else rpb.double(), grad_out[place].double(),
                      kernel_size=case["kernel_size"], scale=scale, backend="reference")  # fmt: skip
        references.append(results[:4])
        sums = sums if rpb is None else sums + results[4]

    if len(chosen) < dilation**2:
        triton_interpreter.only_groups(monkeypatch, batch, dilation, chosen)
    # deterministic sums have one table per program, of which those that were not run stay poisoned
    deterministic = len(chosen) == dilation**2 and index % 2 == 0
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    *moved_tensors, table, grad = moved([*tensors, rpb, grad_out * mask.to(dtype)])
    settings = dict(kernel_size=case["kernel_size"], dilation=dilation, scale=scale)
    got = [t.cpu() for t in run(moved_tensors, table, grad, backend="triton", **settings)]
    pairs = [(ours[place], expected[number]) for place, expected in zip(places, references, strict=True)
             for number, ours in enumerate(got[:4])]  # fmt: skip
    for ours, expected in pairs + ([] if rpb is None else [(got[4], sums)]):
        assert_near([ours], [expected], TOLERANCES[dtype])


def test_shapes_are_many_and_odd():
    cases = [sample(index) for index in range(64)]
    exact = [c for c in cases if c["kernel_size"] * c["dilation"] in c["shape"][1:3]]
    assert len({str(c) for c in cases}) == 64 and len(exact) >= 20
    assert {c["kernel_size"] for c in cases} >= {3, 5, 7, 9, 11, 13, 15} and max(c["dilation"] for c in cases) == 28
    assert {c["dtype"] for c in cases} == set(TOLERANCES) and {c["rpb"] for c in cases} == {True, False}


@functools.cache
def small(dtype=torch.float32):
    tensors, rpb, grad_out = draw(1, 7, 9, 2, 16, 5, dtype=dtype, fused=True)
    expected = run([t.double() for t in tensors], rpb.double(), grad_out.double(), backend="reference", kernel_size=5)
    return moved([*tensors, rpb, grad_out]), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_apart(dtype):
    (query, key, value, rpb, grad_out), _ = small(dtype)
    settings = dict(kernel_size=5, backend="triton")
    out, *grads, grad_rpb = run([query, key, value], rpb, grad_out, **settings)
    inputs = [torch.stack([query, key, value], 3).requires_grad_(), rpb.requires_grad_()]
    packed = neighborhood_attention_2d_qkvpacked(*inputs, **settings)
    grad_qkv, packed_grad_rpb = torch.autograd.grad(packed, inputs, grad_out)
    assert_near([packed, *grad_qkv.unbind(3), packed_grad_rpb], [out, *grads, grad_rpb], 0)


def test_views_of_qkv_are_not_copied():
    (query, key, value, rpb, _), _ = small()
    assert not query.is_contiguous()
    launcher = triton._Launcher(Call(query, key, value, rpb, 5, 1, 0.25))
    assert [t.data_ptr() for t in launcher.inputs[:3]] == [t.data_ptr() for t in (query, key, value)]


@pytest.mark.parametrize("layout", ["heads first", "dims first", "unlike each other"])
def test_other_strides(layout):
    (query, key, value, rpb, grad_out), expected = small()
    tensors = [query, key, value]
    if layout == "heads first":
        tensors = [t.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for t in tensors]
    elif layout == "dims first":
        tensors = [t.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1) for t in tensors]
    else:
        tensors[1] = key.contiguous()
    got = run(tensors, rpb, grad_out, kernel_size=5, backend="triton")
    assert_near([t.cpu() for t in got], expected, 1e-5)


def test_gradient_of_a_sum_and_without_rpb_gradient():
    (query, key, value, rpb, _), _ = small()
    results = []
    for backend in ("reference", "triton"):
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        out = neighborhood_attention_2d(*inputs, rpb.detach(), kernel_size=5, backend=backend)
        results.append(torch.autograd.grad(out.sum(), inputs))  # strides of zero
    expected, got = results
    for a, b in zip(got, expected, strict=True):  # those of query and key are sums that cancel out
        assert (a - b).abs().max() <= 1e-5 * expected[2].abs().max()


def test_deterministic_sums_repeat_and_equal_atomic_ones():
    (query, key, value, rpb, grad_out), expected = small()
    got = []
    for deterministic in (True, True, False):
        torch.use_deterministic_algorithms(deterministic)
        got.append(run([query, key, value], rpb, grad_out, kernel_size=5, backend="triton")[-1].cpu())
    assert torch.equal(got[0], got[1])
    assert_near(got[1:], [expected[-1]] * 2, 1e-5)


def test_offsets_of_64_bit(monkeypatch):
    """An image whose rows are far more than 2 ** 31 elements apart; untouched pages take no memory."""
    height, width, apart = 6, 7, 1 << 29
    if not INTERPRETED:
        pytest.skip("takes 12 GiB of addresses, which a CPU has for nothing and a GPU has not")
    tensors, rpb, grad_out = draw(1, height, width, 1, 16, 3, dtype=torch.float32, seed=3)
    expected = run(*to_dtype_all(tensors, rpb, grad_out), kernel_size=3, dilation=2, backend="reference")
    triton_interpreter.detect_overflow(monkeypatch, True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        memory = torch.empty(height * apart)
    except RuntimeError as error:
        pytest.skip(f"this machine does not hand out 12 GiB of addresses: {error}")
    qkv = memory.as_strided((1, height, width, 3, 1, 16), (height * apart, apart, 48, 16, 16, 1))
    for at, tensor in enumerate(tensors):
        qkv[:, :, :, at] = tensor
    got = neighborhood_attention_2d_qkvpacked(qkv, rpb, kernel_size=3, dilation=2, backend="triton")
    assert_near([got], expected[:1], 1e-5)
    monkeypatch.setattr(triton, "WIDE", 0)
    assert_near(run(tensors, rpb, grad_out, kernel_size=3, dilation=2, backend="triton"), expected, 1e-5)


def to_dtype_all(tensors, rpb, grad_out):
    return to_dtype(tensors, torch.float64), rpb.double(), grad_out.double()


def test_several_tiles_and_blocks(monkeypatch):
    """Other tiles than the usual: many blocks of columns, tiles of unequal sides."""
    (query, key, value, rpb, grad_out), expected = small()
    tiles = (triton.Tiles(4, 8, 2, 8, 4, 1), triton.Tiles(8, 4, 4, 4, 4, 1), triton.Tiles(4, 8, 1, 16, 4, 1))
    monkeypatch.setitem(triton.TUNED, (5, 16, torch.float32), tiles)
    got = run([query, key, value], rpb, grad_out, kernel_size=5, backend="triton")
    assert_near([t.cpu() for t in got], expected, 1e-5)


@pytest.mark.parametrize("arch", ["small"] if INTERPRETED else ["small", "dinat_mini", "dinat_large"])
def test_whole_models(arch, monkeypatch):
    """Features and all gradients with `triton` as with `tiled`, float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions would round away what is compared
    small = dict(embed_dim=32, depths=[1, 1], num_heads=[2, 4], mlp_ratio=2.0, kernel_size=3, dilations=[[2], [1]])
    arguments, size = (small, (32, 24)) if arch == "small" else (dict(arch=arch, dilations="coco"), (512, 672))
    results = []
    for backend in ("tiled", "triton"):
        torch.manual_seed(0)
        model = DiNAT(**arguments, backend=backend).to(DEVICE).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("rpb"):
                torch.nn.init.normal_(parameter, std=0.5)
        image = torch.randn(1, 3, *size, device=DEVICE, requires_grad=True)
        features = model(image)
        sum((feature * torch.randn_like(feature)).sum() for feature in features).backward()  # seeded above
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        tables = [gradient for name, gradient in gradients.items() if name.endswith("rpb")]
        # together, because some are zero but for rounding, such as those of biases in front of a norm
        every = torch.cat([gradient.flatten() for gradient in gradients.values()])
        results.append([*features, image.grad, *tables, every])
    for got, expected in zip(*results[::-1], strict=True):
        assert_near([got], [expected], 1e-4)


def test_empty_batch():
    tensors, rpb, grad_out = draw(0, 9, 9, 1, 16, 7, dtype=torch.float32)
    *tensors, rpb, grad_out = moved([*tensors, rpb, grad_out])
    out, *_, grad_rpb = run(tensors, rpb, grad_out, kernel_size=7, backend="triton")
    assert out.shape == (0, 9, 9, 1, 16) and not grad_rpb.any()


@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(packed):
    backend = BACKENDS["triton"]
    tensors, rpb, grad_out = draw(1, 7, 8, 1, 16, 7, dtype=torch.float32)
    *tensors, rpb, grad_out = moved([*tensors, rpb, grad_out])
    qkv = [torch.stack(tensors, 3)] if packed else tensors
    out, lse = backend.op(qkv, rpb, 7, 1, 0.25)
    torch.library.opcheck(backend.backward_op, (grad_out, out, lse, qkv, rpb, 7, 1, 0.25))
    torch.library.opcheck(backend.op, ([t.requires_grad_() for t in qkv], rpb.requires_grad_(), 7, 1, 0.25))


def test_gradients_numerically():
    tensors, rpb, _ = draw(1, 3, 4, 1, 1, 3, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in moved([*tensors, rpb])]

    def attend(*inputs):
        return neighborhood_attention_2d(*inputs, kernel_size=3, backend="triton")

    # the order of atomic sums, and with it their rounding, is not always the same
    assert torch.autograd.gradcheck(attend, inputs, eps=1e-2, atol=2e-3, rtol=1e-2, nondet_tol=1e-5)


def test_second_derivatives():
    tensors, rpb, _ = draw(1, 3, 4, 1, 4, 3, dtype=torch.float32)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        inputs = [t.to(dtype).requires_grad_() for t in moved([*tensors, rpb])]
        out = neighborhood_attention_2d(*inputs, kernel_size=3, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs))
    assert_near(*results, 2e-5)


def test_autocast():
    (query, key, value, rpb, grad_out), _ = small()
    half = [t.detach().bfloat16() for t in (query, key, value)]
    expected = run(half, rpb, grad_out.bfloat16(), kernel_size=5, backend="triton")
    inputs = [t.detach().requires_grad_() for t in (query, key, value, rpb)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = neighborhood_attention_2d(*inputs, kernel_size=5, backend="triton")
    assert_near([out, *torch.autograd.grad(out, inputs, grad_out.bfloat16())], expected, 1e-6)


def test_op_called_directly_is_checked():
    qkv = moved([torch.zeros(1, 14, 14, 1, 16)] * 3)
    backend = BACKENDS["triton"]
    out, lse = backend.op(qkv, None, 3, 1, 1.0)
    for rpb, dilation, message in (
        (qkv[0][:1, :1, :1, 0, 0], 1, "rpb has shape"),
        (None, 5, "14x14 map is smaller than"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            backend.op(qkv, rpb, 3, dilation, 1.0)
        with pytest.raises((ValueError, RuntimeError), match=message):
            backend.backward_op(out, out, lse, qkv, rpb, 3, dilation, 1.0)
    for saved, message in (((None, None), "needs out and lse"), ((out, lse[:, :13]), "lse must be what")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            backend.backward_op(out, *saved, qkv, None, 3, 1, 1.0)
    with pytest.raises(RuntimeError, match="cannot run this call: dtype torch.float64 is not one of"):
        backend.op([t.double() for t in qkv], None, 3, 1, 1.0)


def test_compile_fullgraph():
    (query, key, value, rpb, grad_out), _ = small()

    def attend(query, key, value, table):
        return 2 * neighborhood_attention_2d(query + 1, key, value, table, kernel_size=5, backend="triton")

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = [t.detach().requires_grad_() for t in (query, key, value, rpb)]
        out = function(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad_out)])
    assert_near(*results, 1e-5)


# ---- the comparison before the first call of a kind


@pytest.fixture
def checked(monkeypatch):
    """As on a GPU, also in the interpreter: the check runs, `triton` is chosen first, and nothing is known yet."""
    backend = BACKENDS["triton"]
    monkeypatch.setattr(triton, "CHECKED_DEVICES", (DEVICE,))
    monkeypatch.setattr(backend, "disagreements", {})
    monkeypatch.setattr(backend, "automatic", lambda device: True)
    monkeypatch.setattr(backend, "faults", lambda device: list(backend.disagreements.values()))
    monkeypatch.setattr(dispatch, "BACKENDS", {"triton": backend, "tiled": BACKENDS["tiled"]})
    monkeypatch.setattr(dispatch, "_warned", set())
    return backend


def attend(name=None):
    tensors = moved(draw(1, 6, 7, 1, 16, 3, dtype=torch.float32)[0])
    return neighborhood_attention_2d(*tensors, kernel_size=3, backend=name)


def test_right_kernels_pass_the_comparison(checked, caplog):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_check, "_errors", lambda *kind, run=triton_check._errors: calls.append(kind) or run(*kind))
        state = torch.random.get_rng_state()
        first, second = attend(), attend()
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, second) and len(calls) == 1
    assert list(checked.disagreements.values()) == [""] and not caplog.records


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_wrong_kernels_are_not_used(checked, caplog, monkeypatch, part):
    """One gradient or the output is 10 % too large: the call goes to `tiled`, with one warning."""
    right = getattr(checked, part)

    def wrong(*arguments):
        right(*arguments)
        (arguments[1] if part == "forward" else arguments[-1].qkv).mul_(1.1)  # out, or the gradient of qkv

    monkeypatch.setattr(checked, part, wrong)
    for _ in range(2):
        assert torch.equal(attend(), attend("tiled"))
    (record,) = caplog.records
    assert "backend 'tiled' runs instead of 'triton'" in record.getMessage()
    assert ("out 0.1" if part == "forward" else "dq 0.1") in record.getMessage()
    assert "please report this with the output of `dinat info`" in record.getMessage()
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: the Triton kernels differ"):
        attend("triton")


def test_kernels_that_do_not_compile_are_not_used(checked, caplog, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(checked, "forward", fail)
    assert torch.equal(attend(), attend("tiled"))
    assert "do not run here" in caplog.text and "RuntimeError: PassManager::run failed)" in caplog.text


def test_comparison_can_be_turned_off(checked, monkeypatch):
    monkeypatch.setenv("DINAT_CHECK", "0")
    monkeypatch.setattr(triton_check, "_errors", lambda *kind: pytest.fail("compared"))
    attend()
    assert list(checked.disagreements.values()) == [""]
