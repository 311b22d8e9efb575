"""Every config of configs/mmdet and configs/mmseg equals one row of the table, and builds what was published."""

import copy
import functools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import dinat_backbones
from dinat_backbones import zoo
from helpers import PUBLISHED, ROOT

pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'dinat_backbones[openmmlab]'")
import dinat_backbones.adapters.openmmlab  # first: mmcv may have no operators of its own

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmcv.transforms import Compose
from mmdet.models import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, DefaultScope
from mmengine.structures import InstanceData
from mmseg.models import BaseSegmentor

CONFIGS = ROOT / "configs"
DETECTION, SEGMENTATION = list(zoo.DETECTION.values()), list(zoo.SEGMENTATION.values())
MASK2FORMER = [row for row in zoo.MASK2FORMER.values() if row.config]
ALL = [*DETECTION, *SEGMENTATION, *MASK2FORMER]
TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the published multi-scale test
NOT_PUBLISHED = {
    "mmseg/dinat/dinat-tiny_upernet_8xb2-amp-80k_cityscapes-512x1024.py",
    "mmseg/dinat/dinat-large_upernet_8xb2-80k_cityscapes-512x1024.py",
}


def rows(table):
    return pytest.mark.parametrize("row", table, ids=lambda row: row.name)


def published(row):
    """The recipe and the results of a row, from the original release."""
    if isinstance(row, zoo.Mask2Former):
        return PUBLISHED["mask2former"][row.name]
    table = PUBLISHED["detection" if isinstance(row, zoo.Detection) else "segmentation"]
    return table[f"{row.family.lower()}/{row.name}"]


def published_backbone(row):
    """The arguments of a row's backbone in the original release, and its class."""
    fact = published(row)
    if not isinstance(row, zoo.Mask2Former):
        return dict(fact["backbone"])
    config = fact["detectron2_config_over_defaults"]
    prefix = "MODEL.DINAT."
    own = {key.removeprefix(prefix).lower(): value for key, value in config.items() if key.startswith(prefix)}
    return dict(type="DiNAT", mlp_ratio=2.0, **own)  # 2.0 is the default there


def published_optimizer(row):
    fact = published(row)
    if isinstance(row, zoo.Mask2Former):
        solver = fact["detectron2_config_over_defaults"]
        values = {"lr": solver["SOLVER.BASE_LR"], "weight_decay": solver["SOLVER.WEIGHT_DECAY"]}
        return {"type": "AdamW", "betas": [0.9, 0.999], **values}
    return {key: value for key, value in fact["optimizer"].items() if key != "paramwise_cfg"}


@functools.cache
def _read(path) -> Config:
    return Config.fromfile(path)


def load(row) -> Config:
    return copy.deepcopy(_read(CONFIGS / row.config))


def build(cfg, registry=MODELS, device="meta"):
    """Whatever `cfg` describes, by default on torch's meta device: shapes without memory."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        return registry.build(cfg.model)


def plain(value):
    """Lists for tuples, all the way down."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if key != "_scope_"}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def parameter_groups(cfg, model):
    """Name of each parameter -> its group of the optimizer that the config builds (AMP needs a GPU)."""
    groups = build_optim_wrapper(model, cfg.optim_wrapper | dict(type="OptimWrapper")).optimizer.param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    return {name: group_of[id(parameter)] for name, parameter in model.named_parameters()}


def step(pipeline, kind):
    (found,) = [step for step in pipeline if step.type == kind]
    return plain(found)


def image(folder, height, width) -> str:
    path = folder / "image.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=numpy.uint8)).save(path)
    return str(path)


def apply(cfg, pipeline, **sample):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return Compose([TRANSFORMS.build(step) for step in pipeline])(sample)


# ------------------------------------------------------------------------------------------------------------- all rows


def test_every_row_has_its_config_and_every_config_its_row():
    files = {
        str(path.relative_to(CONFIGS)) for folder in ("mmdet", "mmseg") for path in (CONFIGS / folder).rglob("*.py")
    }
    assert len(DETECTION + SEGMENTATION) == 34 and len(MASK2FORMER) == 7
    assert files == {row.config for row in ALL} | NOT_PUBLISHED
    assert len({row.config for row in ALL}) == len(ALL)
    assert zoo.MASK2FORMER["cityscapes/panoptic-segmentation"].config is None


