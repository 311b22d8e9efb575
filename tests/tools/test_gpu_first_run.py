"""tools/gpu_first_run.py: its steps name files and tests that there are; failed and stopped steps are reported."""

import json
import subprocess
import sys

import gpu_first_run
import pytest

from dinat_backbones.ops import BACKENDS
from helpers import ROOT


@pytest.mark.parametrize("dry", [True, False])
def test_steps_name_what_there_is(tmp_path, dry):
    found = gpu_first_run.steps(tmp_path, dry)
    assert sum(step.seconds for step in found) <= 600
    files = [word for step in found for word in step.command if word.endswith(".py")]
    assert len(files) >= 3 and all((ROOT / file).is_file() for file in files)
    assert [step.name for step in found][:2] == ["information", "device tests"]


def test_every_step_is_run_and_reported(tmp_path, monkeypatch, capsys):
    def steps(folder, dry):
        def step(name, code, seconds=60.0):
            return gpu_first_run.Step(name, [sys.executable, "-c", code], seconds)

        report = f"open({str(folder / 'benchmark.json')!r}, 'w').write('[1]')"
        return [
            step("fails", "raise SystemExit(3)"),
            step("hangs", "import time; time.sleep(60)", 1.0),
            step("works", f"print('    (7, 32, torch.bfloat16): (Tiles(1), ),  # card'); {report}"),
        ]

    monkeypatch.setattr(gpu_first_run, "steps", steps)
    monkeypatch.setattr(sys, "argv", ["gpu_first_run.py", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="fails, hangs did not pass; see .*log.txt"):
        gpu_first_run.main()
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    states = ["failed with status 3", "stopped after 1 s", "passed"]
    assert [step["state"] for step in report["steps"]] == states
    assert report["tuned"] == ["(7, 32, torch.bfloat16): (Tiles(1), ),  # card"] and report["benchmark"] == [1]
    assert "hangs: stopped after 1 s" in capsys.readouterr().out


def test_dry_run(tmp_path):
    """All of it, in Triton's interpreter."""
    if BACKENDS["triton"].missing:
        pytest.skip(BACKENDS["triton"].missing)
    command = [sys.executable, "tools/gpu_first_run.py", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [step["state"] for step in report["steps"]] == ["passed"] * 5 and report["benchmark"]["rows"]
