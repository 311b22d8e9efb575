"""The table against the published facts (data/published.json), field by field."""

import dataclasses
import json
from itertools import cycle, islice

import pytest

from dinat_backbones import zoo
from helpers import PUBLISHED

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


def test_rows_cannot_be_changed():
    for value in (zoo.DETECTION["mask_rcnn_dinat_mini"], zoo.ARCHS["dinat_mini"], zoo.DILATION_SETTINGS["coco"]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.name = "other"


def backbone_of(row):
    """What is published about a row's backbone, but for its drop path; an argument that is None is left out."""
    arch, dilations = zoo.arch(row.arch), zoo.dilations(row.arch, row.dilations) if row.dilations else None
    fields = ("embed_dim", "depths", "num_heads", "mlp_ratio", "layer_scale", "kernel_size")
    values = {field: getattr(arch, field) for field in fields} | {"dilations": dilations}
    if row.dilations:
        values["kernel_size"] = zoo.DILATION_SETTINGS[row.dilations].kernel_size
    return as_json({key: value for key, value in values.items() if value is not None})


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
        with pytest.raises(ValueError, match=f"'{name}' with dilations='{setting}': NAT has dilation 1 everywhere"):
            zoo.dilation_setting(name, setting)
    elif backbone.family == "DiNAT_s" and setting in ("imagenet-384-k11", "mask2former"):
        message = rf"'{setting}' was never published for DiNAT_s\. Choices: 'imagenet-224' \(.*'coco' \(detection"
        with pytest.raises(ValueError, match=message):
            zoo.dilations(name, setting)
    else:
        pattern = zoo.dilations(name, setting)
        assert tuple(map(len, pattern)) == backbone.depths
        assert all(stage[0] == 1 for stage in pattern)


def test_every_setting_is_that_of_a_row():
    used = {row.dilations for row in zoo.rows() if row.arch in zoo.ARCHS and zoo.ARCHS[row.arch].family != "NAT"}
    assert used == set(zoo.DILATION_SETTINGS)
    assert {row.dilations for row in zoo.rows()} - used == {None}  # NAT and isotropic models


def test_settings_carry_their_kernel_size():
    sizes = {name: setting.kernel_size for name, setting in zoo.DILATION_SETTINGS.items()}
    assert {name for name, size in sizes.items() if size != 7} == {"imagenet-384-k11", "mask2former"}
    assert sizes["imagenet-384-k11"] == sizes["mask2former"] == 11
    with pytest.raises(ValueError, match=r"dilations='coco' is for 4 stages, but depths=\[1, 2\]"):
        zoo.DILATION_SETTINGS["coco"].per_block([1, 2])


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("name", "fact"), list(zip(NAMES["classification"], PUBLISHED["classification"], strict=True)))
def test_classification(name, fact):
    row = zoo.CLASSIFICATION[name]
    assert {field: getattr(row, field) for field in fact} == fact
    assert zoo.PRETRAINED[name] == fact["checkpoint"]
    assert row.crop_fraction == {224: 0.875, 384: 1.0}[fact["resolution"]]
    if row.dilations:
        assert zoo.DILATION_SETTINGS[row.dilations].kernel_size == fact["kernel_size"]
        family, dilations = zoo.ARCHS[row.arch].family.lower(), zoo.dilations(row.arch, row.dilations)
        kernel = f" k{fact['kernel_size']}" if (family, fact["resolution"]) == ("dinat", 384) else ""
        first, second, *_ = PUBLISHED["classification_dilations"][f"{family} {fact['resolution']}{kernel}"]
        assert as_json(dilations[:2]) == [first, second]
    else:
        assert row.arch.startswith(("nat_", "vitrpb")) or "isotropic" in row.arch


def test_imagenet22k_checkpoints():
    names = {
        "dinat_large k7 224": "dinat_large_21k",
        "dinat_large k11 (rpb interpolated from k7) 224": "dinat_large_21k_11x11",
        "dinat_s_large k7 224": "dinat_s_large_21k",
    }
    facts = {names[key]: address for key, address in PUBLISHED["in22k_checkpoints"].items()}
    assert {name: url for name, url in zoo.PRETRAINED.items() if name not in zoo.CLASSIFICATION} == facts


@pytest.mark.parametrize("key", PUBLISHED["detection"])
def test_detection(key):
    folder, name = key.split("/")
    row, fact = zoo.DETECTION[name], PUBLISHED["detection"][key]
    assert row.family.lower() == folder
    fields = ("params_m", "gmacs", "box_ap", "mask_ap", "checkpoint", "fp16")
    assert {field: getattr(row, field) for field in fields} == {field: fact[field] for field in fields}
    assert "{}x{}".format(*row.flops_input) == fact["flops_input"]
    recipe = ("type", "drop_path_rate")
    assert backbone_of(row) == {field: value for field, value in fact["backbone"].items() if field not in recipe}
    assert row.family == fact["backbone"]["type"]
    assert fact["pretrained"] in zoo.PRETRAINED.values()


@pytest.mark.parametrize("key", PUBLISHED["segmentation"])
def test_segmentation(key):
    folder, name = key.split("/")
    row, fact = zoo.SEGMENTATION[name], PUBLISHED["segmentation"][key]
    assert row.family.lower() == folder
    fields = ("params_m", "gmacs", "miou_single_scale", "miou_multi_scale", "checkpoint", "fp16")
    assert {field: getattr(row, field) for field in fields} == {field: fact[field] for field in fields}
    long_side, short_side = row.scale
    assert f"{short_side}x{long_side} for {row.size} crops" in fact["flops_input"]
    assert row.size == (640 if "large" in name else 512)
    recipe = ("type", "drop_path_rate")
    assert backbone_of(row) == {field: value for field, value in fact["backbone"].items() if field not in recipe}
    assert row.family == fact["backbone"]["type"]
    assert fact["pretrained"] in zoo.PRETRAINED.values()


@pytest.mark.parametrize("key", PUBLISHED["mask2former"])
def test_mask2former(key):
    row, fact = zoo.MASK2FORMER[key], PUBLISHED["mask2former"][key]
    fields = ("arch", "params_m", "gmacs", "checkpoint")
    assert {field: getattr(row, field) for field in fields} == {field: fact[field] for field in fields}
    metrics = {"PQ": row.pq, "AP": row.ap, "mIoU": row.miou, "mIoU_multiscale": row.miou_multi_scale}
    assert {name: value for name, value in metrics.items() if value is not None} == fact["metrics"]
    config = fact["detectron2_config_over_defaults"]
    assert row.num_classes == config["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]
    backbone = {f"MODEL.DINAT.{name.upper()}": value for name, value in backbone_of(row).items()}
    assert backbone.pop("MODEL.DINAT.MLP_RATIO") == 2.0  # the default there
    assert backbone["MODEL.DINAT.KERNEL_SIZE"] == 11
    drop_path = {"MODEL.DINAT.DROP_PATH_RATE": 0.3}
    assert backbone | drop_path == {key: value for key, value in config.items() if key.startswith("MODEL.DINAT.")}


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