@rows(ALL)
def test_backbone_optimizer_and_batch_size(row):
    cfg = load(row)
    assert cfg.default_scope == row.config.split("/")[0]
    assert Path(row.config).parent.name == row.family.lower()
    fact = published(row)
    assert {"arch", "dilations", "drop_path_rate"} >= cfg.model.backbone.keys() - {"type", "init_cfg"}  # no numbers
    arguments = published_backbone(row)
    expected = getattr(dinat_backbones, arguments.pop("type"))
    with torch.device("meta"):
        backbone, expected = MODELS.build(cfg.model.backbone), expected(**arguments)
    assert isinstance(backbone, type(expected)) and backbone.dilations == expected.dilations
    assert list(map(str, backbone.children())) == list(map(str, expected.children()))
    assert {k: v.shape for k, v in backbone.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }
    init_cfg = plain(cfg.model.backbone.init_cfg)
    assert init_cfg.keys() == {"type", "checkpoint"} and init_cfg["type"] == "Pretrained"
    if row in MASK2FORMER:  # starts from the 7x7 weights; there is a file with the tables resized
        assert init_cfg["checkpoint"] == "dinat_large_21k_11x11"
        assert fact["detectron2_config_over_defaults"]["MODEL.WEIGHTS"] == "dinat_large_in22k_224.pkl"
    else:
        assert zoo.PRETRAINED[init_cfg["checkpoint"]] == fact["pretrained"]

    optimizer, adamw = cfg.optim_wrapper.optimizer, published_optimizer(row)
    assert {key: plain(optimizer[key]) for key in adamw} == adamw
    fp16 = False if row in MASK2FORMER else fact["fp16"]
    assert (cfg.optim_wrapper.type == "AmpOptimWrapper") is fp16 is ("amp-" in row.config)
    assert cfg.auto_scale_lr.base_batch_size == 8 * fact.get("samples_per_gpu", 2) == 16
    batch_size, gpus = (1, 16) if "16xb1" in row.config else (2, 8)
    assert cfg.train_dataloader.batch_size == batch_size and batch_size * gpus == 16

    pre = cfg.model.data_preprocessor
    assert (tuple(pre.mean), tuple(pre.std), pre.bgr_to_rgb) == (zoo.IMAGENET_MEAN, zoo.IMAGENET_STD, True)
    model = build(cfg)
    assert isinstance(model, BaseDetector if cfg.default_scope == "mmdet" else BaseSegmentor)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6) == row.params_m
    groups = parameter_groups(cfg, model)
    if row in MASK2FORMER:
        return
    without = {name for name, group in groups.items() if group["weight_decay"] == 0}
    no_decay = fact["optimizer"]["paramwise_cfg"]["custom_keys"]
    assert set(map(str, no_decay.values())) == {"{'decay_mult': 0.0}"}
    assert without == {name for name in groups if any(word in name for word in no_decay)} != set()
    assert {group["weight_decay"] for group in groups.values()} == {0, adamw["weight_decay"]}
    assert {group["lr"] for group in groups.values()} == {adamw["lr"]}


# ------------------------------------------------------------------------------------------------------------ detection


