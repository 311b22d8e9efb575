"""Memory over long runs: 2,000 training steps and 2,000 predictions, each of images of another size.

Counted is the resident memory of a fresh process, after a collection of garbage and after glibc has given back what is
free. After a quarter of the steps, in which the largest size occurs, it may grow by 1 %. oneDNN is off: it keeps
compiled convolutions for the sizes that it saw last, about 80 MB of them after 2,500 sizes, hardly more after 6,000.
"""

import ctypes
import gc
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dinat_backbones import DiNAT
from dinat_backbones.ops import BACKENDS

from .core import Session

STEPS = 2000
GROWTH = 0.01
SIZES = (17, 112)  # of images, pixels
MODEL = dict(
    embed_dim=16, depths=[2, 2, 2, 1], num_heads=[2, 2, 4, 4], kernel_size=3, mlp_ratio=2.0, drop_path_rate=0.1,
    dilations=[[1, 4], [1, 2], [1, 2], [1]],
)  # fmt: skip

# A model, the size of an image, and the optimizer of a training step.
Step = Callable[[torch.nn.Module, tuple[int, int], torch.optim.Optimizer | None], None]


def resident() -> int:
    """Bytes that this process has in memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Heights and widths, no two the same, the largest of all first."""
    first, last = SIZES
    every = [(height, width) for height in range(first, last + 1) for width in range(first, last)]
    return [(last, last), *random.Random(seed).sample(every, count - 1)]


def step(model: torch.nn.Module, size: tuple[int, int], optimizer: torch.optim.Optimizer | None) -> None:
    """A training step, or without an optimizer a prediction."""
    with torch.set_grad_enabled(optimizer is not None):
        maps = model(torch.rand(1, 3, *size))
    if optimizer is not None:
        sum(out.square().mean() for out in maps).backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(step: Step, training: bool, steps: int, seconds: float, seed: int) -> tuple[int, list[int]]:
    """How many steps were made in the time, and the memory after each quarter of them all."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)
    model = DiNAT(**MODEL).train(training)
    qkv = [torch.zeros(1, 3, 3, 2, 8)] * 3
    if reasons := BACKENDS["cpu"].unsupported(qkv, None, 3, 1, 1.0):
        raise RuntimeError(f"the C++ kernel cannot run: {'; '.join(reasons)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4) if training else None
    begin, found = time.monotonic(), []
    for number, size in enumerate(sizes(steps, seed), 1):
        step(model, size, optimizer)
        if number % (steps // 4) == 0:
            found.append(resident())
        if time.monotonic() - begin > seconds:
            return number, found
    return steps, found


def run(session: Session, step: Step = step) -> None:
    """`python tools/fuzz.py memory`; `--count` is the number of steps."""
    steps, session.count = session.count or STEPS, 2

    def one(seed: int) -> str:
        training = seed != session.seed  # which takes longer
        name = "training steps" if training else "predictions"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            done, memory = pool.apply(measure, (step, training, steps, session.seconds, seed))
        assert done == steps, f"only {done} of {steps} {name} in {session.seconds:.0f} s: give it more --seconds"
        growth = memory[-1] / memory[0] - 1
        words = ", ".join(f"{value / 1e6:.1f}" for value in memory)
        session.notes.append(f"{steps} {name}: {words} MB after each quarter, {100 * growth:+.2f} %")
        assert growth < GROWTH, session.notes[-1]
        session.outcomes[name] += steps
        return "runs"

    session.try_each(one)
