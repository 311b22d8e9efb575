"""bfloat16 beside float32: the op by itself and a whole backbone under autocast."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch

from .backbones import backbone, forward_backward, random_image
from .core import Bar, Bench, ParityError, Row, inference
from .op import OpInputs, op, op_call

# a CPU's own bfloat16 products; without them bfloat16 is converted to float32 and back around every product
BF16_FLAGS = ("amx_bf16", "avx512_bf16")
EPSILON = 2**-8  # of a bfloat16: half of it is the largest relative error of rounding


def bf16_instructions() -> list[str]:
    """Which of `BF16_FLAGS` this CPU has (Linux)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in BF16_FLAGS if flag in words]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def not_worse(what: str, results: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Raise a `ParityError` where our error is above 1.25 times the eager one plus a rounding of the largest value.

    `results` are triples: ours, with an eager backend, exact.
    """
    for i, (ours, eager, exact) in enumerate(results):
        error, allowed = ((got.double() - exact).abs().max().item() for got in (ours, eager))
        limit = 1.25 * allowed + EPSILON / 2 * exact.abs().max().item()
        if not error <= limit:  # also where it is NaN
            raise ParityError(f"{what}: result {i} is off by {error:.2g}, allowed is {limit:.2g}")


def parity_op_bf16(bench: Bench) -> None:
    """Against float64 on the same bfloat16 numbers; torch's own bfloat16 gives the error that is allowed."""
    near, far = bench.sizes.dilations
    cases = [((40, 44), 1, "reference"), ((40, 44), 5, "reference")]
    cases += [(bench.sizes.map, near, "tiled"), (bench.sizes.map, far, "tiled")]
    for size, dilation, eager in cases:
        inputs = OpInputs(size).to(torch.bfloat16, torch.float32)
        exact = inputs.to(torch.float64, torch.float64).gradients(op(dilation, eager))
        pairs = zip(inputs.gradients(op(dilation)), inputs.gradients(op(dilation, eager)), exact, strict=True)
        not_worse(f"op bf16, {size[0]}x{size[1]}, d={dilation}", pairs)
    bench.say("parity: the op in bf16 is as exact as its eager backends, forward and gradients")


def parity_bf16(bench: Bench) -> None:
    model, image = backbone("dinat_mini", "reference"), random_image((96, 128))
    exact = inference(model, image)()  # float32 is exact beside bfloat16
    with autocast():
        eager = inference(model, image)()
    ours = forward_backward(backbone("dinat_mini"), image, autocast)
    if not all(t.isfinite().all() for t in ours):
        raise ParityError("bf16 autocast: outputs or gradients are not finite")
    not_worse("bf16 autocast", zip(ours, eager, exact, strict=False))  # outputs alone
    half = image.to(torch.bfloat16)
    converted, eager = (
        inference(backbone("dinat_mini", backend).to(torch.bfloat16), half)() for backend in ("cpu", "reference")
    )
    not_worse("bf16 model", zip(converted, eager, exact, strict=True))
    bench.say("parity: bf16 autocast and the converted model are as exact as with the reference op inside")


def op_rows(bench: Bench) -> list[Row]:
    full = OpInputs(bench.sizes.map)
    half = full.to(torch.bfloat16, torch.float32)
    native = bf16_instructions()
    bar = Bar(">=", 2) if native else None
    rows = []
    for dilation, backward in itertools.product(bench.sizes.dilations, (False, True)):
        name = f"op bf16 forward{'+backward' * backward} d={dilation}"
        calls = (op_call(inputs, op(dilation), backward) for inputs in (half, full))
        rows.append(bench.speedup(name, next(calls), "fp32", next(calls), bar))
        if not native:
            rows[-1].note = "no bar: this CPU has no bf16 products"
    return rows


def backbone_rows(bench: Bench) -> list[Row]:
    model, native, rows = backbone("dinat_mini", drop_path_rate=0.0), bf16_instructions(), []
    converted = copy.deepcopy(model).to(torch.bfloat16)  # autocast converts the weights in every pass
    bars = {"forward": 2.5, "forward+backward": 2.3, "forward, weights converted once": 2.5}

    def forward(network, image, precision=contextlib.nullcontext):
        with precision():
            return inference(network, image)()

    for size in (bench.sizes.train_image, bench.sizes.image):
        image = random_image(size)
        full = functools.partial(forward, model, image)
        calls = {
            "forward": (functools.partial(forward, model, image, autocast), full),
            "forward, weights converted once": (functools.partial(forward, converted, image.to(torch.bfloat16)), full),
            "forward+backward": (
                functools.partial(forward_backward, model, image, autocast),
                functools.partial(forward_backward, model, image),
            ),
        }
        for label, (ours, theirs) in calls.items():
            name = f"DiNAT-Mini bf16 {label}, {size[0]}x{size[1]}"
            if "backward" in label and not native:  # half a minute a turn
                rows.append(Row(name, against="fp32", note="not timed: this CPU has no bf16 products"))
                continue
            bar = Bar(">=", bars[label]) if "amx_bf16" in native else None
            rows.append(bench.speedup(name, ours, "fp32", theirs, bar, rounds=bench.rounds if native else 1))
            if bar is None:
                rows[-1].note = "no bar: this CPU has no AMX" + ("" if native else " and no other bf16 products")
    return rows


def bf16_rows(bench: Bench) -> list[Row]:
    return op_rows(bench) + backbone_rows(bench)
