"""Every config of configs/mmdet equals one row of the table, and builds what was published."""

import random
from collections import Counter
from pathlib import Path

import numpy
import pytest

from dinat_backbones import zoo

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DETECTION = sorted((CONFIGS / "mmdet").glob("*/*_coco.py"))


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def row_of(path: Path) -> zoo.Detection:
    """mask-rcnn_dinat-mini_fpn_...: the names of mmdet's configs hold the detector and the trunk."""
    return zoo.DETECTION["_".join(path.stem.split("_")[:2]).replace("-", "_")]


def plain(value):
    """Lists for tuples, all the way down."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if key != "_scope_"}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def test_there_are_configs_and_no_row_has_two():
    rows = [row_of(path).name for path in DETECTION]
    assert "mask_rcnn_dinat_mini" in rows and len(set(rows)) == len(rows)


@pytest.mark.parametrize("path", DETECTION, ids=lambda path: path.stem)
def test_config_equals_its_row(path):
    cfg, row = Config.fromfile(path), row_of(path)
    assert path.parent.name == row.family.lower()
    backbone = plain(cfg.model.backbone)
    pretrained = dict(type="Pretrained", checkpoint=zoo.PRETRAINED[row.pretrained])
    assert backbone == dict(zoo.backbone_kwargs(row), type=row.family, init_cfg=pretrained)

    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", row.lr, row.weight_decay)
    assert tuple(optimizer.betas) == row.betas
    assert (cfg.optim_wrapper.type == "AmpOptimWrapper") is row.fp16 is ("_amp-" in path.stem)
    warmup, drops = cfg.param_scheduler
    assert (warmup.type, warmup.end, warmup.start_factor) == ("LinearLR", row.warmup_iters, row.warmup_ratio)
    assert (drops.type, tuple(drops.milestones), drops.gamma) == ("MultiStepLR", row.lr_drops, 0.1)
    assert (warmup.by_epoch, drops.by_epoch, drops.end) == (False, True, row.epochs)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ("EpochBasedTrainLoop", row.epochs)
    assert cfg.train_dataloader.batch_size == row.samples_per_gpu
    assert cfg.auto_scale_lr.base_batch_size == 8 * row.samples_per_gpu

    heads = cfg.model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        assert plain(head) == plain(head) | zoo.BOX_HEADS[row.detector]
    pre = cfg.model.data_preprocessor
    assert (tuple(pre.mean), tuple(pre.std), pre.bgr_to_rgb) == (zoo.IMAGENET_MEAN, zoo.IMAGENET_STD, True)
    assert pre.pad_size_divisor == 32
    test_resize = next(step for step in cfg.test_dataloader.dataset.pipeline if step.type == "Resize")
    assert plain(test_resize) == dict(type="Resize", scale=[1333, 800], keep_ratio=True)


@pytest.mark.parametrize("path", DETECTION, ids=lambda path: path.stem)
def test_model_has_the_published_parameters_and_decay(path):
    cfg, row = Config.fromfile(path), row_of(path)
    model = MODELS.build(cfg.model)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6) == row.params_m

    groups = build_optim_wrapper(model, cfg.optim_wrapper | dict(type="OptimWrapper")).optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    without = {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    with_decay = {name for name, p in model.named_parameters() if decay[id(p)] == row.weight_decay}
    assert without == {name for name, _ in model.named_parameters() if "rpb" in name or "norm" in name}
    assert len(without) + len(with_decay) == len(decay) == len(list(model.parameters()))
    assert all(group["lr"] == row.lr for group in groups)


def test_augmentation_of_the_3x_recipe(tmp_path):
    """Draw many samples from one 640 x 427 image and look at their sizes."""
    random.seed(0)
    numpy.random.seed(0)
    pipeline = Config.fromfile(DETECTION[0]).train_dataloader.dataset.pipeline
    steps = [TRANSFORMS.build(step) for step in pipeline if step.type not in ("LoadImageFromFile", "LoadAnnotations")]
    assert [step.type for step in pipeline[:2]] == ["LoadImageFromFile", "LoadAnnotations"]
    image = numpy.zeros((427, 640, 3), numpy.uint8)
    shorts, flips, whole = Counter(), 0, 0
    for _ in range(400):
        sample = dict(img=image.copy(), img_shape=image.shape[:2], ori_shape=image.shape[:2], img_id=0, img_path="")
        for step in steps:
            sample = step(sample)
        height, width = sample["data_samples"].img_shape
        assert tuple(sample["inputs"].shape) == (3, height, width) and max(height, width) <= 1333
        shorts[min(height, width)] += 1
        flips += sample["data_samples"].flip
        whole += abs(width / height - 640 / 427) < 0.01
    assert max(shorts) == 800 and set(range(480, 801, 32)) <= set(shorts) and min(shorts) >= 400
    assert 0.4 < flips / 400 < 0.6
    assert 0.45 < whole / 400 < 0.75  # half of them uncropped, and a few crops with the same proportions


@pytest.mark.parametrize("name", ["mask-rcnn_dinat-mini_coco-sample", "mask-rcnn_dinat-mini_coco-sample-overfit"])
def test_demo_reads_its_images_from_one_place(name, monkeypatch):
    monkeypatch.setenv("COCO_SAMPLE", "/some/where")
    cfg = Config.fromfile(CONFIGS / "demo" / f"{name}.py")
    train, tested = cfg.train_dataloader.dataset.dataset, cfg.test_dataloader.dataset
    for dataset in (train, cfg.val_dataloader.dataset, tested):
        assert (dataset.data_root, dataset.ann_file) == ("/some/where/", "annotations/instances_val2017.json")
        assert dataset.data_prefix == dict(img="val2017/")
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.ann_file == "/some/where/annotations/instances_val2017.json"
    assert cfg.model.backbone.init_cfg is None and cfg.optim_wrapper.type == "OptimWrapper"  # no network, no GPU
    monkeypatch.delenv("COCO_SAMPLE")
    assert Config.fromfile(CONFIGS / "demo" / f"{name}.py").test_dataloader.dataset.data_root == "data/coco/"
