"""Several processes on one machine's CPU, through tools/train.py as torchrun starts it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # which is no package
shapes = importlib.import_module("make_shapes")

# One step of gradient descent at a rate of 1, so that the change of a weight is its gradient.
ONE_STEP = f"""
_base_ = "{ROOT}/configs/demo/upernet_dinat_shapes.py"
train_dataloader = dict(
    batch_size=4,
    sampler=dict(shuffle=False),
    dataset=dict(
        data_root="shapes",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
model = dict(data_preprocessor=dict(size=(64, 64)),
             decode_head=dict(norm_cfg=dict(_delete_=True, type="GN", num_groups=4)))
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=1)
optim_wrapper = dict(_delete_=True, optimizer=dict(type="SGD", lr=1.0))
param_scheduler = None
"""


@pytest.fixture
def folder(tmp_path):
    shapes.make_shapes(tmp_path / "shapes", train=4, val=1, size=64, layouts=["ade20k"])
    (tmp_path / "config.py").write_text(ONE_STEP)
    return tmp_path


def train(folder, processes, name, *options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    launcher = ["--launcher", "pytorch"] * (processes > 1)
    command = [sys.executable, *launch, str(ROOT / "tools" / "train.py"), "config.py", "--work-dir", name, *launcher]
    run = subprocess.run(
        [*command, "--cfg-options", f"train_dataloader.batch_size={4 // processes}", *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return torch.load(folder / name / "epoch_1.pth", weights_only=False)["state_dict"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about processes without a GPU of their own")
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(folder):
    one, two = train(folder, 1, "one"), train(folder, 2, "two")
    start = train(folder, 1, "start", "optim_wrapper.optimizer.lr=0.0")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() <= 1e-5, name
    assert sum(not torch.equal(weight, start[name]) for name, weight in one.items()) > 0.9 * len(one)
