"""adapters/openmmlab/ through the registries of mmengine, mmdet and mmseg; the tools in front of their scripts."""

import importlib
import json
import logging
import subprocess
import sys

import pytest
import torch

import dinat_backbones
from helpers import ROOT, assert_near, environment

pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, Sequential
from mmengine.registry import MODELS, DefaultScope

from dinat_backbones import zoo
from dinat_backbones.adapters import openmmlab

SMALL = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0)
FAMILIES = ["NAT", "DiNAT", "DiNAT_s"]


def build(family="DiNAT", registry=MODELS, **kwargs):
    return registry.build(dict(type=family, **{**SMALL, **kwargs}))


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def copy(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def file(tmp_path):
    """A checkpoint of a detector, and the backbone's tensors in it."""
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) for name, value in dinat_backbones.DiNAT(**SMALL).state_dict().items()}
    path = tmp_path / "file.pth"
    torch.save({"meta": {}, "state_dict": {f"backbone.{name}": value for name, value in state.items()}}, path)
    return str(path), state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("framework", ["mmengine", "mmdet", "mmseg"])
def test_registered_once_for_all_frameworks(framework, family):
    reason = f"{framework} is not installed: pip install 'dinat_backbones[openmmlab]'"
    registry = pytest.importorskip(f"{framework}.registry", reason=reason).MODELS
    with DefaultScope.overwrite_default_scope(framework):
        model = build(family, registry)
    backbone = getattr(dinat_backbones, family)
    assert type(model) is getattr(openmmlab, family) and isinstance(model, (backbone, BaseModule))
    assert list(model.state_dict()) == list(backbone(**SMALL).state_dict())


def test_second_import_is_fine():
    try:
        importlib.reload(openmmlab)
        assert type(build("NAT")) is openmmlab.NAT
    finally:
        importlib.reload(openmmlab)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a detector"])
@pytest.mark.parametrize("how", ["pretrained", "init_cfg", "init_cfg list", "prefix"])
def test_init_weights_loads_the_checkpoint(file, how, inside):
    path, state = file
    cfg = dict(type="Pretrained", checkpoint=path)
    kwargs = {
        "pretrained": dict(pretrained=path),
        "init_cfg": dict(init_cfg=cfg),
        "init_cfg list": dict(init_cfg=[dict(type="Constant", layer="Linear", val=2.0), cfg]),
        "prefix": dict(init_cfg=cfg | dict(prefix="backbone.")),
    }[how]
    model = build(**kwargs)
    assert not same(model, state)  # mmengine's moment is init_weights()
    (Sequential(model) if inside else model).init_weights()
    assert same(model, state) and model.is_init


