"""Peak memory of the op beside its inputs and outputs, measured in processes of their own."""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .core import Bar, Bench, Row, inference
from .op import KERNEL, OpInputs, op


def extra_memory(backend: str, size: tuple[int, int], dilation: int, backward: bool, threads: int) -> float:
    """Peak of resident memory during one call over inputs and outputs, in MB. Wants a process of its own (Linux)."""
    torch.set_num_threads(threads)
    OpInputs((KERNEL * dilation,) * 2).gradients(
        op(dilation, backend)
    )  # libraries and threads come with the first call
    inputs = OpInputs(size)

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
    before = status("VmRSS")
    if backward:
        outputs = inputs.gradients(op(dilation, backend))
    else:
        outputs = (inference(op(dilation, backend), *inputs.qkv, inputs.rpb)(),)
    peak = status("VmHWM")
    return (peak - before - sum(t.numel() * t.element_size() for t in outputs)) / 1e6


def memory_rows(bench: Bench) -> list[Row]:
    height, width = bench.sizes.map
    cases = [("cpu", (height, width), 16), ("cpu", (2 * height, 2 * width), 16), ("tiled", (height, width), 200)]
    rows = []
    for (backend, size, limit), backward in itertools.product(cases, (False, True)):
        label = "forward+backward" if backward else "forward"
        row = Row(f"{backend} {label} {size[0]}x{size[1]}, extra memory", bar=Bar("<=", limit), unit="MB")
        rows.append(row)
        if not os.access("/proc/self/clear_refs", os.W_OK):
            row.note = "needs Linux with a writable /proc/self/clear_refs"
            continue
        extras = []
        for dilation in bench.sizes.dilations:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                extras.append(fresh.submit(extra_memory, backend, size, dilation, backward, bench.threads).result())
        row.ours = max(extras)
        bench.say(f"{row.name}: " + ", ".join(f"{extra:.1f} MB" for extra in extras))
    return rows
