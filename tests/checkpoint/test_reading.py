"""Files that carry code, are damaged, or are no checkpoints."""

import os
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch

from dinat_backbones import DiNAT
from dinat_backbones.checkpoint import Inert, load_backbone, read
from helpers import ROOT


def backbone():
    return DiNAT(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0)


@pytest.fixture(scope="module")
def weights():
    return backbone().state_dict()


def save(folder, content, name="file.pth", **kwargs):
    torch.save(content, folder / name, **kwargs)
    return folder / name


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
    inside = {f"backbone.{name}": value for name, value in weights.items()}
    path = save(tmp_path, {"meta": {"epoch": 1}, "state_dict": inside, "message_hub": hub})
    script = (
        "import sys; sys.modules['mmengine'] = None\n"
        "from dinat_backbones.checkpoint import Inert, backbone_state, read\n"
        "file = read(sys.argv[1]); print(file['meta'], len(backbone_state(file)), 'mmengine.logging' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == f"{{'epoch': 1}} {len(weights)} False", run.stderr


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.999])
def test_truncated_file(tmp_path, weights, keep, legacy):
    path = save(tmp_path, weights, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refused_read(path, "truncated")
    with pytest.raises(ValueError, match="truncated"):
        load_backbone(backbone(), path)


def test_a_file_without_checksums(tmp_path, weights):
    """As torch writes it with `set_crc32_options(False)`: every CRC-32 is 0."""
    if not hasattr(torch.serialization, "set_crc32_options"):  # before torch 2.6
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, weights)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert not any(item.CRC for item in archive.infolist())
    found = read(path)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_one_wrong_bit(tmp_path, weights):
    """Shapes and structure are those of the file; its CRC-32 is not."""
    path = save(tmp_path, weights)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    refused_read(path, largest.filename, "another CRC-32")


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
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        read(tmp_path)


def test_folders_of_shards(tmp_path, weights):
    """The command that the message advises makes a file that loads."""
    distributed = pytest.importorskip("torch.distributed.checkpoint")
    folder, target = tmp_path / "dcp", tmp_path / "file.pth"
    distributed.save({"state_dict": weights}, checkpoint_id=folder)
    with pytest.raises(FileNotFoundError, match="make a file of it: python -m ") as caught:
        read(folder)
    words = str(caught.value).partition(": python ")[2].replace("TARGET.pth", str(target)).split()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = backbone()
    load_backbone(model, target)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    (tmp_path / "epoch_1.pth").mkdir()
    save(tmp_path / "epoch_1.pth", weights, "rank0.pth")
    with pytest.raises(FileNotFoundError, match="FSDP shards.*state_dict_cfg='full'"):
        read(tmp_path / "epoch_1.pth")