@rows(DETECTION)
def test_detection(row):
    cfg, fact = load(row), published(row)
    schedule, epochs = fact["lr_config"], fact["runner"]["max_epochs"]
    warmup, drops = cfg.param_scheduler
    assert (warmup.end, warmup.start_factor) == (schedule["warmup_iters"], schedule["warmup_ratio"])
    assert (warmup.type, schedule["policy"], schedule["warmup"]) == ("LinearLR", "step", "linear")
    assert (drops.type, plain(drops.milestones), drops.gamma) == ("MultiStepLR", schedule["step"], 0.1)
    assert (warmup.by_epoch, drops.by_epoch, drops.end) == (False, True, epochs)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ("EpochBasedTrainLoop", epochs)
    heads = cfg.model.roi_head.bbox_head
    heads = heads if isinstance(heads, list) else [heads]
    assert len(heads) == {"mask_rcnn": 1, "cascade_mask_rcnn": 3}[row.detector]
    for head in heads:
        assert plain(head) == plain(head) | fact["bbox_head"]
    # a later stage of a cascade refines more finely
    deviations = [head.bbox_coder.target_stds[0] for head in heads]
    assert deviations == [0.1, 0.05, 0.033][: len(heads)]
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert step(cfg.test_dataloader.dataset.pipeline, "Resize") == dict(
        type="Resize", scale=[1333, 800], keep_ratio=True
    )


def test_augmentation_of_the_3x_recipe():
    """Draw many samples from one 640 x 427 image and look at their sizes."""
    random.seed(0)
    numpy.random.seed(0)
    pipeline = load(zoo.DETECTION["mask_rcnn_dinat_mini"]).train_dataloader.dataset.pipeline
    with DefaultScope.overwrite_default_scope("mmdet"):
        steps = [TRANSFORMS.build(s) for s in pipeline if s.type not in ("LoadImageFromFile", "LoadAnnotations")]
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


def test_cascade_trains_on_one_cpu():
    """SyncBN and all: mmengine's runner reverts it like this where there is no process group."""
    cfg = load(zoo.DETECTION["cascade_mask_rcnn_dinat_mini"])
    cfg.model.backbone.init_cfg = None
    cfg.model.train_cfg.rpn_proposal.max_per_img = 20
    for stage in cfg.model.train_cfg.rcnn:
        stage.sampler.num = 8
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build(cfg, device="cpu")).train()
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    model.init_weights()
    expected = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(numpy.ones((1, 64, 64), numpy.uint8), 64, 64),
    )
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64), batch_input_shape=(64, 64)),
        gt_instances=expected,
    )
    losses = model.loss(torch.randn(1, 3, 64, 64), [sample])
    total, parts = model.parse_losses(losses)
    total.backward()
    assert {f"s{stage}.loss_bbox" for stage in range(3)} <= set(parts)
    assert all(torch.isfinite(value).all() for value in parts.values())
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_boxes_at_several_scales(tmp_path):
    """`--tta` with the options that the comment in the config gives, on an untrained model."""
    cfg = load(zoo.DETECTION["mask_rcnn_dinat_mini"])
    cfg.model.backbone.init_cfg = None
    cfg.merge_from_dict({"model.roi_head.mask_head": None})
    cfg.tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=(96, 64)), dict(type="Resize", scale=(48, 32))]
    sample = dict(img_path=image(tmp_path, 64, 96), img_id=0, instances=[])
    views = apply(cfg, cfg.tta_pipeline, **sample)
    assert [tuple(view.shape) for view in views["inputs"]] == [(3, 64, 96)] * 2 + [(3, 32, 48)] * 2
    assert [view.flip for view in views["data_samples"]] == [False, True] * 2
    cfg.model = dict(**cfg.tta_model, module=cfg.model)
    model = build(cfg, device="cpu").eval()
    with torch.no_grad():
        (merged,) = model.test_step({name: [[view] for view in views[name]] for name in views})
    assert merged.pred_instances.bboxes.shape[1:] == (4,) and "masks" not in merged.pred_instances


# --------------------------------------------------------------------------------------------------------- segmentation


