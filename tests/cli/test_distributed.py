"""Several processes on one machine's CPU, through tools/train.py as torchrun starts it."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT

pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")

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
# SyncBN needs a GPU, and weights of the classes would make the losses means over unlike numbers
head = dict(norm_cfg=dict(_delete_=True, type="GN", num_groups=4), loss_decode=dict(class_weight=None))
model = dict(data_preprocessor=dict(size=(64, 64)), decode_head=head, auxiliary_head=head)
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=1)
optim_wrapper = dict(_delete_=True, optimizer=dict(type="SGD", lr=1.0))
param_scheduler = None
default_hooks = dict(logger=dict(interval=1))
"""


@pytest.fixture
def folder(tmp_path):
    shapes.make_shapes(tmp_path / "shapes", train=4, val=1, size=64, layouts=["ade20k"])
    (tmp_path / "config.py").write_text(ONE_STEP)
    (tmp_path / "fsdp.py").write_text(f"_base_ = ['config.py', '{ROOT}/configs/_base_/fsdp.py']")
    return tmp_path


def train(folder, processes, name, *options, config="config.py"):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    launcher = ["--launcher", "pytorch"] * (processes > 1)
    command = [sys.executable, *launch, str(ROOT / "tools" / "train.py"), config, "--work-dir", name, *launcher]
    run = subprocess.run(
        [*command, "--cfg-options", f"train_dataloader.batch_size={4 // processes}", *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return folder / name


def weights(folder):
    return torch.load(folder / "epoch_1.pth", weights_only=False)["state_dict"]


def loss(folder):
    (file,) = folder.glob("*/vis_data/scalars.json")
    return json.loads(file.read_text().splitlines()[-1])["loss"]


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(folder):
    start = weights(train(folder, 1, "start", "optim_wrapper.optimizer.lr=0.0"))
    one, two = weights(train(folder, 1, "one")), weights(train(folder, 2, "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() <= 1e-5, name
    assert sum(not torch.equal(weight, start[name]) for name, weight in one.items()) > 0.9 * len(one)


def test_training_in_shards(folder):
    """FSDP does the same step; its checkpoint is a folder of what each process holds."""
    parallel, sharded = train(folder, 2, "parallel"), train(folder, 2, "sharded", config="fsdp.py")
    assert abs(loss(parallel) - loss(sharded)) <= 1e-5
    assert sorted((sharded / "epoch_1.pth").iterdir())
