"""The recipes of the shipped configs, from training to the next training: two iterations of a model that is smaller in
its numbers alone, then every command that reads the file which they saved."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT

pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'dinat_backbones[openmmlab]'")
import dinat_backbones.adapters.openmmlab  # noqa: F401  # first: mmcv may have no operators of its own

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")

import mmengine.optim
import mmengine.runner.amp
from mmengine.config import Config

from dinat_backbones.checkpoint import Inert, read
from dinat_backbones.cli import shapes

CONFIGS = ROOT / "configs"
# One config for each recipe: base file, optimizer, schedulers, hooks and pipelines.
MMDET = [
    "mmdet/dinat/mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco.py",
    "mmdet/dinat/cascade-mask-rcnn_dinat-large_fpn_4conv1fc-giou_ms-crop-3x_coco.py",
    "mmdet/dinat/mask2former_dinat-large_16xb1-lsj-100e_coco-panoptic.py",
    "mmdet/dinat/mask2former_dinat-large_16xb1-lsj-100e_coco.py",
]
MMSEG = [
    "mmseg/dinat/dinat-mini_upernet_8xb2-amp-160k_ade20k-512x512.py",
    "mmseg/dinat/mask2former_dinat-large_8xb2-160k_ade20k-640x640.py",
]
MMPRETRAIN = "mmpretrain/dinat-mini_finetune-30e.py"

BACKBONE = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], kernel_size=3, mlp_ratio=1.0)
WIDTHS = [16, 32, 64, 128]
# The largest numbers of a small model, by their keys.
LARGEST = dict(
    **dict.fromkeys(("embed_dims", "feat_channels", "out_channels", "conv_out_channels", "fc_out_channels"), 32),
    **dict(channels=32, feedforward_channels=32, num_feats=16, num_heads=2, num_groups=8, num_layers=2),
    **dict(num_queries=10, num_convs=1, num_shared_convs=1, nms_pre=50, max_per_img=20, max_per_image=20, num=32),
)
CLASSES = (*shapes.CLASSES, shapes.BACKGROUND)
COUNTS = dict(num_things_classes=3, num_stuff_classes=1)
SIZE = 64  # of the images, pixels


def shrink_model(node, num_classes):
    """Replace widths, depths and numbers of classes in a model's config."""
    for key, value in list(node.items()):
        if isinstance(value, dict):
            shrink_model(value, num_classes)
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            for entry in value:
                shrink_model(entry, num_classes)
        elif key == "in_channels" and isinstance(value, (list, tuple)):
            node[key] = WIDTHS
        elif key == "in_channels":
            width = 32 if value == 256 else WIDTHS[-1]  # of the neck or the last stage
            node[key] = WIDTHS[node.in_index] if isinstance(node.get("in_index"), int) else width
        elif key == "num_classes":
            node[key] = num_classes
        elif key in COUNTS:
            node[key] = COUNTS[key] if num_classes == len(CLASSES) else (num_classes, 0)[key == "num_stuff_classes"]
        elif key == "class_weight":
            node[key] = [1.0] * num_classes + [0.1]
        elif key == "num_points" and value > 100:
            node[key] = 50
        elif key in LARGEST and isinstance(value, int):
            node[key] = min(value, LARGEST[key])


def shrink_sizes(node):
    """Divide the sizes of images by 10, in a pipeline or a preprocessor."""
    if isinstance(node, dict):
        for key, value in node.items():
            sizes = key in ("scale", "scales", "size", "crop_size", "max_size")
            node[key] = divide(value) if sizes else shrink_sizes(value)
        return node
    return [shrink_sizes(entry) for entry in node] if isinstance(node, (list, tuple)) else node