@rows(SEGMENTATION)
def test_segmentation(row):
    cfg, fact = load(row), published(row)
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    widths = [zoo.ARCHS[row.arch].embed_dim * 2**stage for stage in range(4)]
    assert (head.type, head.channels, head.num_classes, head.in_channels) == ("UPerHead", 512, 150, widths)
    assert (auxiliary.type, auxiliary.channels, auxiliary.num_classes) == ("FCNHead", 256, 150)
    assert (auxiliary.in_index, auxiliary.in_channels) == (2, widths[2])
    assert (head.loss_decode.loss_weight, auxiliary.loss_decode.loss_weight) == (1.0, 0.4)
    assert plain(cfg.model.test_cfg) == fact["test_cfg"] == dict(mode="whole")

    train = cfg.train_dataloader.dataset.pipeline
    assert [entry.type for entry in train[2:]] == [
        *("RandomResize", "RandomCrop", "RandomFlip", "PhotoMetricDistortion", "PackSegInputs")
    ]
    # of the large models the release kept the crop and the scale of the small ones, by accident
    size, scale = [row.size, row.size], list(row.scale)
    resize = dict(type="RandomResize", scale=scale, ratio_range=[0.5, 2.0], keep_ratio=True)
    assert step(train, "RandomResize") == resize
    assert step(train, "RandomCrop") == dict(type="RandomCrop", crop_size=size, cat_max_ratio=0.75)
    assert plain(cfg.model.data_preprocessor.size) == size
    tested = dict(type="Resize", scale=scale, keep_ratio=True)
    assert step(cfg.test_dataloader.dataset.pipeline, "Resize") == tested
    views = cfg.tta_pipeline[1].transforms
    assert plain(views[0]) == [tested | dict(scale=[int(side * ratio) for side in scale]) for ratio in TTA_RATIOS]
    assert [flip.prob for flip in views[1]] == [0.0, 1.0] and cfg.tta_model.type == "SegTTAModel"
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", fact["runner"]["max_iters"])


def test_learning_rate_of_the_160k_recipe():
    """Against the closed form of the original release: the warm-up multiplies the polynomial."""
    row = zoo.SEGMENTATION["upernet_dinat_mini"]
    fact = published(row)
    lr, iters, schedule = fact["optimizer"]["lr"], fact["runner"]["max_iters"], fact["lr_config"]
    assert (schedule["policy"], schedule["by_epoch"], schedule["min_lr"]) == ("poly", False, 0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = [PARAM_SCHEDULERS.build(entry | dict(optimizer=optimizer)) for entry in load(row).param_scheduler]
    for iteration in range(iters):
        if iteration in (0, 1, 100, 749, 1499, 1500, 40_000, 80_000, 159_999):
            # mmengine reaches the end of a schedule one iteration earlier
            first = schedule["warmup_ratio"]
            warmup = min(1.0, first + (1 - first) * iteration / (schedule["warmup_iters"] - 1))
            expected = lr * (1 - iteration / (iters - 1)) ** schedule["power"] * warmup
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)
        for scheduler in schedulers:
            scheduler.step()


def test_twelve_views_of_one_image(tmp_path):
    """Multi-scale and flip test: each view is as large as the ratio says, of the size of the single-scale test."""
    cfg = load(zoo.SEGMENTATION["upernet_dinat_mini"])
    labels = tmp_path / "labels.png"
    Image.fromarray(numpy.ones((30, 40), numpy.uint8)).save(labels)
    sample = dict(img_path=image(tmp_path, 30, 40), seg_map_path=str(labels), reduce_zero_label=True, seg_fields=[])
    views = apply(cfg, cfg.tta_pipeline, **sample)["inputs"]
    assert [tuple(view.shape[1:]) for view in views[::2]] == [
        *((256, 341), (384, 512), (512, 683), (640, 853), (768, 1024), (896, 1195))
    ]
    for straight, flipped in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(straight.flip(-1), flipped)


@pytest.mark.parametrize("path", sorted(NOT_PUBLISHED))
def test_cityscapes_upernet(path):
    cfg = Config.fromfile(CONFIGS / path)
    row = zoo.SEGMENTATION["upernet_dinat_tiny" if "tiny" in path else "upernet_dinat_large"]
    fact = published(row)
    backbone = plain(cfg.model.backbone)
    assert zoo.PRETRAINED[backbone.pop("init_cfg")["checkpoint"]] == fact["pretrained"]
    drop_path_rate = fact["backbone"]["drop_path_rate"]
    assert backbone == dict(type="DiNAT", arch=row.arch, dilations="ade20k-512", drop_path_rate=drop_path_rate)
    assert cfg.train_dataloader.dataset.type == "CityscapesDataset"
    assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters == 80_000
    model = build(cfg)
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 19
    assert [group["lr"] for group in parameter_groups(cfg, model).values()].count(fact["optimizer"]["lr"]) > 0


