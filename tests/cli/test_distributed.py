"""Several processes on one machine's CPU, through `dinat train` as torchrun starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import ROOT, assert_near, environment

pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")

from mmengine.config import Config

from dinat_backbones.checkpoint import read
from dinat_backbones.cli import shapes
from dinat_backbones.cli.common import resolve_config

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


# The weights before the step, beside those after it.
START_HOOK = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveStartHook(Hook):
    def before_train(self, runner):
        torch.save(runner.model.state_dict(), f"{runner.work_dir}/start.pth")
"""
WITH_START = """
_base_ = "config.py"
custom_hooks = [dict(type="SaveStartHook")]
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab", "start_hook"])
"""


# Packaged configs on the shapes, for two steps: at the second DistributedDataParallel reports parameters that had no
# gradient in the first.
DETECTOR = """
_base_ = "{base}"
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root="shapes/",
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=("circle", "triangle", "ring")),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=2)
default_hooks = dict(checkpoint=dict(save_optimizer=False))
model = dict(bbox_head=dict(num_classes=3))
"""
SEGMENTOR = """
_base_ = "{base}"
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=False),
    dataset=dict(
        _delete_=True,
        type="BaseSegDataset",
        data_root="shapes",
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        metainfo=dict(classes=("circle", "triangle", "ring", "background")),
        img_suffix=".jpg",
        seg_map_suffix=".png",
        reduce_zero_label=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=2)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1, save_optimizer=False))
head = dict(norm_cfg=dict(type="BN"), num_classes=4)  # SyncBN needs a GPU
model = dict(data_preprocessor=dict(size=(64, 64)), decode_head=head, auxiliary_head=head)
"""
PACKAGED = {
    "retinanet": ("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", DETECTOR),
    "detr": ("mmdet::detr/detr_r50_8xb2-150e_coco.py", DETECTOR),
    "pspnet": ("mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py", SEGMENTOR),
}
# One start of two processes for all of them, which takes longer than their steps.
TRAIN_EACH = """
import sys

import yapf.yapflib.yapf_api

yapf.yapflib.yapf_api.FormatCode = lambda text, **settings: (text, True)  # takes longer than a step
from dinat_backbones import cli

for name in sys.argv[1:]:
    cli.main(
        ["train", f"{name}.py", "--work-dir", name, "--launcher", "pytorch"]
        + ["--backbone", "dinat_mini", "--checkpoint-backbone", "none", "--cfg-options"]
        + ["model.backbone.depths=[1,1,1,1]", "model.backbone.dilations=[[1],[1],[1],[1]]"]
        + ["train_dataloader.batch_size=2"]
    )
"""


