"""What mmengine loads with our adapter: a resumed run goes on from it, and nothing in it is executed."""

import os

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmengine.fileio import get_file_backend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_from_local

from dinat_backbones.adapters import openmmlab  # noqa: F401


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs, mode="tensor"):
        out = self.layer(inputs)
        return dict(loss=out.square().mean()) if mode == "loss" else out


class Record(Hook):
    """The weights before the first step."""

    priority = "VERY_LOW"

    def before_train(self, runner):
        self.weights = {name: value.clone() for name, value in runner.model.state_dict().items()}


def run(folder, epochs, **settings):
    """Train with the scheduler of the published detectors (its milestones are a Counter) and an average of weights."""
    torch.manual_seed(0)
    runner = Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=1,
            dataset=[torch.ones(2), -torch.ones(2)],
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.1)),
        param_scheduler=[dict(type="MultiStepLR", milestones=[1], by_epoch=True)],
        default_hooks=dict(logger=dict(type="LoggerHook", interval=1), checkpoint=dict(type="CheckpointHook")),
        custom_hooks=[dict(type="EMAHook")],
        experiment_name=folder.name,
        **settings,
    )
    record = Record()
    runner.register_hook(record)
    runner.train()
    return runner, record


def test_a_resumed_run_goes_on(tmp_path, monkeypatch):
    """As it does from what mmengine's own loader reads."""
    first, _ = run(tmp_path / "first", 1)
    trained = first.model.state_dict()
    path = tmp_path / "first" / "epoch_1.pth"
    resumed, record = run(tmp_path / "resumed", 2, load_from=str(path), resume=True)
    assert all(torch.equal(value, trained[name]) for name, value in record.weights.items())
    assert resumed.iter == 4
    assert len(resumed.message_hub.get_scalar("train/loss").data[0]) == 4  # two of them from the file
    monkeypatch.setitem(CheckpointLoader._schemes, "", load_from_local)
    theirs, _ = run(tmp_path / "theirs", 2, load_from=str(path), resume=True)
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_with_code_is_refused(tmp_path, resume):
    path, marker = tmp_path / "file.pth", tmp_path / "executed"
    torch.save({"state_dict": {}, "meta": Runs(marker)}, path)
    with pytest.raises(ValueError, match="mkdir.*refused"):
        run(tmp_path / "run", 1, load_from=str(path), resume=resume)
    assert not marker.exists()


def test_addresses_and_missing_files(tmp_path, monkeypatch):
    """An address goes to the reader, too."""
    asked = []
    monkeypatch.setattr("dinat_backbones.adapters.openmmlab.checkpoints.read", lambda name: asked.append(name) or {})
    for name in ("https://example.org/a.pth", "http://example.org/a.pth", str(tmp_path / "a.pth")):
        CheckpointLoader.load_checkpoint(name, "cpu")
        assert asked.pop() == name
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="is not there"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "a.pth"), "cpu")


def test_files_are_saved_whole_or_not_at_all(tmp_path):
    """The file of an epoch before stays as it is if writing the next one fails."""
    path = tmp_path / "epoch_1.pth"
    backend = get_file_backend(str(path))
    backend.put(b"whole", path)
    assert path.read_bytes() == b"whole"
    for write in (backend.put, backend.put_text):
        with pytest.raises(TypeError):
            write([], path)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]
