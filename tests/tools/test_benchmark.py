"""tools/benchmark.py at tiny sizes: the report, and that nothing is timed after a failed parity check."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is missing; the benchmark compares with its Swin-T")
import benchmark
from torch._dynamo import OptimizedModule

from dinat_backbones.backbone import DiNAT
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


def speedup_of_two(self, name, ours, against, theirs, bar=None, rounds=None):
    return benchmark.Row(name, 1.0, against, 2.0, 2.0, bar)


def test_bf16_says_why_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(benchmark.bf16, "bf16_instructions", list)
    monkeypatch.setattr(benchmark.bf16, "backbone", lambda *arguments, **keywords: torch.nn.Identity())
    monkeypatch.setattr(benchmark.Bench, "speedup", speedup_of_two)
    rows = benchmark.bf16.bf16_rows(benchmark.Bench(benchmark.TINY, 1, 1))
    assert len(rows) == 10 and all("this CPU has no" in row.note and row.passed is None for row in rows)


@pytest.mark.parametrize(
    "instructions, bars",
    [(["avx512_bf16"], [">= 2"] * 4), (["amx_bf16"], [">= 2"] * 4 + [">= 2.5", ">= 2.5", ">= 2.3"] * 2)],
)
def test_bf16_bars(monkeypatch, instructions, bars):
    monkeypatch.setattr(benchmark.bf16, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(benchmark.bf16, "backbone", lambda *arguments, **keywords: torch.nn.Identity())
    monkeypatch.setattr(benchmark.Bench, "speedup", speedup_of_two)
    rows = benchmark.bf16.bf16_rows(benchmark.Bench(benchmark.TINY, 1, 1))
    assert len(rows) == 10 and [str(row.bar) for row in rows if row.bar] == bars


def test_bf16_parity(monkeypatch):
    bench, right = benchmark.Bench(benchmark.TINY, 1, 1), BACKENDS["cpu"].attention
    benchmark.bf16.parity_op_bf16(bench)
    assert all(row.ratio and row.against == "fp32" for row in benchmark.bf16.op_rows(bench))
    monkeypatch.setattr(BACKENDS["cpu"], "attention", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(benchmark.ParityError, match=r"op bf16, 40x44, d=1: result 0 is off by"):
        benchmark.bf16.parity_op_bf16(bench)


@pytest.fixture
def small_models(monkeypatch):
    """Models of one block a stage in place of DiNAT-Tiny and Swin-T."""
    swin = benchmark.baselines.SwinPyramid
    small = dict(depths=[1, 1], num_heads=[1, 2], embed_dim=8, mlp_ratio=2.0, dilations=[[1], [2]], kernel_size=3)
    monkeypatch.setattr(benchmark.compiled, "backbone", lambda arch, **settings: DiNAT(**small, **settings))
    monkeypatch.setattr(
        benchmark.baselines, "SwinPyramid", lambda **settings: swin(8, (1, 1, 1, 1), (1, 1, 1, 1), **settings)
    )


def test_compiled_training_steps(small_models):
    rows = benchmark.compiled.train_step_rows(benchmark.Bench(benchmark.TINY, 1, 1))
    assert [(row.against, str(row.bar)) for row in rows] == [
        ("eager", "None"),
        ("torchvision Swin-T, compiled", ">= 1.25"),
    ]
    assert all(row.ratio == pytest.approx(row.theirs / row.ours) for row in rows)


def test_compiled_training_steps_without_swin(small_models):
    """On AVX-512, torch 2.11 generates C++ code for Swin that does not compile."""

    def compiler(graph, inputs):
        if "features" in graph.code:  # a module of Swin
            raise RuntimeError("C++ compile error")
        return graph

    sizes = dataclasses.replace(benchmark.TINY, compiler=compiler)
    eager, swin = benchmark.compiled.train_step_rows(benchmark.Bench(sizes, 1, 1))
    assert eager.ratio and "fails on torchvision Swin-T" in swin.note and "C++ compile error" in swin.note
    assert swin.ours is None and swin.passed is None


@pytest.mark.parametrize("index, what", [(0, "outputs: result 0"), (-1, "gradients over the largest of them")])
def test_compiled_model_that_differs(small_models, monkeypatch, index, what):
    right = benchmark.compiled.forward_backward

    def wrong(model, image):
        results = list(right(model, image))
        if isinstance(model, OptimizedModule):
            results[index] = results[index] + 1e-2
        return results

    monkeypatch.setattr(benchmark.compiled, "forward_backward", wrong)
    with pytest.raises(benchmark.ParityError, match=f"DiNAT-Tiny compiled, {what}"):
        benchmark.compiled.train_step_rows(benchmark.Bench(benchmark.TINY, 1, 1))


def test_detectors(tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
    run(tmp_path / "report.json", "detectors")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["against"], row["unit"]) for row in rows] == [
        ("mmdet Swin-T", "images/s"),
        ("mmdet ResNet-50", "images/s"),
    ]
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) and row["bar"] == "" for row in rows)


def test_detectors_do_the_same_work():
    class Found(list):
        masks = [0] * 10

    sizes, check = benchmark.TINY, benchmark.detectors.check_same_work
    check("Swin-T", lambda: ([0] * 50, Found([0] * 10)), sizes)
    for proposals, detections, message in ((49, 10, "49 proposals, expected 50"), (50, 9, "9 detections, expected 10")):
        with pytest.raises(benchmark.ParityError, match=f"Mask R-CNN with Swin-T: {message}"):
            check("Swin-T", lambda n=proposals, m=detections: ([0] * n, Found([0] * m)), sizes)
    parts = dict(data_preprocessor={}, rpn_head={}, roi_head={}, test_cfg={})
    with pytest.raises(benchmark.ParityError, match="test_cfg with Swin-T is not that with DiNAT-Mini"):
        benchmark.detectors.check_same_heads({"DiNAT-Mini": parts, "Swin-T": parts | dict(test_cfg=1)})


def test_missing_mmdet_is_said(monkeypatch):
    monkeypatch.setattr(benchmark.detectors, "find_spec", lambda name: None)
    bench = benchmark.Bench(benchmark.TINY, 1, 1)
    benchmark.detectors.parity_detectors(bench)
    rows = benchmark.detectors.detector_rows(bench)
    assert [row.note for row in rows] == ['needs mmdet: pip install "dinat_backbones[openmmlab]"'] * 2
