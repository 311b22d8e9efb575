"""tools/benchmark.py at tiny sizes: the report, and that nothing is timed after a failed parity check."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="torchvision is missing; the benchmark compares with its Swin-T")
import benchmark

from dinat_backbones.ops import BACKENDS

try:
    BACKENDS["cpu"].instruction_set()
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
    bars = {row["bar"] for name, row in rows.items() if row["against"].startswith("natten")}
    assert bars == {">= 15", ">= 18", ">= 25"} and rows["op forward d=1, fraction of floor"]["bar"] == ">= 0.35"
    assert len(rows) == 10 and "op forward d=1" in capsys.readouterr().out


def test_failed_parity_stops(tmp_path, monkeypatch, capsys):
    right = BACKENDS["cpu"].attention
    monkeypatch.setattr(BACKENDS["cpu"], "attention", lambda *arguments: right(*arguments) + 1e-2)
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
    monkeypatch.setattr(benchmark.baselines, "natten2dav", None)
    run(tmp_path / "report.json", "op")
    notes = [row["note"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]]
    assert sum("make bench-classic" in note for note in notes) == 4 and "make bench-classic" in capsys.readouterr().out


def test_gpu_suite_runs_dry(tmp_path, capsys):
    """All of the GPU suite on a CPU: every row has a figure or says why it has none, and the table comes last."""
    out = tmp_path / "gpu.json"
    run(out, "gpu", "--dry-run")
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert {row["against"] for row in rows} >= {"natten without rpb", "FlexAttention with rpb", "torchvision Swin-L"}
    assert all(row["ratio"] or row["note"] for row in rows)
    assert report["curves"] and out.with_suffix(".png").stat().st_size > 1000
    assert "DiNAT-L training step" in capsys.readouterr().out.splitlines()[-1]


def test_gpu_suite_without_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(tmp_path / "gpu.json", "gpu")
    error = capsys.readouterr().err
    assert "needs a GPU" in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_growth_tells_the_backward_pass_apart(monkeypatch):
    def times(self, what, calls, rounds=None):
        return {name: {"forward": 10.0, "forward+backward": 35.0}[name.split(",")[0]] for name in calls}

    monkeypatch.setattr(benchmark.Bench, "times", times)
    monkeypatch.setattr(benchmark.op, "_curves", lambda bench: None)
    rows = {row.name: row for row in benchmark.op.growth_rows(benchmark.Bench(benchmark.TINY, 1, 1))}
    row = rows["op backward, d=4"]
    assert (row.ours, row.against, row.theirs, row.ratio, str(row.bar)) == (25.0, "forward", 10.0, 2.5, "<= 3")
    assert str(rows["op forward, 4x tokens, d=1"].bar) == "<= 4.3" and len(rows) == 6


def test_memory_of_training_steps(monkeypatch):
    peaks = {"DiNAT-Tiny": 100.0, "torchvision Swin-T": 200.0, "torchvision ConvNeXt-T": 50.0}
    monkeypatch.setattr(benchmark.memory, "can_measure", lambda: True)
    monkeypatch.setattr(benchmark.memory, "in_fresh_process", lambda function, model, *arguments: peaks[model])
    rows = benchmark.memory.training_rows(benchmark.Bench(benchmark.TINY, 1, 1))
    assert [(row.against, row.ratio, row.passed) for row in rows] == [
        ("torchvision Swin-T", 0.5, True),
        ("torchvision ConvNeXt-T", 2.0, None),
    ]


def test_sizes_of_the_recipe():
    sizes = benchmark.compiled.recipe_sizes(benchmark.Bench(benchmark.Sizes(), 1, 1))
    assert len(sizes) == 40 and all(side % 32 == 0 for size in sizes for side in size)
    assert min(min(size) for size in sizes) >= 480 and max(max(size) for size in sizes) <= 1344
    assert {height > width for height, width in sizes} == {True, False}


def test_bf16_says_why_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(benchmark.bf16, "bf16_instructions", list)
    monkeypatch.setattr(benchmark.bf16, "backbone", lambda *arguments, **keywords: None)
    monkeypatch.setattr(benchmark.Bench, "speedup", speedup_of_two)
    rows = benchmark.bf16.bf16_rows(benchmark.Bench(benchmark.TINY, 1, 1))
    assert len(rows) == 6 and all("this CPU has no" in row.note and row.passed is None for row in rows)


def speedup_of_two(self, name, ours, against, theirs, bar=None, rounds=None):
    return benchmark.Row(name, 1.0, against, 2.0, 2.0, bar)


@pytest.mark.parametrize(
    "instructions, bars", [(["avx512_bf16"], [">= 2"] * 4), (["amx_bf16"], [">= 2"] * 4 + [">= 2.5", ">= 2.3"])]
)
def test_bf16_bars(monkeypatch, instructions, bars):
    monkeypatch.setattr(benchmark.bf16, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(benchmark.bf16, "backbone", lambda *arguments, **keywords: None)
    monkeypatch.setattr(benchmark.Bench, "speedup", speedup_of_two)
    rows = benchmark.bf16.bf16_rows(benchmark.Bench(benchmark.TINY, 1, 1))
    assert len(rows) == 6 and [str(row.bar) for row in rows if row.bar] == bars


def test_bf16_parity(monkeypatch):
    bench, right = benchmark.Bench(benchmark.TINY, 1, 1), BACKENDS["cpu"].attention
    benchmark.bf16.parity_op_bf16(bench)
    assert all(row.ratio and row.against == "fp32" for row in benchmark.bf16.op_rows(bench))
    monkeypatch.setattr(BACKENDS["cpu"], "attention", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(benchmark.ParityError, match=r"op bf16, 40x44, d=1: result 0 is off by"):
        benchmark.bf16.parity_op_bf16(bench)