def test_published_checkpoints_go_by_their_names(monkeypatch, file):
    path, state = file
    monkeypatch.setitem(zoo.PRETRAINED, "dinat_mini", path)
    for arguments in (dict(pretrained="dinat_mini"), dict(init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"))):
        model = build(**arguments)
        model.init_weights()
        assert same(model, state)


def test_arch_needs_dilations():
    with torch.device("meta"):
        assert MODELS.build(dict(type="DiNAT", arch="dinat_mini", dilations="coco")).dilations[0] == (1, 28, 1)
        with pytest.raises(ValueError, match=r"DiNAT\(arch='dinat_mini'\) needs dilations=.*'coco' \(detection"):
            MODELS.build(dict(type="DiNAT", arch="dinat_mini"))


def test_without_checkpoint_the_weights_stay_those_of_the_backbone():
    model = build()
    before = copy(model)
    model.init_weights()
    assert same(model, before)


def test_later_weights_survive_a_second_call(file):
    path, _ = file
    model = build(pretrained=path)
    model.init_weights()
    torch.nn.init.zeros_(model.norm0.weight)
    model.init_weights()  # mmengine only warns
    assert not model.norm0.weight.any()


def test_pretrained_and_init_cfg_exclude_each_other():
    with pytest.raises(ValueError, match=r"both pretrained='a\.pth' and init_cfg=.*use init_cfg"):
        build(pretrained="a.pth", init_cfg=dict(type="Pretrained", checkpoint="b.pth"))


def test_missing_file_matters_only_for_training(tmp_path):
    model = build(pretrained=str(tmp_path / "nowhere.pth"))  # testing a trained detector must not need it
    for _ in range(2):  # and a second try must not pass as done
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth is not there"):
            model.init_weights()


def test_nothing_fits_and_partial_fit(tmp_path, file):
    path, state = file
    model = build("DiNAT_s", pretrained=path)
    before = copy(model)
    with pytest.raises(ValueError, match=r"nothing in .*file\.pth fits DiNAT_s"):
        model.init_weights()
    assert same(model, before)

    del state["levels.0.blocks.0.attn.rpb"]
    torch.save(state | {"levels.0.blocks.0.attn.extra": torch.ones(1)}, path)
    model, records = build(pretrained=path), []
    handler = logging.Handler()
    handler.emit = records.append
    MMLogger.get_current_instance().addHandler(handler)
    try:
        model.init_weights()
    finally:
        MMLogger.get_current_instance().removeHandler(handler)
    (record,) = [r for r in records if r.levelno == logging.WARNING]
    assert "levels.0.blocks.0.attn.rpb" in record.getMessage() and "attn.extra" in record.getMessage()


def test_freezing_and_train_are_the_backbones():
    detector = Sequential(build(frozen_stages=2))
    model = detector[0]
    detector.init_weights()
    detector.eval()
    detector.train()
    frozen = ("patch_embed.", "levels.0.", "levels.1.", "norm0.", "norm1.")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(frozen), name
    for name, module in model.named_modules():
        expected = not (f"{name}.".startswith(frozen) or name == "pos_drop")
        assert module.training is expected, name


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = build(with_cp=with_cp, drop_path_rate=0.0)
        sum(out.square().mean() for out in model(torch.randn(1, 3, 40, 40))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_near(*gradients)


def test_without_mmengine_the_error_says_what_to_install():
    script = "import sys; sys.modules['mmengine'] = None; import dinat_backbones.adapters.openmmlab"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    expected = 'openmmlab needs mmengine: pip install "dinat_backbones[openmmlab]"'
    assert run.stderr.strip().splitlines()[-1].endswith(expected), run.stderr


# --------------------------------------------------------------------------------------------------------------- tools


def tool(name, *arguments, cwd=None):
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "nowhere.py"], "dinat train: config nowhere.py is not there"),
        (["test", "config.py", "nowhere.pth"], "dinat test: checkpoint nowhere.pth is not there"),
        (["train", "config.py", "--resume", "nowhere.pth"], "dinat train: checkpoint nowhere.pth is not there"),
    ],
)
def test_missing_files_are_named(tmp_path, command, words, message):
    (tmp_path / "config.py").write_text("default_scope = 'mmdet'")
    assert command(*words) == message


def test_tools_explain_what_is_missing(tmp_path):
    """In one line, without warnings of what has been imported before."""
    (tmp_path / "config.py").write_text("default_scope = 'mmnothing'")
    run = tool("train.py", "config.py", cwd=tmp_path)
    message = "mmnothing with its packaged tools is not installed"
    assert run.returncode == 1 and message in run.stderr and len(run.stderr.strip().splitlines()) == 1, run.stderr


FAKE = """
import sys, pathlib
assert __name__ == "__main__"
print(pathlib.Path(__file__).parts[-4], pathlib.Path(__file__).name, sys.argv[1:])
"""


# Runs several command lines of scripts, one after the other.
RUN_EACH = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")
"""


def test_tools_run_the_script_of_the_right_framework(tmp_path):
    """Against stand-ins for both packages, which print what they were called with."""
    cases = [
        ("mmdet", "train.py", ["--resume", "A.pth", "--auto-scale-lr"], ["--resume", "A.pth", "--auto-scale-lr"]),
        ("mmdet", "test.py", ["A.pth", "--tta"], ["A.pth", "--tta"]),
        ("mmseg", "train.py", ["--resume", "--amp"], ["--resume", "--amp"]),
        (
            "mmseg",
            "train.py",
            ["--auto-scale-lr", "--resume", "A.pth", "--amp"],
            ["--resume", "--amp", "--cfg-options", "auto_scale_lr.enable=True", "load_from=A.pth"],
        ),
        ("mmseg", "test.py", ["A.pth", "--out", "folder"], ["A.pth", "--out", "folder"]),
    ]
    for package in ("mmdet", "mmseg"):
        folder = tmp_path / package / ".mim" / "tools"
        folder.mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        for name in ("train.py", "test.py"):
            (folder / name).write_text(FAKE)
        (tmp_path / f"{package}_config.py").write_text(f"default_scope = {package!r}")
    (tmp_path / "A.pth").touch()
    lines = [[str(ROOT / "tools" / name), f"{scope}_config.py", *words] for scope, name, words, _ in cases]
    run = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps(lines)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path, ROOT / "tools"),
    )
    expected = [f"{scope} {name} {[f'{scope}_config.py', *words]}" for scope, name, _, words in cases]
    assert run.returncode == 0 and run.stdout.strip().splitlines()[-5:] == expected, run.stdout + run.stderr
