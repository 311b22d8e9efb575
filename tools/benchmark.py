#!/usr/bin/env python
"""How fast the op and the backbones are, and how much memory they need, beside the competition.

    python tools/benchmark.py op|backbone|train-step|memory|growth|bf16|all [--quick] [--threads N] [--out FILE]

Results are compared first (parity) and nothing is timed if they differ. Competitors run in the same process and take
turns with ours; the figures are medians over the rounds. The rows against natten 0.14.6, which has a bias table and
runs on the CPU, need the classic environment (`make bench-classic`). Give the machine nothing else to do.

A suite is a function from `Bench` to a list of `Row`; add it to `SUITES` with the parity checks it stands on.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torchvision
from torch import nn

import dinat_backbones.attention
from dinat_backbones.backbone import DiNAT
from dinat_backbones.ops import cpu, neighborhood_attention_2d

try:
    from natten.functional import natten2dav, natten2dqkrpb
except ImportError:
    natten2dav = natten2dqkrpb = None

KERNEL, HEADS, HEAD_DIM = 7, 2, 32  # the first stage of DiNAT-Mini and DiNAT-Tiny
TOLERANCE = 1e-4  # largest error in float32, relative to the largest expected value where that is above 1
SAMPLE_SECONDS = 0.03  # a call shorter than this is repeated within its turn
NATTEN = "natten 0.14.6"
NEEDS_NATTEN = f"needs {NATTEN}: make bench-classic"


class ParityError(Exception):
    """Two implementations disagree."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; maps and images as (height, width)."""

    map: tuple[int, int] = (200, 320)
    dilations: tuple[int, int] = (1, 28)  # near and far
    image: tuple[int, int] = (800, 1280)
    train_image: tuple[int, int] = (512, 512)
    train_batch: int = 2


TINY = Sizes(map=(32, 36), dilations=(1, 4), image=(64, 96), train_image=(64, 64), train_batch=1)


class Bar(NamedTuple):
    relation: str  # ">=" or "<="
    limit: float

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.relation == ">=" else value <= self.limit


@dataclass
class Row:
    """One line of the table. The bar judges `ratio` or, without one, `ours`; where both are missing `note` says why."""

    name: str
    ours: float | None = None
    against: str = ""
    theirs: float | None = None
    ratio: float | None = None
    bar: Bar | None = None
    unit: str = "ms"
    note: str = ""

    @property
    def passed(self) -> bool | None:
        judged = self.ours if self.ratio is None else self.ratio
        return None if self.bar is None or judged is None else self.bar.met(judged)


class Bench:
    """The settings of a run, and its stopwatch."""

    def __init__(self, sizes: Sizes, rounds: int, threads: int):
        self.sizes, self.rounds, self.threads = sizes, rounds, threads
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._start:6.1f} s] {text}", flush=True)

    def times(self, what: str, calls: dict[str, Callable]) -> dict[str, float]:
        """Median milliseconds of each call. They take turns, so that a slow spell of the machine hits all of them."""
        repeats = {}
        for name, call in calls.items():
            call()
            repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(seconds(call), 1e-6)))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                for _ in range(repeats[name]):
                    call()
                samples[name].append((time.perf_counter() - begin) / repeats[name])
        return self.medians(what, samples)

    def medians(self, what: str, samples: dict[str, list[float]]) -> dict[str, float]:
        medians = {name: 1e3 * statistics.median(values) for name, values in samples.items()}
        self.say(f"{what}: " + ", ".join(f"{name} {figure(value)} ms" for name, value in medians.items()))
        return medians

    def speedup(self, name: str, ours: Callable, against: str, theirs: Callable, bar: Bar | None = None) -> Row:
        times = self.times(name, {"ours": ours, against: theirs})
        return Row(name, times["ours"], against, times[against], times[against] / times["ours"], bar)


