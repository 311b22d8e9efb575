"""The table against the published facts (data/published.json), field by field."""

import dataclasses
import json
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path

import pytest

from dinat_backbones import zoo
from helpers import DATA

PUBLISHED = json.loads((DATA / "published.json").read_text())
NAMES = {
    "classification": [
        *("nat_mini", "nat_tiny", "nat_small", "nat_base"),
        *("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base"),
        *("dinat_large", "dinat_large_384", "dinat_large_384_11x11"),
        *("dinat_s_tiny", "dinat_s_small", "dinat_s_base", "dinat_s_large", "dinat_s_large_384"),
        *("nat_isotropic_small", "dinat_isotropic_small", "vitrpb_small"),
        *("nat_isotropic_base", "dinat_isotropic_base", "vitrpb_base"),
    ],
    "detection": [key.split("/")[1] for key in PUBLISHED["detection"]],
    "segmentation": [key.split("/")[1] for key in PUBLISHED["segmentation"]],
    "mask2former": list(PUBLISHED["mask2former"]),
}
# What the facts call the patterns of ImageNet: their family and setting
IMAGENET = {
    "dinat 224": ("DiNAT", "imagenet-224"),
    "dinat 384 k7": ("DiNAT", "imagenet-384"),
    "dinat 384 k11": ("DiNAT", "imagenet-384-k11"),
    "dinat_s 224": ("DiNAT_s", "imagenet-224"),
    "dinat_s 384": ("DiNAT_s", "imagenet-384"),
}


def as_json(value):
    return json.loads(json.dumps(value))


# ---------------------------------------------------------------------------------------------------- the whole table


def test_there_are_64_rows_and_each_is_found_by_its_name():
    tables = [zoo.CLASSIFICATION, zoo.DETECTION, zoo.SEGMENTATION, zoo.MASK2FORMER]
    assert [len(table) for table in tables] == [22, 21, 13, 8]
    assert [len(PUBLISHED[kind]) for kind in NAMES] == [22, 21, 13, 8]
    for table, names in zip(tables, NAMES.values(), strict=True):
        assert list(table) == names == [row.name for row in table.values()]
    assert zoo.rows() == tuple(row for table in tables for row in table.values())
    assert len({row.name for row in zoo.rows()}) == len({row.checkpoint for row in zoo.rows()}) == 64


def test_the_table_needs_nothing_but_the_standard_library():
    folder = Path(zoo.__file__).parents[1]  # imported from there it does not come with the package's torch
    code = f"import sys; sys.path.append({str(folder)!r}); import zoo; print(len(zoo.rows()))"
    command = [sys.executable, "-S", "-I", "-c", code]  # -S: without site-packages
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("64\n", "")


def test_rows_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        zoo.DETECTION["mask_rcnn_dinat_mini"].lr = 1.0
    row = zoo.MASK2FORMER["coco/panoptic-segmentation"]
    before = as_json(row.detectron2_config())
    for value in row.detectron2_config().values():
        if isinstance(value, list):
            value.clear()
    zoo.backbone_kwargs(row)["depths"].clear()
    assert row.detectron2_config() == before


# ------------------------------------------------------------------------------------------------------ architectures


def test_architectures_are_the_published_ones():
    assert list(zoo.ARCHS) == list(PUBLISHED["archs"])
    fields = ("family", "embed_dim", "depths", "num_heads", "mlp_ratio", "layer_scale", "kernel_size")
    for name, backbone in zoo.ARCHS.items():
        assert backbone.name == name
        assert zoo.arch(name) is backbone
        assert as_json({field: getattr(backbone, field) for field in fields}) == PUBLISHED["archs"][name]


def test_isotropic_models_are_the_published_ones():
    assert set(zoo.ISOTROPIC) == set(PUBLISHED["isotropic"])
    for name, model in zoo.ISOTROPIC.items():
        assert dataclasses.asdict(model) == {"name": name, **PUBLISHED["isotropic"][name]}


# ---------------------------------------------------------------------------------------------------------- dilations


@pytest.mark.parametrize("fact", PUBLISHED["classification_dilations"])
def test_imagenet_dilations(fact):
    family, setting = IMAGENET[fact]
    first, second, third, fourth = PUBLISHED["classification_dilations"][fact]
    assert fourth == "all 1"
    pair = [int(number) for number in third.split(" ")[0].split(",")]  # "1,2 repeated" -> [1, 2]
    backbones = [backbone for backbone in zoo.ARCHS.values() if backbone.family == family]
    assert len(backbones) >= 4
    for backbone in backbones:
        expected = [first, second, list(islice(cycle(pair), backbone.depths[2])), [1] * backbone.depths[3]]
        assert as_json(zoo.dilations(backbone.name, setting)) == expected


