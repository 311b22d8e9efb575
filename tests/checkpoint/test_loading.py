"""checkpoint.py against files written with torch.save directly, in the layouts of published and framework files."""

import hashlib
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
from dinat_backbones.checkpoint import Inert, backbone_state, fetch, load_backbone, load_model, read, resize_rpb

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
    refused(DiNAT("dinat_mini", dilations="coco"), path, "levels.2 has 18 blocks in the file and 6 in the model", "dinat_tiny")


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
    """mmengine's own files call `getattr`; here it must lead to no value and to nothing that does anything."""
    found = read(save(tmp_path, {"a": Trap(getattr, {}, "update"), "state_dict": weights}))["a"]
    assert isinstance(found, Inert) and isinstance(found("anything"), Inert)
    assert found.name == "builtins.getattr" and found.arguments == ({}, "update") and found.state is None


def test_mmengine_bookkeeping_is_read_without_code(tmp_path, weights):
    """A file as mmengine's runner writes it, read where mmengine cannot even be imported."""
    logging_ = pytest.importorskip("mmengine.logging", reason="mmengine, which writes such files, is not installed")
    history = logging_.HistoryBuffer([1.0, 2.0], [1, 1])
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"loss": numpy.float64(1.5), "all": numpy.arange(3)}}
    path = save(tmp_path, {"meta": {"epoch": 1}, "state_dict": with_prefix(weights, "backbone."), "message_hub": hub})
    script = (
        "import sys; sys.modules['mmengine'] = None\n"
        "from dinat_backbones.checkpoint import Inert, backbone_state, read\n"
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
        load_backbone(backbone(), path)


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


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `files` with an ETag and, as RFC 9110 says, the rest of a file by If-Range and Range.

    A connection breaks off after `server.breaks_after` bytes.
    """

    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        content = self.server.files.get(self.path.split("?")[0])
        if content is None:
            return self.send_error(404)
        tag = f'"{hashlib.md5(content).hexdigest()}"' if self.server.tags else None
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if self.headers.get("If-Range") != tag:
            start = 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", len(content) - start)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.breaks_after])

    def log_message(self, *args): ...


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server with the `files` of a dictionary; `cache` is where downloads go."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.requests, running.tags, running.breaks_after = {}, [], True, None
        running.address = f"http://127.0.0.1:{running.server_port}"
        running.cache = tmp_path / "cache/hub/checkpoints"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


CONTENT = numpy.random.default_rng(0).bytes(300_000)


def broken_off(server, address, after=100_000):
    server.breaks_after = after
    with pytest.raises(FileNotFoundError) as caught:
        fetch(address)
    server.breaks_after = None
    return str(caught.value)


def test_address_is_downloaded_once(server, tmp_path, weights):
    server.files["/a.pth"] = save(tmp_path, weights).read_bytes()
    for _ in range(2):  # the second time from the cache
        found = read(f"{server.address}/a.pth?x=1")
        assert found.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in found.items())
    assert [file.name for file in server.cache.iterdir()] == ["a.pth"] and len(server.requests) == 1


def test_offline_names_file_and_place(server):
    with pytest.raises(FileNotFoundError) as caught:
        read(f"{server.address}/b.pth")
    message = str(caught.value)
    assert f"{server.address}/b.pth" in message and str(server.cache / "b.pth") in message and "\n" not in message
    assert list(server.cache.iterdir()) == []


def test_broken_download_is_refused_and_resumed(server, capfd):
    server.files["/a.pth"] = CONTENT
    message = broken_off(server, f"{server.address}/a.pth")
    assert "100000 of 300000 bytes" in message and str(server.cache / "a.pth") in message
    assert not (server.cache / "a.pth").exists()
    assert fetch(f"{server.address}/a.pth").read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=100000-"]
    assert [file.name for file in server.cache.iterdir()] == ["a.pth"]
    assert "a.pth" in capfd.readouterr().err  # progress


@pytest.mark.parametrize("tags", [True, False], ids=["other tag", "no tags"])
def test_a_file_that_may_have_changed_is_not_continued(server, tags):
    server.files["/a.pth"], server.tags = CONTENT, tags
    broken_off(server, f"{server.address}/a.pth")
    server.files["/a.pth"] = CONTENT[::-1]
    assert fetch(f"{server.address}/a.pth").read_bytes() == CONTENT[::-1]
    assert [file.name for file in server.cache.iterdir()] == ["a.pth"]


def test_a_complete_file_that_was_not_renamed_is_got_again(server):
    """Killed between the last byte and the renaming."""
    server.files["/a.pth"] = CONTENT
    broken_off(server, f"{server.address}/a.pth")
    (unfinished,) = server.cache.iterdir()
    unfinished.write_bytes(CONTENT)
    assert fetch(f"{server.address}/a.pth").read_bytes() == CONTENT
    assert len(list(server.cache.iterdir())) == 1


def test_hash_in_the_address(server):
    server.files["/a.pth"] = CONTENT
    with pytest.raises(ValueError, match=r"a\.pth#sha256=0+ came with SHA-256"):
        fetch(f"{server.address}/a.pth#sha256={'0' * 64}")
    assert list(server.cache.iterdir()) == []
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert fetch(f"{server.address}/a.pth#sha256={digest}") == server.cache / "a.pth"


def test_processes_that_want_the_same_file_get_it_once(server):
    server.files["/a.pth"] = CONTENT
    script = "import sys; from dinat_backbones.checkpoint import fetch; print(fetch(sys.argv[1]).stat().st_size)"
    command = [sys.executable, "-c", script, f"{server.address}/a.pth"]
    root = os.path.dirname(os.path.dirname(dinat_backbones.__file__))
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == ["300000"] * 3
    assert len(server.requests) == 1 and len(list(server.cache.iterdir())) == 1
