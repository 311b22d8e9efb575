"""What every suite stands on: sizes, rows with their bars, the stopwatch, the parity check and the table."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

TOLERANCE = 1e-4  # largest error in float32, relative to the largest expected value where that is above 1
SAMPLE_SECONDS = 0.03  # a call shorter than this is repeated within its turn


class ParityError(Exception):
    """Two backends disagree."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; maps and images as (height, width)."""

    map: tuple[int, int] = (200, 320)
    dilations: tuple[int, int] = (1, 28)  # near and far
    image: tuple[int, int] = (800, 1280)
    train_image: tuple[int, int] = (512, 512)
    train_batch: int = 2
    proposals: int = 1000  # of a detector's RPN
    detections: int = 100  # that a detector keeps
    compiler: str = "inductor"  # of torch.compile


TINY = Sizes(
    map=(32, 36),
    dilations=(1, 4),
    image=(64, 96),
    train_image=(64, 64),
    train_batch=1,
    proposals=50,
    detections=10,
    compiler="eager",
)


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
        self.curves: list[dict] = []  # for the plot
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._start:6.1f} s] {text}", flush=True)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def times(self, what: str, calls: dict[str, Callable], rounds: int | None = None) -> dict[str, float]:
        """Median milliseconds of each call. They take turns, so that a slow spell of the machine hits all of them."""
        repeats = {}
        for name, call in calls.items():
            first = seconds(call)
            again = first if first > 10 * SAMPLE_SECONDS else seconds(call)
            repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(again, 1e-6)))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds or self.rounds):
            for name, call in calls.items():
                samples[name].append(seconds(call, repeats[name]))
        return self.medians(what, samples)

    def curve(self, axis: str, at: float, times: dict[str, float]) -> None:
        """Points of the plot: milliseconds of each baseline at a value of the axis."""
        self.curves += [dict(axis=axis, at=at, name=name, ms=ms) for name, ms in times.items()]

    def medians(self, what: str, samples: dict[str, list[float]]) -> dict[str, float]:
        medians = {name: 1e3 * statistics.median(values) for name, values in samples.items()}
        self.say(f"{what}: " + ", ".join(f"{name} {figure(value)} ms" for name, value in medians.items()))
        return medians

    def speedup(
        self,
        name: str,
        ours: Callable,
        against: str,
        theirs: Callable,
        bar: Bar | None = None,
        rounds: int | None = None,
    ) -> Row:
        times = self.times(name, {"ours": ours, against: theirs}, rounds)
        return Row(name, times["ours"], against, times[against], times[against] / times["ours"], bar)


def seconds(call: Callable, repeats: int = 1) -> float:
    """Of one call, on average; on a GPU by its own clock, from when it is idle to when it is idle again."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def relative(name: str, ours: float, against: str, theirs: float, bar: Bar | None) -> Row:
    return Row(name, ours, against, theirs, ours / theirs, bar)


def inference(function: Callable, *arguments, **keywords) -> Callable:
    def call():
        with torch.inference_mode():
            return function(*arguments, **keywords)

    return call


def agree(what: str, got, expected, tolerance: float = TOLERANCE) -> None:
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        error = (ours.double() - theirs.double()).abs().max().item()
        limit = tolerance * max(1.0, theirs.abs().max().item())
        if not error <= limit:  # also where it is NaN
            raise ParityError(f"{what}: result {i} is off by {error:.2g}, allowed is {limit:.2g}")


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