@pytest.mark.parametrize("setting", zoo.DILATION_SETTINGS)
@pytest.mark.parametrize("name", zoo.ARCHS)
def test_one_dilation_per_block(name, setting):
    backbone = zoo.arch(name)
    if backbone.family == "NAT":
        assert zoo.dilations(name, setting) is None
    elif backbone.family == "DiNAT_s" and setting in ("imagenet-384-k11", "mask2former"):
        with pytest.raises(ValueError, match=f"'{setting}' was never published for DiNAT_s.*imagenet-224.*coco"):
            zoo.dilations(name, setting)
    else:
        pattern = zoo.dilations(name, setting)
        assert tuple(map(len, pattern)) == backbone.depths
        assert all(stage[0] == 1 for stage in pattern)


def test_every_setting_is_that_of_a_row():
    used = {row.dilations for row in zoo.rows() if row.arch in zoo.ARCHS}
    assert used == set(zoo.DILATION_SETTINGS)


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("name", "fact"), list(zip(NAMES["classification"], PUBLISHED["classification"], strict=True)))
def test_classification(name, fact):
    row = zoo.CLASSIFICATION[name]
    assert {field: getattr(row, field) for field in fact} == fact
    assert zoo.PRETRAINED[name] == fact["checkpoint"]
    assert row.crop_fraction == {224: 0.875, 384: 1.0}[fact["resolution"]]
    if row.arch in zoo.ISOTROPIC:
        assert row.drop_path_rate == PUBLISHED["isotropic"][row.arch]["drop_path_rate"]
        with pytest.raises(ValueError, match=f"{row.arch!r} is an isotropic model"):
            zoo.backbone_kwargs(row)
    else:
        backbone = PUBLISHED["archs"][row.arch] | {"kernel_size": fact["kernel_size"]}
        setting = f"imagenet-{fact['resolution']}" + ("-k11" if fact["kernel_size"] == 11 else "")
        expected = {**backbone, "dilations": as_json(zoo.dilations(row.arch, setting))}
        del expected["family"]
        assert zoo.backbone_kwargs(row) == {key: value for key, value in expected.items() if value is not None}


def test_imagenet22k_checkpoints():
    names = {
        "dinat_large k7 224": "dinat_large_21k",
        "dinat_large k11 (rpb interpolated from k7) 224": "dinat_large_21k_11x11",
        "dinat_s_large k7 224": "dinat_s_large_21k",
    }
    facts = {names[key]: address for key, address in PUBLISHED["in22k_checkpoints"].items()}
    assert {name: url for name, url in zoo.PRETRAINED.items() if name not in zoo.CLASSIFICATION} == facts


def optimizer(row):
    no_decay = {key: {"decay_mult": 0.0} for key in row.no_decay}
    return {
        "type": "AdamW",
        "lr": row.lr,
        "betas": list(row.betas),
        "weight_decay": row.weight_decay,
        "paramwise_cfg": {"custom_keys": no_decay},
    }


@pytest.mark.parametrize("key", PUBLISHED["detection"])
def test_detection(key):
    folder, name = key.split("/")
    row = zoo.DETECTION[name]
    assert row.family.lower() == folder
    assert {
        "params_m": row.params_m,
        "gmacs": row.gmacs,
        "flops_input": "{}x{}".format(*row.flops_input),
        "box_ap": row.box_ap,
        "mask_ap": row.mask_ap,
        "checkpoint": row.checkpoint,
        "original_config": row.original_config,
        "backbone": {"type": row.family, **zoo.backbone_kwargs(row)},
        "pretrained": zoo.PRETRAINED[row.pretrained],
        "optimizer": optimizer(row),
        "lr_config": {
            "policy": "step",
            "step": list(row.lr_drops),
            "warmup": "linear",
            "warmup_iters": row.warmup_iters,
            "warmup_ratio": row.warmup_ratio,
        },
        "runner": {"type": "EpochBasedRunner", "max_epochs": row.epochs},
        "samples_per_gpu": row.samples_per_gpu,
        "fp16": row.fp16,
        "bbox_head": zoo.BOX_HEADS[row.detector],
    } == PUBLISHED["detection"][key]


