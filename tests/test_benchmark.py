"""tools/benchmark.py at tiny sizes: the report, and that nothing is timed after a failed parity check."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="torchvision is missing; the benchmark compares with its Swin-T")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))  # which is no package
benchmark = importlib.import_module("benchmark")

try:
    benchmark.cpu.instruction_set()
except RuntimeError as error:
    pytest.skip(f"{error}; the benchmark measures it", allow_module_level=True)


def run(out: Path, *arguments: str):
    benchmark.main([*arguments, "--tiny", "--rounds", "1", "--out", str(out)])


def test_report(tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    run(out, "op")
    report = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    assert report["rounds"] == 1 and report["environment"]["threads"] >= 1
    rows = {row["name"]: row for row in report["rows"]}
    row = rows["op forward d=1 / qkv Linear"]
    assert row["bar"] == "<= 0.7" and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert row["passed"] == (row["ratio"] <= 0.7)
    assert all(row["ratio"] or row["note"] for row in rows.values())
    assert len(rows) == 10 and "op forward d=1" in capsys.readouterr().out


def test_failed_parity_stops(tmp_path, monkeypatch, capsys):
    right = benchmark.cpu.attention
    monkeypatch.setattr(benchmark.cpu, "attention", lambda *arguments: right(*arguments) + 1e-2)
    with pytest.raises(SystemExit, match=r"op cpu, d=1, against reference: result 0 is off by .*; nothing was timed"):
        run(tmp_path / "report.json", "op")
    assert not any(tmp_path.iterdir()) and "what" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [(["opp"], "invalid choice: 'opp'"), (["op", "--threads", "0"], "a whole number of at least 1")],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_natten_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.rivals, "natten2dav", None)
    run(tmp_path / "report.json", "op")
    notes = [row["note"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]]
    assert sum("make bench-classic" in note for note in notes) == 4 and "make bench-classic" in capsys.readouterr().out
