"""The op by itself: its backends beside each other and beside natten, and how time grows."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dinat_backbones.ops import neighborhood_attention_2d

from . import baselines
from .core import Bar, Bench, Row, agree, inference, relative

KERNEL, HEADS, HEAD_DIM = 7, 2, 32  # the first stage of DiNAT-Mini and DiNAT-Tiny


class OpInputs:
    """Inputs of one call of the op, strided as a qkv projection leaves them, and the gradient of its output."""

    def __init__(self, size: tuple[int, int]):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(1, *size, 3, HEADS, HEAD_DIM, generator=generator)
        span = 2 * KERNEL - 1
        rpb = 0.5 * torch.randn(HEADS, span, span, generator=generator)
        self._set(qkv.unbind(3), rpb, torch.randn(1, *size, HEADS, HEAD_DIM, generator=generator))

    def _set(self, qkv: Iterable[torch.Tensor], rpb: torch.Tensor, grad_out: torch.Tensor) -> None:
        self.qkv = [t.requires_grad_() for t in qkv]
        self.rpb, self.grad_out = rpb.requires_grad_(), grad_out

    def to(self, dtype: torch.dtype, rpb_dtype: torch.dtype) -> "OpInputs":
        """The same numbers in another dtype, query, key and value again side by side."""
        other = object.__new__(OpInputs)
        qkv = torch.stack([t.detach() for t in self.qkv], 3).to(dtype)
        other._set(qkv.unbind(3), self.rpb.detach().to(rpb_dtype), self.grad_out.to(dtype))
        return other

    def heads_first(self, scale: float) -> "OpInputs":
        """The same numbers as natten 0.14.6 wants them: ``[B, heads, H, W, dim]``, the query times `scale`."""
        other = object.__new__(OpInputs)
        query, key, value, grad_out = (
            t.detach().permute(0, 3, 1, 2, 4).contiguous() for t in (*self.qkv, self.grad_out)
        )
        other._set((query * scale, key, value), self.rpb.detach().clone(), grad_out)
        return other

    def gradients(self, function: Callable) -> tuple[torch.Tensor, ...]:
        """The output, then the gradients of query, key, value and rpb."""
        out = function(*self.qkv, self.rpb)
        return out.detach(), *torch.autograd.grad(out, (*self.qkv, self.rpb), self.grad_out)


def op_call(inputs: OpInputs, function: Callable, backward: bool) -> Callable:
    if backward:
        return lambda: inputs.gradients(function)
    return inference(function, *inputs.qkv, inputs.rpb)


def op(dilation: int, backend: str = "cpu") -> Callable:
    def call(query, key, value, rpb):
        return neighborhood_attention_2d(query, key, value, rpb, kernel_size=KERNEL, dilation=dilation, backend=backend)

    return call


def parity_op(bench: Bench) -> None:
    small = OpInputs((40, 44))
    exact = small.to(torch.float64, torch.float64)
    for dilation in (1, 5):
        expected = exact.gradients(op(dilation, "reference"))
        for backend in ("cpu", "tiled"):
            agree(f"op {backend}, d={dilation}, against reference", small.gradients(op(dilation, backend)), expected)
    bench.say("parity: cpu and tiled agree with the reference in float64, forward and gradients")
    inputs = OpInputs(bench.sizes.map)
    for dilation in bench.sizes.dilations:
        ours = inputs.gradients(op(dilation))
        agree(f"op cpu, d={dilation}, full size, against tiled", ours, inputs.gradients(op(dilation, "tiled")))
        if baselines.natten2dav:
            out, *grads, grad_rpb = inputs.heads_first(HEAD_DIM**-0.5).gradients(baselines.natten_op(KERNEL, dilation))
            grads[0] = grads[0] * HEAD_DIM**-0.5
            theirs = [t.permute(0, 2, 3, 1, 4) for t in (out, *grads)]
            agree(f"op cpu, d={dilation}, full size, against {baselines.NATTEN}", ours, (*theirs, grad_rpb))
    bench.say(f"parity: cpu agrees with tiled{f' and {baselines.NATTEN}' if baselines.natten2dav else ''} at full size")


def op_rows(bench: Bench) -> list[Row]:
    inputs, (height, width) = OpInputs(bench.sizes.map), bench.sizes.map
    theirs = inputs.heads_first(HEAD_DIM**-0.5)
    rows = []
    near, far = bench.sizes.dilations
    for d, backward in itertools.product((near, far), (False, True)):
        name, bar = f"op forward{'+backward' * backward} d={d}", Bar(">=", 25 if backward else 15 if d == near else 18)
        calls = op_call(inputs, op(d), backward), op_call(theirs, baselines.natten_op(KERNEL, d), backward)
        rows.append(
            bench.speedup(name, calls[0], baselines.NATTEN, calls[1], bar)
            if baselines.natten2dav
            else Row(name, against=baselines.NATTEN, bar=bar, note=baselines.NEEDS_NATTEN)
        )

    qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
    square = torch.randn(2048, 2048)
    calls = {f"d={d}": op_call(inputs, op(d), False) for d in (near, far)}
    calls["qkv Linear"] = inference(qkv, torch.randn(1, height, width, HEADS * HEAD_DIM))
    calls["2048^3 mm"] = inference(torch.mm, square, square)
    times = bench.times("op forward", calls)
    flops = 4 * height * width * HEADS * KERNEL**2 * HEAD_DIM  # two products, two operations each
    floor = times["2048^3 mm"] * flops / (2 * 2048**3)
    for d in (near, far):
        ours = times[f"d={d}"]
        rows.append(relative(f"op forward d={d} / qkv Linear", ours, "qkv Linear", times["qkv Linear"], Bar("<=", 0.7)))
        name, against = f"op forward d={d}, fraction of floor", f"{flops / 1e9:.2f} GFLOP"
        rows.append(Row(name, ours, against, floor, floor / ours, Bar(">=", 0.35)))

    rows += [
        bench.speedup(
            f"tiled forward d={d}",
            op_call(inputs, op(d, "tiled"), False),
            "reference",
            op_call(inputs, op(d, "reference"), False),
            Bar(">=", 10),
        )
        for d in (near, far)
    ]
    return rows


def growth_rows(bench: Bench) -> list[Row]:
    near, far = bench.sizes.dilations
    height, width = bench.sizes.map
    small, large = OpInputs((height, width)), OpInputs((2 * height, 2 * width))
    shapes = {f"d={near}": (small, near), f"d={far}": (small, far), f"4x tokens, d={near}": (large, near)}
    passes = {"forward": False, "forward+backward": True}
    calls = {
        f"{label}, {name}": op_call(inputs, op(dilation), backward)
        for label, backward in passes.items()
        for name, (inputs, dilation) in shapes.items()
    }
    times = bench.times("op", calls)
    rows, (first, *others) = [], shapes
    for label, backward in passes.items():
        base = times[f"{label}, {first}"]
        # the bars speak of the forward pass
        bars = (None, None) if backward else (Bar("<=", 1.25), Bar("<=", 4.3))
        for name, bar in zip(others, bars, strict=True):
            rows.append(relative(f"op {label}, {name}", times[f"{label}, {name}"], first, base, bar))
    for name in (first, others[0]):
        forward, both = times[f"forward, {name}"], times[f"forward+backward, {name}"]
        rows.append(relative(f"op backward, {name}", both - forward, "forward", forward, Bar("<=", 3)))
    _curves(bench)
    return rows


def _curves(bench: Bench) -> None:
    """What the plot shows: forward time against dilation and against the number of tokens."""

    def draw(axis: str, at: int, label: str, inputs: OpInputs, dilation: int) -> None:
        calls = {backend: op_call(inputs, op(dilation, backend), False) for backend in ("cpu", "tiled")}
        if baselines.natten2dav:
            calls[baselines.NATTEN] = op_call(
                inputs.heads_first(HEAD_DIM**-0.5), baselines.natten_op(KERNEL, dilation), False
            )
        bench.curve(axis, at, bench.times(f"op forward, {label}", calls))

    height, width = bench.sizes.map
    inputs = OpInputs((height, width))
    for dilation in (1, 2, 4, 7, 14, 28):
        if KERNEL * dilation <= min(height, width):
            draw("dilation", dilation, f"d={dilation}", inputs, dilation)
    for factor in (0.5, 0.75, 1, 1.5, 2):
        size = int(height * factor), int(width * factor)
        draw("tokens", size[0] * size[1], f"{size[0]}x{size[1]}", OpInputs(size), bench.sizes.dilations[0])
