"""files.py: what is written is whole or absent."""

import subprocess

import pytest
import torch

from dinat_backbones.files import atomic_write


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 40 kB; without the right to mount one, a limit on the size of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], capture_output=True)
    if done.returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)
        return
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, before[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def write_torch(path):
    torch.save({"weight": torch.ones(1 << 16)}, path)


def write_safetensors(path):
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(
        {"weight": torch.ones(1 << 16)}, path
    )


@pytest.mark.parametrize("write", [write_torch, write_safetensors, lambda path: path.write_bytes(bytes(1 << 18))])
def test_a_full_disk_is_an_os_error_and_leaves_nothing(full_disk, write):
    with pytest.raises(OSError) as raised, atomic_write(full_disk / "file.pth") as partial:
        write(partial)
    assert "file" in str(raised.value.filename or raised.value) or "No space" in str(raised.value)
    assert not list(full_disk.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="^sizes$"), atomic_write(tmp_path / "file"):
        raise RuntimeError("sizes")
