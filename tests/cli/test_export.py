"""`dinat export` and the backend that it uses: exported models equal the eager ones, at sizes the export never saw."""

import dataclasses
import sys

import pytest
import torch

import dinat_backbones
from dinat_backbones import zoo
from dinat_backbones.cli import export
from dinat_backbones.ops import padding, symbolic
from helpers import assert_near, draw, fill_by_name, run, sample

SMALL = dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[5], [2]], mlp_ratio=2.0)
needs_export = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason=f"torch {torch.__version__} is too old for the export tool"
)


def small(family: str) -> export.Exported:
    model = fill_by_name(getattr(dinat_backbones, family)(**SMALL)).eval()
    return export.Exported(model, ("stage0", "stage1"))


def test_op_against_reference():
    """60 of the shapes of test_ops.py in float64: borders, exactly K * d, dilations up to 28; all gradients."""
    for index in range(3000, 3060):
        case = sample(index)
        call = draw(*case["shape"], case["kernel_size"], rpb=case["rpb"], fused=case["fused"], seed=index)
        settings = dict(kernel_size=case["kernel_size"], dilation=case["dilation"])
        expected = run(*call, backend="reference", **settings)
        for a, b in zip(run(*call, backend="exportable", **settings), expected, strict=True):
            assert (a - b).abs().max() < 1e-11, case


@needs_export
@pytest.mark.parametrize("family", ["DiNAT", "DiNAT_s"])
def test_open_sizes(family, tmp_path):
    """One graph for maps that are padded (less than 15 pixels in the first stage) and maps that are not, for even and
    odd sizes and several batches, in torch.export and in onnxruntime."""
    pytest.importorskip("onnxruntime", reason='onnxruntime is missing: pip install "dinat_backbones[export]"')
    model = small(family)
    graph = export.program(model, (61, 98), dynamic_batch=True, dynamic_size=True)
    if family == "DiNAT":
        assert export.least_size(graph) == "9x9"  # two pixels at stride 8
    cases = [(1, 61, 98), (3, 33, 40), (1, 160, 57), (2, 64, 64), (1, 18, 23)]
    for form, (write, load) in export.FORMATS.items():
        path = tmp_path / f"model{export.SUFFIX[form]}"
        write(model, graph, 18, path)  # refuses operators that are not the standard's
        assert export.check(model, load(path), cases) <= 1e-4


@needs_export
def test_fixed_size_through_the_tool(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason='onnxruntime is missing: pip install "dinat_backbones[export]"')
    monkeypatch.setattr(export, "build", lambda *arguments: small("DiNAT"))
    out = tmp_path / "new" / "model.onnx"
    export.main(["dinat_mini", "--size", "40x70", "--dynamic-batch", "--check", "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    said = capsys.readouterr().out
    assert "opset 18" in said and "1x3x40x70: largest error" in said and "3x3x40x70: largest error" in said

    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    wrong = tmp_path / "other" / "model.onnx"
    with pytest.raises(SystemExit, match="nothing was written"):
        export.main(["dinat_mini", "--size", "40x70", "--check", "--out", str(wrong)])
    assert not any(wrong.parent.iterdir())


@needs_export
def test_classifiers(tmp_path, monkeypatch, capsys):
    """With the head of a file for other classes; logits are those of the classifier, which has 5 blocks here."""
    runtime = pytest.importorskip("onnxruntime", reason='onnxruntime is missing: pip install "dinat_backbones[export]"')
    monkeypatch.setitem(zoo.ARCHS, "dinat_mini", dataclasses.replace(zoo.ARCHS["dinat_mini"], depths=(2, 1, 1, 1)))
    torch.manual_seed(0)
    classifier = dinat_backbones.create_classifier("dinat_mini", 7).eval()
    assert classifier.dilations == ((1, 8), (4,), (2,), (1,))
    torch.save(classifier.state_dict(), tmp_path / "file.pth")
    words = ["--checkpoint", str(tmp_path / "file.pth"), "--size", "64x96", "--out", str(tmp_path / "model.onnx")]
    export.main(["dinat_mini", "--classifier", *words])
    assert "opset 18" in capsys.readouterr().out
    image = torch.randn(1, 3, 64, 96)
    (logits,) = runtime.InferenceSession(str(tmp_path / "model.onnx")).run(["logits"], {"image": image.numpy()})
    with torch.no_grad():
        assert_near([torch.from_numpy(logits)], [classifier(image)], 1e-4)
    names = export.build("nat_isotropic_small", None, None).outputs, export.build("nat_mini", None, None, True).outputs
    assert names == (("logits",), ("logits",))
    with pytest.raises(export.ExportError, match="the classifier of that name is exported with --classifier"):
        export.build("dinat_mini", None, None)


def test_the_legacy_exporter_names_the_way_out(tmp_path):
    pytest.importorskip("onnx", reason='onnx is missing: pip install "dinat_backbones[export]"')
    kwargs = {} if torch.__version__ < "2.5" else dict(dynamo=False)
    model, image = small("DiNAT").model, torch.randn(1, 3, 64, 80)
    with pytest.raises(
        RuntimeError, match=r"legacy ONNX exporter .* use torch.onnx.export\(..., dynamo=True\) or `dinat"
    ):
        torch.onnx.export(model, (image,), str(tmp_path / "model.onnx"), **kwargs)
    fixed = dinat_backbones.DiNAT(**SMALL, backend="exportable").eval()
    torch.onnx.export(fixed, (image,), str(tmp_path / "model.onnx"), opset_version=17, **kwargs)
    runtime = pytest.importorskip("onnxruntime", reason='onnxruntime is missing: pip install "dinat_backbones[export]"')
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        assert_near([torch.from_numpy(value) for value in got], fixed(image), 1e-4)


def test_nothing_changes_without_export():
    query = torch.zeros(1, 9, 9, 1, 8)
    assert symbolic.exporting() is False
    assert symbolic.new_size(5, 1) == 5
    assert padding.positions_missing(9, 12) == 3 and padding.positions_missing(12, 9) == 0
    assert torch.equal(padding.crop(query, 4, 5), query[:, :4, :5])


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_average_pool(bins):
    x = torch.randn(2, 3, 17, 20, dtype=torch.float64)
    assert torch.allclose(export.AveragePool(bins)(x), torch.nn.AdaptiveAvgPool2d(bins)(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dinat_huge"], "dinat_huge is neither a config nor one of: nat_mini"),
        (["dinat_mini"], "needs --dilations"),
        (["dinat_mini", "--dilations", "coco", "--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["upernet_dinat_mini", "--dilations", "coco"], "--dilations coco goes with the name of a backbone"),
        (["dinat_mini", "--size", "40"], "expected HEIGHTxWIDTH such as 800x1280, not '40'"),
        (["dinat_mini", "--opset", "13"], "--opset 13: expected 17 at least"),
        (["dinat_mini", "--out", "model.txt"], "expected a name that ends in .onnx"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        export.main(["--size", "64x64", *arguments])
    assert message in (capsys.readouterr().err + str(stopped.value))
    assert not any(tmp_path.iterdir())


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(export.importlib, "import_module", _no_onnx)
    with pytest.raises(export.ExportError, match=r'onnx is not installed: pip install "dinat_backbones\[export\]"'):
        export._optional_package("onnx")


def _no_onnx(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
