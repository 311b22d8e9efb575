"""checkpoint.py against files written with torch.save directly, in the layouts of published and framework files."""

import functools
import http.server
import logging
import os
import subprocess
import sys
import threading

import numpy
import pytest
import torch

import dinat_backbones
from dinat_backbones import DiNAT, DiNAT_s
from dinat_backbones.checkpoint import backbone_state, load_backbone, read

SMALL = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0)


def trunk(**kwargs):
    return DiNAT(**{**SMALL, **kwargs})


@pytest.fixture(scope="module")
def weights():
    """Random tensors under a small trunk's names, so that nothing can match by being left at its initial value."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in trunk().state_dict().items()}


def save(folder, content, name="file.pth", **kwargs):
    torch.save(content, folder / name, **kwargs)
    return folder / name


def imagenet(weights):
    """A classification file: one norm and a head after the last stage, and none of the trunk's output norms."""
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
    model = trunk()
    report = load_backbone(model, path)
    assert report.complete and not report.missing and set(report.loaded) == set(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_imagenet_file_leaves_only_the_output_norms(tmp_path, weights, caplog):
    model = trunk()
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


def test_prefix_selects_one_of_several_trunks(weights):
    both = {"state_dict": with_prefix(weights, "student.trunk.") | {"teacher.trunk.a": torch.ones(1)}}
    assert backbone_state(both, "student.trunk").keys() == weights.keys()
    assert backbone_state(both, "teacher.trunk.").keys() == {"a"}
    assert backbone_state(both, "stud") == {}


def test_partial_fit_is_reported(tmp_path, weights, caplog):
    state = {name: value for name, value in weights.items() if not name.startswith("levels.3.")}
    state["extra"] = torch.ones(1)
    model = trunk()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        report = load_backbone(model, save(tmp_path, state))
    assert not report.complete and report.unexpected == ("extra",)
    assert set(report.missing) == {name for name in weights if name.startswith("levels.3.")}
    assert "levels.3.blocks.0.norm1.weight" in caplog.text and "extra" in caplog.text
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in report.missing else weights)[name]), name


# ---------------------------------------------------------------------------------------------- not our architecture


def refused(model, path, *words):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_backbone(model, path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(path), type(model).__name__, *words)), message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "model was touched"


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(embed_dim=64, num_heads=[2, 4, 8, 16]), ["patch_embed.proj.0.weight", "[32, 3, 3, 3]", "[16, 3, 3, 3]"]),
        (dict(kernel_size=5), ["attn.rpb", "[1, 9, 9]", "[1, 5, 5]"]),
        (dict(depths=[1, 1, 3, 1]), ["levels.2 has 3 blocks in the file and 2 in the model"]),
        (dict(depths=[1, 1, 1, 1]), ["levels.2 has 1 blocks in the file and 2 in the model"]),
        (dict(layer_scale=1e-5), ["file has layer scale"]),
    ],
)
def test_other_architecture_is_refused(tmp_path, other, words):
    refused(trunk(), save(tmp_path, imagenet(trunk(**other).state_dict())), *words)


def test_layer_scale_of_the_model_only_is_refused(tmp_path, weights):
    refused(trunk(layer_scale=1e-5), save(tmp_path, weights), "model has layer scale")


def test_published_architecture_is_named(tmp_path):
    path = save(tmp_path, {"state_dict": DiNAT("dinat_tiny").state_dict()})
    refused(DiNAT("dinat_mini"), path, "levels.2 has 18 blocks in the file and 6 in the model", "dinat_tiny")