@pytest.mark.parametrize("key", PUBLISHED["segmentation"])
def test_segmentation(key):
    folder, name = key.split("/")
    row, fact = zoo.SEGMENTATION[name], PUBLISHED["segmentation"][key]
    assert row.family.lower() == folder
    long_side, short_side = row.scale
    assert f"{short_side}x{long_side} for {row.size} crops" in fact["flops_input"]
    assert row.size == (640 if "large" in name else 512)
    assert {
        "params_m": row.params_m,
        "gmacs": row.gmacs,
        "flops_input": fact["flops_input"],  # one sentence for all rows, checked above
        "miou_single_scale": row.miou_single_scale,
        "miou_multi_scale": row.miou_multi_scale,
        "checkpoint": row.checkpoint,
        "original_config": row.original_config,
        "backbone": {"type": row.family, **zoo.backbone_kwargs(row)},
        "pretrained": zoo.PRETRAINED[row.pretrained],
        "optimizer": optimizer(row),
        "lr_config": {
            "policy": "poly",
            "power": row.poly_power,
            "min_lr": 0.0,
            "by_epoch": False,
            "warmup": "linear",
            "warmup_iters": row.warmup_iters,
            "warmup_ratio": row.warmup_ratio,
        },
        "runner": {"type": "IterBasedRunner", "max_iters": row.iters},
        "samples_per_gpu": row.samples_per_gpu,
        "fp16": row.fp16,
        "crop_size": list(row.released_crop),
        "train_img_scale": list(row.released_scale),
        "test_img_scale": list(row.released_scale),
        "test_cfg": {"mode": "whole"},
    } == fact
    assert row.tta_ratios == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize("key", PUBLISHED["mask2former"])
def test_mask2former(key):
    row = zoo.MASK2FORMER[key]
    metrics = {"PQ": row.pq, "AP": row.ap, "mIoU": row.miou, "mIoU_multiscale": row.miou_multi_scale}
    config = row.detectron2_config()
    assert {
        "arch": row.arch,
        "params_m": row.params_m,
        "gmacs": row.gmacs,
        "metrics": {name: value for name, value in metrics.items() if value is not None},
        "checkpoint": row.checkpoint,
        "detectron2_config_over_defaults": config,
    } == PUBLISHED["mask2former"][key]
    backbone = {f"MODEL.DINAT.{name.upper()}": value for name, value in zoo.backbone_kwargs(row).items()}
    assert backbone.pop("MODEL.DINAT.MLP_RATIO") == 2.0  # the default there
    assert backbone == {name: value for name, value in config.items() if name.startswith("MODEL.DINAT.")}
    assert row.pretrained == "dinat_large_21k"
    assert row.fp16 is False


def test_pixel_statistics():
    for fact in PUBLISHED["mask2former"].values():
        config = fact["detectron2_config_over_defaults"]
        assert config["MODEL.PIXEL_MEAN"] == list(zoo.IMAGENET_MEAN)
        assert config["MODEL.PIXEL_STD"] == list(zoo.IMAGENET_STD)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "dinat_tinny",
            r"unknown architecture 'dinat_tinny'\. Did you mean 'dinat_tiny'\? Known: nat_mini, .*dinat_s_large$",
        ),
        ("DiNAT_Base", r"unknown architecture 'DiNAT_Base'\. Did you mean 'dinat_base'\?"),
        ("resnet50", r"unknown architecture 'resnet50'\. Known: nat_mini, "),
        (None, r"unknown architecture None\. Known: nat_mini, "),
        (["dinat_mini"], r"unknown architecture \['dinat_mini'\]\."),
        ("vitrpb_base", r"'vitrpb_base' is an isotropic model.*ISOTROPIC"),
    ],
)
def test_unknown_architecture(name, message):
    with pytest.raises(ValueError, match=message):
        zoo.arch(name)
    with pytest.raises(ValueError, match=message):
        zoo.dilations(name, "coco")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "ade20k-521",
            r"unknown dilation setting 'ade20k-521'\. Did you mean 'ade20k-512'\? Known: imagenet-224, .*mask2former$",
        ),
        ("COCO", r"unknown dilation setting 'COCO'\. Did you mean 'coco'\?"),
        (7, r"unknown dilation setting 7\. Known: imagenet-224, "),
    ],
)
@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_unknown_setting(name, setting, message):
    with pytest.raises(ValueError, match=message):
        zoo.dilations(name, setting)