TWO_EPOCHS = f"""
_base_ = ["config.py", "{ROOT}/configs/_base_/fsdp.py"]
train_cfg = dict(max_epochs=2)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=1, by_epoch=True, max_keep_ckpts=2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    shapes.make_shapes(folder / "shapes", train=4, val=1, size=64, layouts=["ade20k", "coco"])
    (folder / "config.py").write_text(ONE_STEP)
    (folder / "start_hook.py").write_text(START_HOOK)
    (folder / "with_start.py").write_text(WITH_START)
    (folder / "two_epochs.py").write_text(TWO_EPOCHS)
    return folder


@pytest.fixture(scope="module")
def parallel(folder):
    """The work folder of a run of two processes."""
    return train(folder, 2, "parallel")


@pytest.fixture(scope="module")
def sharded(folder):
    """The work folder of two epochs of two processes with FSDP."""
    return train(folder, 2, "two_epochs", config="two_epochs.py")


@pytest.fixture(scope="module")
def swapped(folder):
    """Folder with a work folder for each of `PACKAGED`."""
    for name, (packaged, text) in PACKAGED.items():
        (folder / f"{name}.py").write_text(text.format(base=resolve_config(packaged)))
    (folder / "train_each.py").write_text(TRAIN_EACH)
    start(folder, 2, "train_each.py", *PACKAGED)
    return folder


def train(folder, processes, name, *words, config="config.py"):
    launcher = ["--launcher", "pytorch"] * (processes > 1)
    batch = f"train_dataloader.batch_size={4 // processes}"
    command = ["-m", "dinat_backbones", "train", config, "--work-dir", name, *launcher, *words, "--cfg-options", batch]
    start(folder, processes, *command)
    return folder / name


def start(folder, processes, *command):
    """Run a Python command in so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    run = subprocess.run(
        [sys.executable, *launch, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]


def weights(folder):
    return torch.load(folder / "epoch_1.pth", weights_only=False)["state_dict"]


def loss(folder):
    """Of the first step."""
    (file,) = folder.glob("*/vis_data/scalars.json")
    return json.loads(file.read_text().splitlines()[0])["loss"]


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(folder, parallel):
    single = train(folder, 1, "single", config="with_start.py")
    start, one, two = torch.load(single / "start.pth"), weights(single), weights(parallel)
    assert start.keys() == one.keys() == two.keys()
    steps = {name: (one[name] - start[name], two[name] - start[name]) for name in one if one[name].is_floating_point()}
    largest = max(step.abs().max() for step, _ in steps.values())
    for name, (step, other) in steps.items():
        # relative to the gradient of the tensor; those of biases before a norm are 0 but for rounding
        assert (step - other).abs().max() <= 1e-4 * step.abs().max() + 1e-6 * largest, name
    assert sum(bool(step.any()) for step, _ in steps.values()) > 0.9 * len(steps)


def test_training_in_shards(parallel, sharded):
    """FSDP has the same loss, and its checkpoint is a file as any other's."""
    assert loss(parallel) == pytest.approx(loss(sharded), rel=1e-5)
    assert read(sharded / "epoch_1.pth")["state_dict"].keys() == weights(parallel).keys()


def test_training_in_shards_is_resumed(folder, sharded):
    """The second epoch with the optimizer of the first, which AdamW's step depends on."""
    resumed = folder / "resumed"
    resumed.mkdir()
    shutil.copy(sharded / "epoch_1.pth", resumed)
    (resumed / "last_checkpoint").write_text(str(resumed / "epoch_1.pth"))
    train(folder, 2, "resumed", "--resume", config="two_epochs.py")
    one, two = (read(run / "epoch_2.pth") for run in (sharded, resumed))
    assert one["meta"]["epoch"] == two["meta"]["epoch"] == 2
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert_near(two["state_dict"].values(), one["state_dict"].values(), 1e-6)
    assert any((one["state_dict"][k] - value).any() for k, value in read(sharded / "epoch_1.pth")["state_dict"].items())


@pytest.mark.parametrize("name", PACKAGED)
def test_swapped_backbones_have_no_parameter_without_a_gradient(swapped, name):
    work = swapped / name
    cfg = Config.fromfile(next(work.glob("*.py")))
    assert cfg.launcher == "pytorch" and not cfg.get("find_unused_parameters")
    assert cfg.model_wrapper_cfg.find_unused_parameters is False
    assert cfg.model.backbone.arch == "dinat_mini" and len(cfg.model.backbone.out_indices) < 4
    first, second = (read(work / f"epoch_{number}.pth")["state_dict"] for number in (1, 2))
    attention = [key for key in first if key.startswith("backbone.levels.") and "qkv.weight" in key]
    assert len(attention) == 4 and not any(torch.equal(first[key], second[key]) for key in attention)


def children(pid):
    """The processes that it started, by their numbers."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_processes_end_after_their_parent_was_killed(folder):
    """torchrun alone gets the signal; its processes end, and do not write into the folder any more."""
    (folder / "endless.py").write_text(
        "_base_ = ['config.py']\ntrain_cfg = dict(max_epochs=100000)\n"
        "default_hooks = dict(checkpoint=dict(interval=1, by_epoch=True, max_keep_ckpts=1))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(ROOT / "tools" / "train.py"), "endless.py", "--work-dir", "endless", "--launcher", "pytorch"]
    variables = environment(folder, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    with open(folder / "endless.log", "w") as log:
        parent = subprocess.Popen([*launch, *words], cwd=folder, env=variables, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 180
        while not (folder / "endless" / "last_checkpoint").exists():
            assert time.monotonic() < end and parent.poll() is None, (folder / "endless.log").read_text()[-2000:]
            time.sleep(0.5)
        workers = children(parent.pid)
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 60
    while any(map(is_running, workers)):
        if time.monotonic() > end:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("the processes went on for a minute")
        time.sleep(0.5)
    assert "is gone; ending" in (folder / "endless.log").read_text()
