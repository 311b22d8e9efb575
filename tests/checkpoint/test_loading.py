"""checkpoint.py against files written with torch.save directly, in the layouts of published and framework files."""

import logging

import numpy
import pytest
import torch

from dinat_backbones import DiNAT, DiNAT_s
from dinat_backbones.checkpoint import backbone_state, load_backbone, load_model, read, resize_rpb

SMALL = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0)


def backbone(**kwargs):
    return DiNAT(**{**SMALL, **kwargs})


@pytest.fixture(scope="module")
def weights():
    """Random tensors under a small backbone's names, so that nothing can match by being left at its initial value."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in backbone().state_dict().items()}


def save(folder, content, name="file.pth", **kwargs):
    torch.save(content, folder / name, **kwargs)
    return folder / name


def imagenet(weights):
    """A classification file: one norm and a head after the last stage, and none of the backbone's output norms."""
    state = {name: value for name, value in weights.items() if not name.startswith("norm")}
    return state | {"norm.weight": torch.ones(256), "norm.bias": torch.ones(256), "head.weight": torch.ones(9, 256)}


def with_prefix(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


LAYOUTS = {
    "bare": lambda w: w,
    "timm": lambda w: {"state_dict": w | {"head.weight": torch.ones(9, 256)}, "epoch": 3, "args": None},
    "data parallel": lambda w: {"model": with_prefix(w, "module.")},
    "mmdet": lambda w: {
        "meta": {"epoch": 36, "CLASSES": ("person", "bicycle")},
        "state_dict": {**with_prefix(w, "backbone."), "neck.conv.weight": torch.ones(3), "head.bias": torch.ones(2)},
        "optimizer": {"state": {0: {"step": 1}}},
    },
    "mmdet, data parallel": lambda w: {"state_dict": with_prefix(w, "module.backbone.")},
    "detectron2": lambda w: {"model": with_prefix(w, "backbone."), "iteration": 7},
    "detectron2 with a feature pyramid": lambda w: {"model": with_prefix(w, "backbone.bottom_up.")},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(tmp_path, weights, layout, legacy):
    path = save(tmp_path, LAYOUTS[layout](weights), _use_new_zipfile_serialization=not legacy)
    model = backbone()
    report = load_backbone(model, path)
    assert report.complete and not report.missing and set(report.loaded) == set(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_imagenet_file_leaves_only_the_output_norms(tmp_path, weights, caplog):
    model = backbone()
    with caplog.at_level(logging.WARNING):
        report = load_backbone(model, save(tmp_path, {"model": imagenet(weights)}))
    norms = {f"norm{i}.{name}" for i in range(4) for name in ("weight", "bias")}
    assert set(report.missing) == norms and report.complete and not report.unexpected and not caplog.records
    for name, value in model.state_dict().items():
        expected = torch.full_like(value, name.endswith("weight")) if name in norms else weights[name]
        assert torch.equal(value, expected), name


def test_safetensors(tmp_path, weights):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "file.safetensors"
    safetensors.save_file(weights, path)
    assert all(torch.equal(value, weights[name]) for name, value in read(path).items())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"file\.safetensors .*truncated"):
        read(path)


def test_prefix_selects_one_of_several_backbones(weights):
    both = {"state_dict": with_prefix(weights, "student.backbone.") | {"teacher.backbone.a": torch.ones(1)}}
    assert backbone_state(both, "student.backbone").keys() == weights.keys()
    assert backbone_state(both, "teacher.backbone.").keys() == {"a"}
    assert backbone_state(both, "stud") == {}


def test_partial_fit_is_reported(tmp_path, weights, caplog):
    state = {name: value for name, value in weights.items() if not name.startswith("levels.3.")}
    state["extra"] = torch.ones(1)
    model = backbone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        report = load_backbone(model, save(tmp_path, state))
    assert not report.complete and report.unexpected == ("extra",)
    assert set(report.missing) == {name for name in weights if name.startswith("levels.3.")}
    assert "levels.3.blocks.0.norm1.weight" in caplog.text and "extra" in caplog.text
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in report.missing else weights)[name]), name


# ------------------------------------------------------------------------------------------------------ bias tables


