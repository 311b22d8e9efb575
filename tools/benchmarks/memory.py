"""Peak memory of the op beside its inputs and outputs, and of training steps; measured in processes of their own."""

import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from . import baselines
from .backbones import backbone, random_image, training_step
from .core import Bar, Bench, Row, inference
from .op import KERNEL, OpInputs, op

WANTS_LINUX = "needs Linux with a writable /proc/self/clear_refs"
TRAINED = {
    "DiNAT-Tiny": lambda: backbone("dinat_tiny"),
    "torchvision Swin-T": baselines.SwinPyramid,
    "torchvision ConvNeXt-T": baselines.ConvNeXtPyramid,
}


def peak_of(call: Callable) -> int:
    """Bytes by which resident memory rises at most during a call (Linux)."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def can_measure() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


def in_fresh_process(function: Callable[..., float], *arguments) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def extra_memory(backend: str, size: tuple[int, int], dilation: int, backward: bool, threads: int) -> float:
    """Peak of resident memory during one call over inputs and outputs, in MB. Wants a process of its own (Linux)."""
    torch.set_num_threads(threads)
    OpInputs((KERNEL * dilation,) * 2).gradients(
        op(dilation, backend)
    )  # libraries and threads come with the first call
    inputs, outputs = OpInputs(size), []
    forward = inference(op(dilation, backend), *inputs.qkv, inputs.rpb)
    rise = peak_of(lambda: outputs.extend(inputs.gradients(op(dilation, backend)) if backward else [forward()]))
    return (rise - sum(t.numel() * t.element_size() for t in outputs)) / 1e6


def step_memory(name: str, size: tuple[int, int], batch: int, threads: int) -> float:
    """Peak of resident memory during a training step over the model's weights and images, in MB."""
    torch.set_num_threads(threads)
    step = training_step(TRAINED[name](), random_image(size, batch))
    return peak_of(step) / 1e6


def memory_rows(bench: Bench) -> list[Row]:
    height, width = bench.sizes.map
    cases = [("cpu", (height, width), 16), ("cpu", (2 * height, 2 * width), 16), ("tiled", (height, width), 200)]
    rows = []
    for (backend, size, limit), backward in itertools.product(cases, (False, True)):
        label = "forward+backward" if backward else "forward"
        row = Row(f"{backend} {label} {size[0]}x{size[1]}, extra memory", bar=Bar("<=", limit), unit="MB")
        rows.append(row)
        if not can_measure():
            row.note = WANTS_LINUX
            continue
        extras = [
            in_fresh_process(extra_memory, backend, size, dilation, backward, bench.threads)
            for dilation in bench.sizes.dilations
        ]
        row.ours = max(extras)
        bench.say(f"{row.name}: " + ", ".join(f"{extra:.1f} MB" for extra in extras))
    return rows + training_rows(bench)


def training_rows(bench: Bench) -> list[Row]:
    """The first training step, which also allocates the gradients and the optimizer's state."""
    size, batch = bench.sizes.train_image, bench.sizes.train_batch
    name = f"DiNAT-Tiny training step, batch {batch}, peak memory"
    ours, *others = TRAINED
    if not can_measure():
        return [Row(name, against=other, unit="MB", note=WANTS_LINUX) for other in others]
    peaks = {model: in_fresh_process(step_memory, model, size, batch, bench.threads) for model in TRAINED}
    bench.say(f"{name}: " + ", ".join(f"{model} {peak:.0f} MB" for model, peak in peaks.items()))
    bars = {"torchvision Swin-T": Bar("<=", 1.0)}
    return [
        Row(name, peaks[ours], other, peaks[other], peaks[ours] / peaks[other], bars.get(other), "MB")
        for other in others
    ]