def seconds(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def relative(name: str, ours: float, against: str, theirs: float, bar: Bar) -> Row:
    return Row(name, ours, against, theirs, ours / theirs, bar)


def inference(function: Callable, *arguments, **keywords) -> Callable:
    def call():
        with torch.inference_mode():
            return function(*arguments, **keywords)

    return call


# The op


class OpInputs:
    """Inputs of one call of the op, strided as a qkv projection leaves them, and the gradient of its output."""

    def __init__(self, size: tuple[int, int]):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(1, *size, 3, HEADS, HEAD_DIM, generator=generator)
        self.qkv = [t.requires_grad_() for t in qkv.unbind(3)]
        span = 2 * KERNEL - 1
        self.rpb = (0.5 * torch.randn(HEADS, span, span, generator=generator)).requires_grad_()
        self.grad_out = torch.randn(1, *size, HEADS, HEAD_DIM, generator=generator)

    def to(self, convert: Callable[[torch.Tensor], torch.Tensor], rpb_dtype: torch.dtype) -> "OpInputs":
        """The same numbers in another layout or dtype."""
        other = object.__new__(OpInputs)
        other.qkv = [convert(t.detach()).requires_grad_() for t in self.qkv]
        other.rpb = self.rpb.detach().to(rpb_dtype).requires_grad_()
        other.grad_out = convert(self.grad_out)
        return other

    def gradients(self, function: Callable) -> tuple[torch.Tensor, ...]:
        """The output, then the gradients of query, key, value and rpb."""
        out = function(*self.qkv, self.rpb)
        return out.detach(), *torch.autograd.grad(out, (*self.qkv, self.rpb), self.grad_out)


def op_call(inputs: OpInputs, function: Callable, backward: bool) -> Callable:
    if backward:
        return lambda: inputs.gradients(function)
    return inference(function, *inputs.qkv, inputs.rpb)


def op(dilation: int, impl: str = "cpu") -> Callable:
    def call(query, key, value, rpb):
        return neighborhood_attention_2d(query, key, value, rpb, kernel_size=KERNEL, dilation=dilation, impl=impl)

    return call


def natten_op(dilation: int) -> Callable:
    """Natten's three steps, on tensors in its own layout; the query is scaled beforehand."""

    def call(query, key, value, rpb):
        return natten2dav(natten2dqkrpb(query, key, rpb, KERNEL, dilation).softmax(-1), value, KERNEL, dilation)

    return call


def natten_inputs(inputs: OpInputs) -> OpInputs:
    other = inputs.to(lambda t: t.permute(0, 3, 1, 2, 4).contiguous(), torch.float32)
    other.qkv[0] = (other.qkv[0].detach() * HEAD_DIM**-0.5).requires_grad_()
    return other


def agree(what: str, got, expected, tolerance: float = TOLERANCE) -> None:
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        error = (ours.double() - theirs.double()).abs().max().item()
        limit = tolerance * max(1.0, theirs.abs().max().item())
        if not error <= limit:  # also where it is NaN
            raise ParityError(f"{what}: result {i} is off by {error:.2g}, allowed is {limit:.2g}")


def parity_op(bench: Bench) -> None:
    small = OpInputs((40, 44))
    exact = small.to(torch.Tensor.double, torch.float64)
    for dilation in (1, 5):
        expected = exact.gradients(op(dilation, "reference"))
        for impl in ("cpu", "tiled"):
            agree(f"op {impl}, d={dilation}, against reference", small.gradients(op(dilation, impl)), expected)
    bench.say("parity: cpu and tiled agree with the reference in float64, forward and gradients")
    inputs = OpInputs(bench.sizes.map)
    for dilation in bench.sizes.dilations:
        ours = inputs.gradients(op(dilation))
        agree(f"op cpu, d={dilation}, full size, against tiled", ours, inputs.gradients(op(dilation, "tiled")))
        if natten2dav:
            out, *grads, grad_rpb = natten_inputs(inputs).gradients(natten_op(dilation))
            grads[0] = grads[0] * HEAD_DIM**-0.5
            theirs = [t.permute(0, 2, 3, 1, 4) for t in (out, *grads)]
            agree(f"op cpu, d={dilation}, full size, against {NATTEN}", ours, (*theirs, grad_rpb))
    bench.say(f"parity: cpu agrees with tiled{f' and {NATTEN}' if natten2dav else ''} at full size")


def op_rows(bench: Bench) -> list[Row]:
    inputs, (height, width) = OpInputs(bench.sizes.map), bench.sizes.map
    theirs = natten_inputs(inputs)
    rows = []
    for d, backward in itertools.product(bench.sizes.dilations, (False, True)):
        name, bar = f"op forward{'+backward' * backward} d={d}", Bar(">=", 6 if backward else 15)
        calls = op_call(inputs, op(d), backward), op_call(theirs, natten_op(d), backward)
        rows.append(
            bench.speedup(name, calls[0], NATTEN, calls[1], bar)
            if natten2dav
            else Row(name, against=NATTEN, bar=bar, note=NEEDS_NATTEN)
        )

    near, far = bench.sizes.dilations
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
        rows.append(Row(f"op forward d={d}, fraction of floor", ours, f"{flops / 1e9:.2f} GFLOP", floor, floor / ours))

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
    rows = []
    names = f"d={near}", f"d={far}", f"4x tokens, d={near}"
    for label, backward in (("forward", False), ("forward+backward", True)):
        calls = (op_call(x, op(d), backward) for x, d in ((small, near), (small, far), (large, near)))
        times = bench.times(f"op {label}", dict(zip(names, calls, strict=True)))
        # the bars speak of the forward pass
        bars = (None, None) if backward else (Bar("<=", 1.25), Bar("<=", 4.6))
        for name, bar in zip(names[1:], bars, strict=True):
            rows.append(relative(f"op {label}, {name}", times[name], names[0], times[names[0]], bar))
    return rows


# Memory


def extra_memory(impl: str, size: tuple[int, int], dilation: int, backward: bool, threads: int) -> float:
    """Peak of resident memory during one call over inputs and outputs, in MB. Wants a process of its own (Linux)."""
    torch.set_num_threads(threads)
    OpInputs((KERNEL * dilation,) * 2).gradients(op(dilation, impl))  # libraries and threads come with the first call
    inputs = OpInputs(size)

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
    before = status("VmRSS")
    if backward:
        outputs = inputs.gradients(op(dilation, impl))
    else:
        outputs = (inference(op(dilation, impl), *inputs.qkv, inputs.rpb)(),)
    peak = status("VmHWM")
    return (peak - before - sum(t.numel() * t.element_size() for t in outputs)) / 1e6


def memory_rows(bench: Bench) -> list[Row]:
    height, width = bench.sizes.map
    cases = [("cpu", (height, width), 16), ("cpu", (2 * height, 2 * width), 16), ("tiled", (height, width), 200)]
    rows = []
    for (impl, size, limit), backward in itertools.product(cases, (False, True)):
        label = "forward+backward" if backward else "forward"
        row = Row(f"{impl} {label} {size[0]}x{size[1]}, extra memory", bar=Bar("<=", limit), unit="MB")
        rows.append(row)
        if not os.access("/proc/self/clear_refs", os.W_OK):
            row.note = "needs Linux with a writable /proc/self/clear_refs"
            continue
        extras = []
        for dilation in bench.sizes.dilations:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                extras.append(fresh.submit(extra_memory, impl, size, dilation, backward, bench.threads).result())
        row.ours = max(extras)
        bench.say(f"{row.name}: " + ", ".join(f"{extra:.1f} MB" for extra in extras))
    return rows


# The backbones


class SwinPyramid(nn.Module):
    """Torchvision's Swin-T without its head, returning what a detector needs: four normed maps, as our backbones do."""

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.swin_t(weights=None).features  # stochastic depth 0.2
        self.norms = nn.ModuleList(nn.LayerNorm(96 * 2**i) for i in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                outs.append(self.norms[i // 2](x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)


def backbone(arch: str, impl: str | None = "cpu", drop_path_rate: float = 0.2) -> DiNAT:
    torch.manual_seed(0)
    model = DiNAT(arch=arch, dilations="coco", drop_path_rate=drop_path_rate, impl=impl)
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            nn.init.normal_(parameter, std=0.5)  # as large as trained ones, so that parity notices them
    return model.eval()


def picture(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def natten_attention(qkv, rpb, *, kernel_size, dilation, scale, impl) -> torch.Tensor:
    """Stands in for `neighborhood_attention_2d_qkvpacked`, with the steps and layouts of the original module."""
    query, key, value = (t.permute(0, 3, 1, 2, 4) for t in qkv.unbind(3))
    attention = natten2dqkrpb(query * scale, key, rpb, kernel_size, dilation).softmax(-1)
    return natten2dav(attention, value, kernel_size, dilation).permute(0, 2, 3, 1, 4)


def on_natten():
    return mock.patch.object(dinat_backbones.attention, "neighborhood_attention_2d_qkvpacked", natten_attention)


def parity_backbone(bench: Bench) -> None:
    small = picture((96, 128))
    for arch in ("dinat_mini", "dinat_tiny"):
        ours = inference(backbone(arch), small)()
        agree(f"{arch} against its reference", ours, inference(backbone(arch, "reference"), small)())
    bench.say("parity: the backbones agree with the reference op inside")
    if natten2dav:
        model, image = backbone("dinat_mini"), picture(bench.sizes.image)
        ours = inference(model, image)()
        with on_natten():
            theirs = inference(model, image)()
        agree(f"dinat_mini against itself on {NATTEN}", ours, theirs)
        bench.say(f"parity: dinat_mini agrees with itself on {NATTEN} at full size")


def inside_network(bench: Bench, model: nn.Module, image: torch.Tensor) -> Row:
    """Every call of the op in one forward pass, then the same calls on the same tensors with nothing in between."""
    run, calls, spent = cpu.attention_qkvpacked, [], [0.0]

    def timed(*arguments):
        begin = time.perf_counter()
        out = run(*arguments)
        spent[0] += time.perf_counter() - begin
        calls.append(arguments)
        return out

    def inside() -> float:
        calls.clear()
        spent[0] = 0.0
        with mock.patch.object(cpu, "attention_qkvpacked", timed):
            model(image)
        return spent[0]

    def alone() -> float:
        return sum(seconds(lambda arguments=arguments: run(*arguments)) for arguments in calls)

    name, samples = "op inside the network", {"ours": [], "alone": []}
    with torch.inference_mode():
        for turn in range(2 + bench.rounds):
            pair = inside(), alone()
            if turn >= 2:
                samples["ours"].append(pair[0])
                samples["alone"].append(pair[1])
    times = bench.medians(name, samples)
    return relative(f"{name} ({len(calls)} calls)", times["ours"], "alone", times["alone"], Bar("<=", 1.15))


def backbone_rows(bench: Bench) -> list[Row]:
    image = picture(bench.sizes.image)
    mini, name, bar = backbone("dinat_mini"), "DiNAT-Mini forward", Bar(">=", 2.4)
    rows = [inside_network(bench, mini, image)]
    if natten2dav:

        def theirs():
            with on_natten():
                return inference(mini, image)()

        rows.append(bench.speedup(name, inference(mini, image), f"same on {NATTEN}", theirs, bar))
    else:
        bench.times(name, {"ours": inference(mini, image)})
        rows.append(Row(name, against=f"same on {NATTEN}", bar=bar, note=NEEDS_NATTEN))
    tiny, swin = inference(backbone("dinat_tiny"), image), inference(SwinPyramid().eval(), image)
    rows.append(bench.speedup("DiNAT-Tiny forward", tiny, "torchvision Swin-T", swin, Bar(">=", 1.4)))
    return rows


def train_step_rows(bench: Bench) -> list[Row]:
    image = picture(bench.sizes.train_image, bench.sizes.train_batch)

    def step(model: nn.Module) -> Callable:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def call():
            optimizer.zero_grad()
            sum(out.square().mean() for out in model(image)).backward()
            optimizer.step()

        return call

    name = f"DiNAT-Tiny training step, batch {len(image)}"
    ours, theirs = step(backbone("dinat_tiny")), step(SwinPyramid())
    return [bench.speedup(name, ours, "torchvision Swin-T", theirs, Bar(">=", 1.1))]


# bf16


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def forward_backward(model: nn.Module, image: torch.Tensor, precision: Callable) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients of all parameters."""
    with precision():
        outs = model(image)
        loss = sum(out.float().square().mean() for out in outs)
    return *outs, *torch.autograd.grad(loss, tuple(model.parameters()))


def parity_bf16(bench: Bench) -> None:
    image = picture((96, 128))
    exact = inference(backbone("dinat_mini", "reference"), image)()

    def errors(impl: str) -> list[float]:
        results = forward_backward(backbone("dinat_mini", impl), image, autocast)
        if not all(t.isfinite().all() for t in results):
            raise ParityError(f"bf16 autocast, {impl}: outputs or gradients are not finite")
        return [(got - want).abs().max().item() for got, want in zip(results, exact, strict=False)]  # outputs alone

    for i, (ours, eager) in enumerate(zip(errors("cpu"), errors("reference"), strict=True)):
        if ours > 1.25 * eager + 1e-2:
            raise ParityError(f"bf16 autocast, output {i}: error {ours:.2g}, with the reference op it is {eager:.2g}")
    bench.say("parity: bf16 autocast is finite and as exact as with the reference op inside")


def bf16_rows(bench: Bench) -> list[Row]:
    image, model = picture(bench.sizes.train_image), backbone("dinat_mini", drop_path_rate=0.0)

    def forward(precision):
        with precision():
            return inference(model, image)()

    full = contextlib.nullcontext
    return [
        bench.speedup("DiNAT-Mini bf16 forward", lambda: forward(autocast), "fp32", lambda: forward(full)),
        bench.speedup(
            "DiNAT-Mini bf16 forward+backward",
            lambda: forward_backward(model, image, autocast),
            "fp32",
            lambda: forward_backward(model, image, full),
        ),
    ]


# The program


class Suite(NamedTuple):
    rows: Callable[[Bench], list[Row]]
    parity: tuple[Callable[[Bench], None], ...]


SUITES = {
    "op": Suite(op_rows, (parity_op,)),
    "growth": Suite(growth_rows, (parity_op,)),
    "memory": Suite(memory_rows, (parity_op,)),
    "backbone": Suite(backbone_rows, (parity_op, parity_backbone)),
    "train-step": Suite(train_step_rows, (parity_op, parity_backbone)),
    "bf16": Suite(bf16_rows, (parity_op, parity_bf16)),
}


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[Row]) -> str:
    cells = [("what", "ours", "", "against", "theirs", "ratio", "bar", "")]
    for row in rows:
        verdict = row.note or {True: "ok", False: "MISSED", None: ""}[row.passed]
        bar = str(row.bar or "")
        cells.append(
            (row.name, figure(row.ours), row.unit, row.against, figure(row.theirs), figure(row.ratio), bar, verdict)
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = "<><<>><<"
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in cells
    )


def environment(threads: int) -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "kernel": cpu.instruction_set(),
        "threads": threads,
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"benchmark.py: {message}\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--rounds", type=_positive, help="turns of every competitor (default: 7; with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="tiny maps, to try the program; the figures mean nothing")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/benchmark.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = environment(options.threads)
    except (OSError, RuntimeError) as error:  # no folder for the results, or no kernel
        parser.error(str(error))
    if options.out.is_dir():
        parser.error(f"--out {options.out} is a folder; expected a file name")
    torch.set_num_threads(options.threads)
    bench = Bench(TINY if options.tiny else Sizes(), options.rounds or (3 if options.quick else 7), options.threads)
    bench.say(", ".join(f"{name} {value}" for name, value in settings.items()))

    suites = list(SUITES.values()) if options.suite == "all" else [SUITES[options.suite]]
    try:
        for parity in dict.fromkeys(check for suite in suites for check in suite.parity):
            parity(bench)
    except ParityError as error:
        sys.exit(f"benchmark.py: {error}; nothing was timed")
    rows = [row for suite in suites for row in suite.rows(bench)]

    report = {
        "suite": options.suite,
        "environment": settings,
        "rounds": bench.rounds,
        "sizes": asdict(bench.sizes),
        "rows": [{**asdict(row), "bar": str(row.bar or ""), "passed": row.passed} for row in rows],
    }
    unfinished = options.out.with_name(f"{options.out.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(options.out)
    bench.say(f"wrote {options.out}")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
