"""The fine-tuning config, run by mmpretrain on drawn images."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, environment, fill_by_name

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed (it is in the classic stack)")
from mmengine.config import Config

from dinat_backbones import NAT, zoo
from dinat_backbones.classifier import NATClassifier

CONFIG = ROOT / "configs" / "mmpretrain" / "dinat-mini_finetune-30e.py"
SMALL = dict(embed_dim=16, depths=[1, 1], num_heads=[1, 2], mlp_ratio=2.0, kernel_size=3, drop_path_rate=0.0)


def test_config_is_the_published_model():
    cfg = Config.fromfile(CONFIG)
    row = zoo.CLASSIFICATION[cfg.model.backbone.arch]
    assert cfg.model.backbone.dilations == row.dilations
    assert cfg.model.backbone.init_cfg.checkpoint == row.name
    assert cfg.model.head.in_channels == zoo.ARCHS[row.arch].embed_dim * 8
    assert tuple(cfg.model.data_preprocessor.mean) == zoo.IMAGENET_MEAN
    assert tuple(cfg.model.data_preprocessor.std) == zoo.IMAGENET_STD
    resize, crop = cfg.val_dataloader.dataset.pipeline[1:3]
    assert (resize.scale, crop.crop_size) == (int(row.resolution / row.crop_fraction), row.resolution)
    assert resize.interpolation == "bicubic"


def test_fine_tuning_learns(tmp_path):
    """Red against blue from folders, with a small backbone whose weights come from a classifier's file."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for label, colour in (("blue", (30, 60, 220)), ("red", (220, 40, 40))):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(random.normal(colour, 40, (60, 70, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{number}.png")
    checkpoint = tmp_path / "small.pth"
    torch.save(fill_by_name(NATClassifier(**SMALL)).state_dict(), checkpoint)
    config = tmp_path / "small.py"
    init = dict(type="Pretrained", checkpoint=str(checkpoint))
    loading = "batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False"
    config.write_text(
        f"_base_ = {str(CONFIG)!r}\n"
        f"model = dict(backbone=dict(_delete_=True, type='NAT', out_indices=[1], init_cfg={init}, **{SMALL}),\n"
        "    head=dict(num_classes=2, in_channels=32))\n"
        f"train_dataloader = dict({loading}, dataset=dict(data_root={str(tmp_path)!r}))\n"
        f"val_dataloader = dict({loading}, dataset=dict(data_root={str(tmp_path)!r}))\n"
        "test_dataloader = val_dataloader\n"
        "optim_wrapper = dict(optimizer=dict(lr=2e-3))\n"
        "train_cfg = dict(max_epochs=4, val_interval=4)\n"
        "default_hooks = dict(logger=dict(interval=1))\n"
    )
    command = [sys.executable, ROOT / "tools" / "train.py", config, "--work-dir", tmp_path / "work"]
    done = subprocess.run(list(map(str, command)), env=environment(), cwd=tmp_path, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    assert re.search(r"loaded \d+ tensors from .*small.pth\n", text)  # all of them, the norm included
    losses = [float(number) for number in re.findall(r"loss: ([\d.]+)", text)]
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert float(re.findall(r"accuracy/top1: ([\d.]+)", text)[-1]) == 100
    trained = torch.load(tmp_path / "work" / "epoch_4.pth", weights_only=False)["state_dict"]
    backbone = {key.removeprefix("backbone.") for key in trained if key.startswith("backbone.")}
    assert backbone == NAT(**SMALL, out_indices=[1]).state_dict().keys()