# --------------------------------------------------------------------------------------------------------- Mask2Former


@rows(MASK2FORMER)
def test_mask2former(row):
    """The model and its training against the published detectron2 config."""
    cfg, fact = load(row), published(row)["detectron2_config_over_defaults"]
    head = cfg.model.get("panoptic_head") or cfg.model.decode_head
    assert head.num_queries == fact.get("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100)
    assert plain(head.in_channels) == [192, 384, 768, 1536]
    classes = head.num_classes if "num_classes" in head else head.num_things_classes + head.num_stuff_classes
    assert classes == row.num_classes and head.loss_cls.class_weight == [1.0] * classes + [0.1]
    if row.task == "instance":
        assert head.num_stuff_classes == 0
    assert head.transformer_decoder.num_layers == fact["MODEL.MASK_FORMER.DEC_LAYERS"] - 1  # one counts the queries
    assert head.pixel_decoder.encoder.num_layers == fact["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"]
    weights = [head[loss].loss_weight for loss in ("loss_cls", "loss_dice", "loss_mask")]
    assert weights == [fact[f"MODEL.MASK_FORMER.{kind}_WEIGHT"] for kind in ("CLASS", "DICE", "MASK")]
    assert cfg.optim_wrapper.clip_grad.max_norm == fact["SOLVER.CLIP_GRADIENTS.CLIP_VALUE"]
    assert cfg.train_cfg.max_iters == fact["SOLVER.MAX_ITER"]
    schedule = cfg.param_scheduler if isinstance(cfg.param_scheduler, dict) else cfg.param_scheduler[0]
    if "SOLVER.STEPS" in fact:
        assert (schedule.type, schedule.milestones) == ("MultiStepLR", fact["SOLVER.STEPS"])
    else:  # 0.9 is detectron2's default
        assert (schedule.type, schedule.power, schedule.eta_min) == ("PolyLR", 0.9, 0)
    assert (schedule.begin, schedule.end, schedule.by_epoch) == (0, fact["SOLVER.MAX_ITER"], False)

    train = cfg.train_dataloader.dataset.pipeline
    tested = step(cfg.test_dataloader.dataset.pipeline, "Resize")["scale"]
    if row.dataset == "coco":
        assert tested == [1333, 800] and step(train, "RandomCrop")["crop_size"] == [1024, 1024]
        assert step(train, "RandomResize")["ratio_range"] == [0.1, 2.0]
    else:
        assert tested == [fact["INPUT.MAX_SIZE_TEST"], fact["INPUT.MIN_SIZE_TEST"]]
        assert step(train, "RandomCrop")["crop_size"] == fact["INPUT.CROP.SIZE"]
        scales = step(train, "RandomChoiceResize")["scales"]
        sides = [scale if isinstance(scale, int) else min(scale) for scale in scales]
        assert sides == fact["INPUT.MIN_SIZE_TRAIN"]
        assert "PhotoMetricDistortion" in [entry.type for entry in train]

    groups = parameter_groups(cfg, build(cfg))
    for name, group in groups.items():
        own = name.startswith("backbone.")
        assert group["lr"] == pytest.approx(fact["SOLVER.BASE_LR"] * (0.1 if own else 1.0)), name
        # norms and embeddings are exempt; rpb and the pixel decoder's level_encoding, bare parameters in the original
        # trainer, are not
        exempt = "norm" in name or ".gn." in name or any(word in name for word in ("query_", "level_embed"))
        assert group["weight_decay"] == (0.0 if exempt else fact["SOLVER.WEIGHT_DECAY"]), name
    assert sum(name.endswith(".rpb") for name in groups) == 30


# ---------------------------------------------------------------------------------------------------------- around them


def test_documents_are_up_to_date():
    check = [sys.executable, str(ROOT / "tools" / "zoo_table.py"), "--check"]
    run = subprocess.run(check, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


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