@pytest.mark.parametrize(
    "content, words",
    [
        ({"layer1.0.conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)}, ["layer1.0.conv1.weight", "fc.bias"]),
        ({"patch_embed.norm.weight": torch.ones(32)}, ["patch_embed.norm.weight"]),
        ({"epoch": 3}, ["no tensors"]),
    ],
)
def test_nothing_fits(tmp_path, content, words):
    refused(trunk(), save(tmp_path, content), "nothing in", "patch_embed.proj.0.weight", *words)


def test_families_do_not_mix(tmp_path, weights):
    path = save(tmp_path, weights)
    refused(DiNAT_s(**SMALL), path, "nothing in", "patch_embed.proj.0.weight", "patch_embed.proj.weight")


# ------------------------------------------------------------------------------------------------------ unsafe, broken


class Trap:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_does_not_run(tmp_path, weights, legacy):
    folder = tmp_path / "made by the pickle"
    content = {"state_dict": weights, "meta": Trap(os.mkdir, str(folder))}
    path = save(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"mkdir.*allow_pickle=True"):
        read(path)
    assert not folder.exists()
    assert read(path, allow_pickle=True)["state_dict"].keys() == weights.keys()
    assert folder.exists()  # the trap does work


def test_getattr_of_a_pickle_reaches_nothing(tmp_path, weights):
    """mmengine's own files call `getattr`; here it must lead nowhere: neither to a value nor to something to call."""
    found = read(save(tmp_path, {"a": Trap(getattr, {}, "update"), "state_dict": weights}))["a"]
    assert not callable(found) and not vars(found)


def test_mmengine_bookkeeping_is_read_without_code(tmp_path, weights):
    """A file as mmengine's runner writes it, read where mmengine cannot even be imported."""
    logging_ = pytest.importorskip("mmengine.logging", reason="mmengine, which writes such files, is not installed")
    history = logging_.HistoryBuffer([1.0, 2.0], [1, 1])
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"loss": numpy.float64(1.5), "all": numpy.arange(3)}}
    path = save(tmp_path, {"meta": {"epoch": 1}, "state_dict": with_prefix(weights, "backbone."), "message_hub": hub})
    script = (
        "import sys; sys.modules['mmengine'] = None\n"
        "from dinat_backbones.checkpoint import backbone_state, read\n"
        "file = read(sys.argv[1]); print(file['meta'], len(backbone_state(file)), 'mmengine.logging' in sys.modules)"
    )
    root = os.path.dirname(os.path.dirname(dinat_backbones.__file__))
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=root)
    assert run.stdout.strip() == f"{{'epoch': 1}} {len(weights)} False", run.stderr


def _cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.999])
def test_truncated_file(tmp_path, weights, keep, legacy):
    path = save(tmp_path, weights, _use_new_zipfile_serialization=not legacy)
    _cut(path, keep)
    refused_read(path, "truncated")
    with pytest.raises(ValueError, match="truncated"):
        load_backbone(trunk(), path)


def refused_read(path, *words):
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(path), *words)), message


@pytest.mark.parametrize("content", [b"<html>not found</html>", bytes(range(256)) * 8, b"PK\x03\x04 cut", b"\x80\x02."])
def test_not_a_checkpoint(tmp_path, content):
    (tmp_path / "file.pth").write_bytes(content)
    refused_read(tmp_path / "file.pth", "no checkpoint")


def test_not_a_dictionary(tmp_path):
    refused_read(save(tmp_path, torch.ones(3)), "Tensor", "state dict")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth is not there"):
        read(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read(tmp_path)


# ------------------------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server over a folder; torch.hub's cache is another one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): ...

    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{running.server_port}", tmp_path / "cache/hub/checkpoints"
        running.shutdown()


def test_address_is_downloaded_once(server, weights):
    folder, address, cache = server
    save(folder, weights, "a.pth")
    for _ in range(2):  # the second time from the cache
        assert all(torch.equal(value, weights[name]) for name, value in read(f"{address}/a.pth?x=1").items())
        (folder / "a.pth").unlink(missing_ok=True)
    assert [file.name for file in cache.iterdir()] == ["a.pth"]


def test_offline_names_file_and_place(server):
    _, address, cache = server
    with pytest.raises(FileNotFoundError) as caught:
        read(f"{address}/b.pth")
    assert f"{address}/b.pth" in str(caught.value) and str(cache / "b.pth") in str(caught.value)
    assert list(cache.iterdir()) == []
