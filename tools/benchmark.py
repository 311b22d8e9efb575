#!/usr/bin/env python
"""How fast the op and the backbones are, and how much memory they need, beside the baselines.

    python tools/benchmark.py SUITE [--quick] [--threads N] [--out FILE]
    python tools/benchmark.py gpu [--dry-run] [--out FILE]

SUITE is one of these, or all:

    op                   forward and backward beside natten and a linear layer; fraction of the floor
    growth               time against dilation and the number of tokens; backward against forward
    memory               peaks of the op and of training steps
    backbone             inference beside natten, Swin and ConvNeXt
    train-step           the same for training steps
    compiled             graphs of torch.compile in a training run; compiled inference
    compiled-train-step  training steps of DiNAT-Tiny and Swin-T, both compiled, which takes minutes
    detectors            Mask R-CNN in mmdet with DiNAT-Mini, Swin-T and ResNet-50; needs mmdet
    bf16                 bfloat16 beside float32: the op, inference, forward and backward

Results are compared first (parity) and nothing is timed if they differ. Baselines run in the same process and take
turns with ours; the figures are medians over the rounds. They go to FILE (JSON), curves to an image beside it. The
rows against natten 0.14.6, which has a bias table and runs on the CPU, need the classic environment (`make
bench-classic`). `gpu` measures the op and a training step on a GPU in bfloat16; with --dry-run it goes through all of
it on a CPU at tiny sizes. Give the machine nothing else to do.

A suite is a function from `Bench` to a list of `Row` in tools/benchmarks; add it to `SUITES` with the parity checks it
stands on.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # which Triton reads when it is imported

import torch
import torchvision
from benchmarks import backbones, baselines, bf16, compiled, detectors, gpu, memory, op, plot  # noqa: F401
from benchmarks.core import TINY, Bench, ParityError, Row, Sizes, table

from dinat_backbones.cli.common import positive
from dinat_backbones.files import atomic_write
from dinat_backbones.ops import BACKENDS


class Suite(NamedTuple):
    rows: Callable[[Bench], list[Row]]
    parity: tuple[Callable[[Bench], None], ...]


SUITES = {
    "op": Suite(op.op_rows, (op.parity_op,)),
    "growth": Suite(op.growth_rows, (op.parity_op,)),
    "memory": Suite(memory.memory_rows, (op.parity_op,)),
    "backbone": Suite(backbones.backbone_rows, (op.parity_op, backbones.parity_backbone)),
    "train-step": Suite(backbones.train_step_rows, (op.parity_op, backbones.parity_backbone)),
    "compiled": Suite(compiled.compiled_rows, (op.parity_op, compiled.parity_compiled)),
    "compiled-train-step": Suite(compiled.train_step_rows, (op.parity_op, backbones.parity_backbone)),
    "detectors": Suite(detectors.detector_rows, (op.parity_op, detectors.parity_detectors)),
    "bf16": Suite(bf16.bf16_rows, (op.parity_op, bf16.parity_op_bf16, bf16.parity_bf16)),
}


def environment(threads: int) -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernel": BACKENDS["cpu"].instruction_set(),
        "threads": threads,
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"benchmark.py: {message}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all", "gpu"])
    parser.add_argument("--rounds", type=positive, help="turns of every baseline (default: 5; with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="tiny maps, to try the program; the figures mean nothing")
    parser.add_argument("--dry-run", action="store_true", help="gpu suite: run all of it on a CPU, at tiny sizes")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/benchmark.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.suite == "gpu" and not (options.dry_run or torch.cuda.is_available()):
        parser.error("the gpu suite needs a GPU that torch sees; --dry-run goes through it on a CPU")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = environment(options.threads)
    except (OSError, RuntimeError) as error:  # no folder for the results, or no kernel
        parser.error(str(error))
    if options.out.is_dir():
        parser.error(f"--out {options.out} is a folder; expected a file name")
    torch.set_num_threads(options.threads)
    bench = Bench(TINY if options.tiny else Sizes(), options.rounds or (3 if options.quick else 5), options.threads)
    bench.say(", ".join(f"{name} {value}" for name, value in settings.items()))

    suites = list(SUITES.values()) if options.suite == "all" else [SUITES[s] for s in SUITES if s == options.suite]
    try:
        for parity in dict.fromkeys(check for suite in suites for check in suite.parity):
            parity(bench)
        rows = [row for suite in suites for row in suite.rows(bench)]
        if options.suite == "gpu":
            rows = gpu.run(bench, gpu.Setting.of(options.dry_run))
    except ParityError as error:
        sys.exit(f"benchmark.py: {error}; {'no further figures' if bench.curves else 'nothing was timed'}")

    report = {
        "suite": options.suite,
        "environment": settings,
        "rounds": bench.rounds,
        "sizes": asdict(bench.sizes),
        "curves": bench.curves,
        "rows": [{**asdict(row), "bar": str(row.bar or ""), "passed": row.passed} for row in rows],
    }
    with atomic_write(options.out) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")
    bench.say(f"wrote {options.out}")
    bench.say(plot.draw(bench.curves, options.out.with_suffix(".png")))
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
