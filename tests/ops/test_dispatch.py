"""Which backend runs a call, what is logged about it, and which calls are refused."""

import logging
import subprocess
import sys

import pytest
import torch

from dinat_backbones import neighborhood_attention_2d, neighborhood_attention_2d_qkvpacked
from dinat_backbones.ops import BACKENDS, dispatch
from dinat_backbones.ops.backends.base import Backend
from helpers import draw


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kernel_size=6), "kernel_size=6: expected an odd"),
        (dict(kernel_size=1), "kernel_size=1: expected an odd"),
        (dict(dilation=0), "dilation=0: expected at least 1"),
        (dict(dilation=2), r"9x11 map is smaller than kernel_size \* dilation = 7 \* 2 = 14"),
        (dict(backend="fast"), "backend='fast' is unknown"),
        (dict(rpb=torch.zeros(2, 7, 7)), r"rpb has shape \[2, 7, 7\]; expected .* \[2, 13, 13\]"),
        (dict(rpb=torch.zeros(2, 13, 13, dtype=torch.int64)), "rpb must have a floating dtype; got torch.int64"),
        (dict(key=torch.zeros(1, 9, 11, 2, 16)), "must share one shape"),
        (dict(value=torch.zeros(1, 9, 11, 2, 8, dtype=torch.float64)), "must share one floating dtype"),
        (dict(query=torch.zeros(1, 9, 11, 2, 8, dtype=torch.int64)), "must share one floating dtype"),
        (dict(rpb=torch.zeros(2, 13, 13, device="meta")), "must be on one device"),
        (dict(key=torch.zeros(1, 9, 11, 2, 8, device="meta")), "must be on one device"),
        (dict(query=torch.zeros(9, 11, 2, 8)), "must share one shape"),
    ],
)
def test_bad_input(change, message):
    arguments = dict.fromkeys(("query", "key", "value"), torch.zeros(1, 9, 11, 2, 8)) | dict(kernel_size=7) | change
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_2d(**arguments)


def test_packed_of_another_shape():
    with pytest.raises(ValueError, match=r"qkv must be \[B, H, W, 3, heads, head_dim\]; got \[1, 9, 9, 2, 1, 8\]"):
        neighborhood_attention_2d_qkvpacked(torch.zeros(1, 9, 9, 2, 1, 8), kernel_size=7)


def test_no_heads():
    with pytest.raises(ValueError, match="expected at least one head and one dimension per head; got heads=0"):
        neighborhood_attention_2d(*[torch.zeros(1, 9, 9, 0, 8)] * 3, kernel_size=7)


def test_named_backend_never_falls_back():
    tensors, rpb, _ = draw(1, 9, 9, 1, 8, 7, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run this call: dtype torch.float16 is not one of"):
        neighborhood_attention_2d(*tensors, rpb, kernel_size=7, backend="cpu")
    assert neighborhood_attention_2d(*tensors, rpb, kernel_size=7).dtype == torch.float16  # but any other may run


def test_order():
    """Our kernels come first; natten comes before plain PyTorch, and on a CPU only when it is named."""
    names = list(BACKENDS)
    assert names.index("cpu") < names.index("natten") < names.index("tiled") < names.index("reference")
    on_cpu = [name for name, backend in BACKENDS.items() if backend.automatic(torch.device("cpu"))]
    assert on_cpu == ["cpu", "tiled"]
    on_cuda = [name for name, backend in BACKENDS.items() if backend.automatic(torch.device("cuda"))]
    assert on_cuda == ["cpu", "triton", "natten", "tiled"]  # the first has an objection to every call there
    code = "import torch, sys, dinat_backbones as d; q = torch.zeros(1, 9, 9, 1, 8, dtype=torch.float16);"
    code += "d.neighborhood_attention_2d(q, q, q, kernel_size=7); print('natten' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("packed", [True, False])
def test_another_backend_is_one_entry(monkeypatch, packed):
    """Its defaults do for what it does not say; it gets three tensors, whichever way the call came."""

    class Doubling(Backend):
        def attention(self, qkv, rpb, kernel_size, dilation, scale):
            query, key, value = qkv
            return 2 * value

    monkeypatch.setitem(BACKENDS, "doubling", Doubling())
    monkeypatch.setattr(dispatch, "BACKENDS", {"doubling": BACKENDS["doubling"]} | BACKENDS)
    tensors, _, _ = draw(1, 9, 9, 1, 8, 7, fused=True)
    for name in (None, "doubling"):
        if packed:
            out = neighborhood_attention_2d_qkvpacked(torch.stack(tensors, 3), kernel_size=7, backend=name)
        else:
            out = neighborhood_attention_2d(*tensors, kernel_size=7, backend=name)
        assert torch.equal(out, 2 * tensors[2])


# ---- what is said


@pytest.fixture
def unsaid(monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_warned", set())


def warnings_in(caplog):
    """Without the debug lines, which another package may have turned on."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_choice_is_logged_once(unsaid, caplog):
    tensors, rpb, _ = draw(1, 9, 9, 1, 8, 7, dtype=torch.float32)
    with caplog.at_level(logging.DEBUG, "dinat_backbones"):
        for _ in range(3):
            neighborhood_attention_2d(*tensors, rpb, kernel_size=7)
        neighborhood_attention_2d(*[t.double() for t in tensors], kernel_size=7)
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'cpu' runs the calls on cpu",
        "backend 'tiled' runs the calls on cpu",
    ]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_one_warning_without_the_kernel(unsaid, caplog, monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "missing", "the C++ kernel was not built")
    tensors, rpb, _ = draw(1, 9, 9, 1, 8, 7, dtype=torch.float32)
    neighborhood_attention_2d(*[t.double() for t in tensors], kernel_size=7)  # which the kernel would not have run
    assert not warnings_in(caplog)
    for _ in range(3):
        neighborhood_attention_2d(*tensors, rpb, kernel_size=7)
    neighborhood_attention_2d(*tensors, rpb, kernel_size=7, backend="tiled")
    (record,) = warnings_in(caplog)
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "backend 'tiled' runs instead of 'cpu', which is faster: the C++ kernel was not built"
    )


def test_nothing_is_said_where_plain_operations_are_needed(unsaid, caplog):
    """A transform of torch.func is no reason to mend the installation."""
    tensors, rpb, _ = draw(1, 9, 9, 1, 8, 7, dtype=torch.float32)
    torch.func.grad(lambda query: neighborhood_attention_2d(query, *tensors[1:], rpb, kernel_size=7).sum())(tensors[0])
    assert not warnings_in(caplog)