def cubic(line, size):
    """Cubic convolution (Keys, a = -0.75) at the centres of `size` cells, borders repeated: in float64, one by one."""

    def weight(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    out = []
    for i in range(size):
        centre = (i + 0.5) * len(line) / size - 0.5
        left = int(numpy.floor(centre)) - 1
        near = range(left, left + 4)
        out.append(sum(weight(centre - j) * line[min(max(j, 0), len(line) - 1)] for j in near))
    return numpy.array(out)


@pytest.mark.parametrize("old, new", [(7, 11), (3, 5), (11, 7)])
def test_bias_tables_are_resized_bicubically_head_by_head(old, new):
    table = torch.randn(3, 2 * old - 1, 2 * old - 1, generator=torch.Generator().manual_seed(0))
    resized = resize_rpb(table, new)
    assert resized.shape == (3, 2 * new - 1, 2 * new - 1) and resized.dtype == table.dtype
    for head, got in zip(table.double().numpy(), resized.numpy(), strict=True):
        rows = numpy.array([cubic(row, 2 * new - 1) for row in head])
        expected = numpy.array([cubic(column, 2 * new - 1) for column in rows.T]).T
        assert numpy.abs(got - expected).max() < 1e-5
    assert torch.equal(resize_rpb(table, old), table)


@pytest.mark.parametrize("shape, kernel_size", [((13, 13), 11), ((2, 13, 12), 11), ((2, 15, 15), 11), ((2, 13, 13), 8)])
def test_what_is_no_bias_table_is_refused(shape, kernel_size):
    with pytest.raises(ValueError, match="odd"):
        resize_rpb(torch.zeros(shape), kernel_size)


def test_another_kernel_size_is_loaded_resized_and_said(tmp_path, weights, caplog):
    model = backbone(kernel_size=5)
    with caplog.at_level(logging.INFO):
        report = load_backbone(model, save(tmp_path, {"model": imagenet(weights)}))
    tables = {name for name in weights if name.endswith("rpb")}
    assert report.complete and set(report.resized) == tables and len(tables) == 5
    assert "5 rpb tables resized" in caplog.text
    for name in report.loaded:
        expected = resize_rpb(weights[name], 5) if name in tables else weights[name]
        assert torch.equal(model.state_dict()[name], expected), name


# -------------------------------------------------------------------------------------------------------- whole models


def test_a_whole_model_is_loaded_entirely_or_not_at_all(tmp_path, weights):
    for content in ({"state_dict": weights}, {"model": with_prefix(weights, "module.")}):
        model = backbone()
        load_model(model, save(tmp_path, content))
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    wrong = dict(weights, extra=torch.ones(1))
    wrong["norm0.weight"] = torch.ones(7)
    del wrong["norm3.bias"]
    path = save(tmp_path, wrong)
    words = ["1 tensors are not in the file: norm3.bias", "1 tensors are not in the model: extra", "is [7] in the file"]
    refused(backbone(), path, *words, load=load_model)


# ---------------------------------------------------------------------------------------------- not our architecture


def refused(model, path, *words, load=load_backbone):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load(model, path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(path), type(model).__name__, *words)), message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "model was touched"


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(embed_dim=64, num_heads=[2, 4, 8, 16]), ["patch_embed.proj.0.weight", "[32, 3, 3, 3]", "[16, 3, 3, 3]"]),
        (dict(depths=[1, 1, 3, 1]), ["levels.2 has 3 blocks in the file and 2 in the model"]),
        (dict(depths=[1, 1, 1, 1]), ["levels.2 has 1 blocks in the file and 2 in the model"]),
        (dict(layer_scale=1e-5), ["file has layer scale"]),
    ],
)
def test_other_architecture_is_refused(tmp_path, other, words):
    refused(backbone(), save(tmp_path, imagenet(backbone(**other).state_dict())), *words)


def test_layer_scale_of_the_model_only_is_refused(tmp_path, weights):
    refused(backbone(layer_scale=1e-5), save(tmp_path, weights), "model has layer scale")


def test_published_architecture_is_named(tmp_path):
    path = save(tmp_path, {"state_dict": DiNAT("dinat_tiny", dilations="coco").state_dict()})
    refused(
        DiNAT("dinat_mini", dilations="coco"),
        path,
        "levels.2 has 18 blocks in the file and 6 in the model",
        "dinat_tiny",
    )


@pytest.mark.parametrize(
    "content, words",
    [
        ({"layer1.0.conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)}, ["layer1.0.conv1.weight", "fc.bias"]),
        ({"patch_embed.norm.weight": torch.ones(32)}, ["patch_embed.norm.weight"]),
        ({"epoch": 3}, ["no tensors"]),
    ],
)
def test_nothing_fits(tmp_path, content, words):
    refused(backbone(), save(tmp_path, content), "nothing in", "patch_embed.proj.0.weight", *words)


def test_families_do_not_mix(tmp_path, weights):
    path = save(tmp_path, weights)
    refused(DiNAT_s(**SMALL), path, "nothing in", "patch_embed.proj.0.weight", "patch_embed.proj.weight")
