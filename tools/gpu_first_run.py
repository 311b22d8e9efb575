#!/usr/bin/env python
"""The first minutes on a GPU: device tests of the op and of whole models, memory checks, tuning, timings.

    python tools/gpu_first_run.py [--out FOLDER] [--limit SECONDS]
    python tools/gpu_first_run.py --dry-run          # the same steps at tiny sizes in Triton's interpreter, on a CPU

Needs torch with Triton and torchvision, NumPy, pytest, filelock and this checkout, which need not be installed;
pytest-xdist lets the device tests compile side by side. A step that fails or takes too long does not stop the others.
FOLDER (work_dirs/gpu) gets log.txt, report.json and what the benchmark writes; report.json holds the state and the
seconds of every step, the lines that the tuner printed for `TUNED`, and the rows of the benchmark.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ON_DEVICE = "tests/ops/triton_on_device.py"
INTERPRETER = "tests/triton_interpreter.py"  # runs a script in Triton's interpreter, for dry runs
TUNED = re.compile(r"^    (\(\d+, \d+, torch\.\w+\): \(Tiles.*)", re.MULTILINE)


class Step(NamedTuple):
    """A command, and the seconds after which it is stopped."""

    name: str
    command: list[str]
    seconds: float


def steps(folder: Path, dry: bool) -> list[Step]:
    """All steps, what decides most first."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", ON_DEVICE]
    few = ["-k", "whole_models or empty_batch" if dry else "packed or other_strides or several_tiles"]
    workers = ["-n", "8"] if find_spec("xdist") and not dry else []
    sanitizer = shutil.which("compute-sanitizer")
    memory_check = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"] if sanitizer and not dry else []
    dry_option = ["--dry-run"] if dry else []
    script = [python, INTERPRETER] if dry else [python]
    tune = [*script, "tools/triton_kernels.py", "tune", *(["--quick"] if dry else [])]
    benchmark = [*script, "tools/benchmark.py", "gpu", "--quick", "--out", str(folder / "benchmark.json"), *dry_option]
    found = [
        Step("information", [python, "-m", "dinat_backbones", "info"], 30),
        Step("device tests", [*pytest, *workers, *(few if dry else [])], 180),
    ]
    if memory_check or dry:
        found.append(Step("memory check", [*memory_check, *pytest, *few], 60))
    found.append(Step("tuning, head_dim 32", tune, 90))
    found.append(Step("timings", benchmark, 150))
    return found


def run(step: Step, log: Path, limit: float, environment: dict[str, str]) -> dict[str, object]:
    """Run one step; its output goes to the log, its state is printed and returned."""
    start = time.monotonic()
    if limit <= 0:
        return dict(name=step.name, state="no time left", seconds=0.0)
    with log.open("a") as stream:
        stream.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        stream.flush()
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=limit
            )
            state = "passed" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
        seconds = round(time.monotonic() - start, 1)
        stream.write(f"== {step.name}: {state}, {seconds} s\n")
    print(f"{step.name}: {state}, {seconds} s", flush=True)
    return dict(name=step.name, state=state, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/gpu"), help="folder; default: %(default)s")
    parser.add_argument("--limit", type=float, default=480, help="seconds for all steps; default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log, report = folder / "log.txt", folder / "report.json"
    log.write_text("")
    (folder / "benchmark.json").unlink(missing_ok=True)  # of an earlier run
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **({"TRITON_INTERPRET": "1"} if options.dry_run else {})}
    start, results = time.monotonic(), []
    for step in steps(folder, options.dry_run):
        left = options.limit - (time.monotonic() - start)
        results.append(run(step, log, min(step.seconds * (10 if options.dry_run else 1), left), environment))
        benchmark = folder / "benchmark.json"
        content = dict(
            dry_run=options.dry_run,
            steps=results,
            tuned=TUNED.findall(log.read_text()),
            benchmark=json.loads(benchmark.read_text()) if benchmark.is_file() else None,
        )
        report.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {report} and {log}")
    failed = [str(result["name"]) for result in results if result["state"] != "passed"]
    if failed:
        sys.exit(f"gpu_first_run.py: {', '.join(failed)} did not pass; see {log}")


if __name__ == "__main__":
    main()