def divide(value):
    return type(value)(map(divide, value)) if isinstance(value, (list, tuple)) else max(1, value // 10)


def write_config(recipe, data, path, weights=None, steps=2):
    """A recipe's config with a small model and small images, for `steps` iterations on the shapes."""
    cfg = Config.fromfile(CONFIGS / recipe)
    instances = recipe.startswith("mmdet") and "panoptic" not in recipe
    num_classes = 2 if recipe == MMPRETRAIN else len(shapes.CLASSES) if instances else len(CLASSES)
    backbone = {
        key: cfg.model.backbone[key] for key in ("type", "drop_path_rate", "out_indices") if key in cfg.model.backbone
    }
    cfg.model.backbone = {}
    shrink_model(cfg.model, num_classes)
    if "data_preprocessor" in cfg.model:
        shrink_sizes(cfg.model.data_preprocessor)
    init = dict(init_cfg=dict(type="Pretrained", checkpoint=str(weights))) if weights else {}
    cfg.model.backbone = backbone | BACKBONE | init
    for part in ("train", "val", "test"):
        loader = cfg[f"{part}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False, batch_size=2 if part == "train" else 1)
        loader.dataset = dataset(recipe, "train" if part == "train" else "val", data, loader.dataset)
    for evaluator in (part for name in ("val", "test") for part in evaluators(cfg[f"{name}_evaluator"])):
        kind = "panoptic" if evaluator.type == "CocoPanopticMetric" else "instances"
        if "ann_file" in evaluator:
            evaluator.ann_file = f"{data}/annotations/{kind}_val.json"
        if "seg_prefix" in evaluator:
            evaluator.seg_prefix = f"{data}/annotations/panoptic_val/"
    if "max_iters" in cfg.train_cfg:
        cfg.train_cfg.update(max_iters=steps, val_interval=steps)
        cfg.default_hooks.checkpoint.interval = 2
    else:
        cfg.train_cfg.update(max_epochs=steps // 2, val_interval=steps // 2)
    if torch.__version__ < "2.4":
        cfg.optim_wrapper.optimizer.pop("fused", None)  # which knew no CPU
    cfg.default_hooks.logger.interval = 1
    cfg.dump(path)
    return path


def evaluators(value):
    return value if isinstance(value, list) else [value]


def dataset(recipe, part, data, shipped):
    """The shapes, read by the shipped pipeline."""
    pipeline = shrink_sizes(shipped.pipeline)
    if recipe == MMPRETRAIN:
        return dict(shipped, data_root=str(data / "classes"), pipeline=pipeline)
    if recipe in MMSEG:
        folder = dict(train="training", val="validation")[part]
        return dict(
            type="BaseSegDataset",
            data_root=str(data),
            metainfo=dict(classes=CLASSES),
            img_suffix=".jpg",
            seg_map_suffix=".png",
            reduce_zero_label=True,
            data_prefix=dict(img_path=f"images/{folder}", seg_map_path=f"annotations/{folder}"),
            pipeline=pipeline,
        )
    files = dict(ann_file=f"annotations/instances_{part}.json", data_prefix=dict(img=f"{part}/"))
    metainfo = dict(classes=shapes.CLASSES)
    if "panoptic" in recipe:
        files = dict(
            ann_file=f"annotations/panoptic_{part}.json",
            data_prefix=dict(img=f"{part}/", seg=f"annotations/panoptic_{part}/"),
        )
        metainfo = dict(classes=CLASSES, thing_classes=CLASSES[:3], stuff_classes=CLASSES[3:], palette=None)
    return dict(shipped, data_root=f"{data}/", metainfo=metainfo, pipeline=pipeline, **files)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images for training and two for validation in every layout, and of two classes for classifiers."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    shapes.make_shapes(out, train=4, val=2, size=SIZE, layouts=shapes.LAYOUTS)
    for part, count in (("train", 2), ("val", 1)):
        for label, colour in (("blue", (30, 60, 220)), ("red", (220, 40, 40))):
            folder = out / "classes" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((SIZE, SIZE, 3), colour, np.uint8)).save(folder / f"{number}.png")
    return out


@pytest.fixture
def loss_scale(monkeypatch):
    """AmpOptimWrapper with the state of a loss scale, which it has on a GPU alone; nothing is cast."""
    module = inspect.getmodule(mmengine.optim.AmpOptimWrapper)
    monkeypatch.setattr(module, "is_cuda_available", lambda: True)
    monkeypatch.setattr(module, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", **kwargs))
    monkeypatch.setattr(mmengine.runner.amp, "autocast", lambda **kwargs: torch.autocast("cpu", enabled=False))


def backbone_of(state):
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}


def classifier_of(state):
    names = {"backbone.norm3.": "norm.", "head.fc.": "head.", "backbone.": ""}
    return {
        next(key.replace(old, new) for old, new in names.items() if key.startswith(old)): value
        for key, value in state.items()
    }


@pytest.mark.parametrize("recipe", [*MMDET, *MMSEG, MMPRETRAIN])
def test_every_command_reads_what_the_recipe_saves(tmp_path, command, capfd, loss_scale, data, recipe):
    if recipe == MMPRETRAIN:
        pytest.importorskip("mmpretrain", reason="mmpretrain is not installed (it is in the classic stack)")
    config = write_config(recipe, data, tmp_path / "config.py")
    cfg = Config.fromfile(config)
    epochs = "max_epochs" in cfg.train_cfg
    names = [f"epoch_{number}.pth" if epochs else f"iter_{2 * number}.pth" for number in (1, 2)]

    assert command("train", config, "--work-dir", "first") is None
    path = tmp_path / "first" / names[0]
    found = read(path)
    amp = cfg.optim_wrapper.get("type") == "AmpOptimWrapper"
    assert found["meta"]["iter"] == 2 and found["optimizer"]["state"] and ("loss_scaler" in found["optimizer"]) == amp
    schedulers = cfg.param_scheduler
    assert len(found["param_schedulers"]) == (1 if isinstance(schedulers, dict) else len(schedulers))
    assert isinstance(found["message_hub"]["log_scalars"]["train/loss"], Inert)

    capfd.readouterr()
    assert command("test", config, path, "--work-dir", "test") is None
    (metrics,) = (tmp_path / "test").glob("*/*.json")
    assert any(name for name in json.loads(metrics.read_text()) if "time" not in name)

    images = data / "val" if recipe != MMPRETRAIN else data / "classes" / "val"
    words = "--config", config, "--checkpoint", path, "--out", "drawn", "--device", "cpu"
    assert command("predict", images, *words) is None
    assert len([*(tmp_path / "drawn").rglob("*.*")]) == 2

    for layout in ("imagenet", "mmdet3", "detectron2"):
        assert command("convert", path, f"{layout}.pth", "--to", layout) is None, layout
    state = backbone_of(found["state_dict"])
    converted = read("imagenet.pth")
    expected = classifier_of(found["state_dict"]) if recipe == MMPRETRAIN else state
    assert converted.keys() == expected.keys() and all(torch.equal(converted[key], expected[key]) for key in expected)

    longer = write_config(recipe, data, tmp_path / "longer.py", steps=4)
    capfd.readouterr()
    assert command("train", longer, "--work-dir", "first", "--resume") is None
    assert "resumed" in "".join(capfd.readouterr())
    resumed = read(tmp_path / "first" / names[1])
    assert resumed["meta"]["iter"] == 4
    steps = {int(entry["step"]) for entry in resumed["optimizer"]["state"].values()}
    assert max(steps) == 4, steps

    for number, weights in enumerate((path, "imagenet.pth")):
        capfd.readouterr()
        following = write_config(recipe, data, tmp_path / f"following{number}.py", weights=tmp_path / weights)
        assert command("train", following, "--work-dir", f"following{number}") is None
        assert f"loaded {len(state)} tensors from {tmp_path / weights}" in "".join(capfd.readouterr())
