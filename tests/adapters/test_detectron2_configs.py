"""adapters/detectron2/config.py: MODEL.DINAT, settings of other backbones, Detectron2's zoo with our backbones."""

import logging

import numpy as np
import pytest
import torch

from dinat_backbones import zoo
from helpers import assert_near

pytest.importorskip("detectron2", reason="detectron2 is not installed: the classic stack has it (make test-classic)")
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

import dinat_backbones
from dinat_backbones.adapters import detectron2 as adapter
from dinat_backbones.cli import convert

SMALL = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, drop_path_rate=0.0)
DILATIONS = [[2], [2], [1, 3], [1]]
# One file of each kind of model in Detectron2's zoo, and a result of each
ZOO = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": "instances",
    "COCO-Detection/retinanet_R_50_FPN_1x": "instances",
    "COCO-Detection/rpn_R_50_FPN_1x": "proposals",
    "COCO-Detection/rpn_R_50_C4_1x": "proposals",
    "COCO-Detection/faster_rcnn_R_50_DC5_1x": "instances",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": "instances",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": "instances",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": "panoptic_seg",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": "instances",
    "Misc/semantic_R_50_FPN_1x": "sem_seg",
}
LAZY = ["mask_rcnn_fpn", "cascade_rcnn", "retinanet", "fcos", "panoptic_fpn", "keypoint_rcnn_fpn"]


def zoo_config(name, **kwargs):
    cfg = adapter.with_backbone(model_zoo.get_config(f"{name}.yaml"), "dinat_mini", checkpoint="none", **kwargs)
    cfg.MODEL.DEVICE = "cpu"
    for key, value in (SMALL | dict(dilations=DILATIONS)).items():
        cfg.MODEL.DINAT[key.upper()] = value
    return cfg


def sample(height=64, width=96):
    target = Instances((height, width))
    target.gt_boxes = Boxes(torch.tensor([[8.0, 8, 40, 40], [20, 4, 60, 30]]))
    target.gt_classes = torch.tensor([0, 0])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 8:40, 8:40] = masks[1, 4:30, 20:60] = True
    target.gt_masks = BitMasks(masks)
    points = np.stack([np.linspace(21, 39, 17), np.linspace(9, 29, 17), np.full(17, 2.0)], 1)
    target.gt_keypoints = Keypoints(np.stack([points, points]))
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return dict(image=image, instances=target, sem_seg=masks[0].long(), height=height, width=width)


def step_and_predict(model, optimizer=None):
    """One training step, in which all parameters of the backbone have to get a gradient, and a prediction."""
    model.train()
    data = sample()
    with EventStorage():
        losses = model([data])
        if "proposals" in losses:
            losses.pop("proposals")
    sum(losses.values()).backward()
    for name, value in model.backbone.named_parameters():
        assert value.grad is not None and torch.isfinite(value.grad).all(), name
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 1e-3)
    optimizer.step()
    with torch.no_grad():
        return model.eval()([data])[0]


@pytest.mark.parametrize("name", ZOO)
def test_the_model_zoo_with_another_backbone(name, caplog):
    torch.manual_seed(0)
    cfg = zoo_config(name)
    model = build_model(cfg)
    assert not any(record.name.startswith("dinat_backbones") for record in caplog.records)
    backbone = next(module for module in model.modules() if isinstance(module, dinat_backbones.DiNAT))
    assert backbone.stage_channels == (32, 64, 128, 256)
    results = step_and_predict(model, build_optimizer(cfg, model))
    assert ZOO[name] in results
    if ZOO[name] == "sem_seg":
        assert results["sem_seg"].shape == (54, 64, 96) and torch.isfinite(results["sem_seg"]).all()


def test_models_that_are_their_resnet_are_refused():
    with pytest.raises(ValueError, match="heads are the last stage of its ResNet"):
        zoo_config("COCO-Detection/faster_rcnn_R_50_C4_1x")


@pytest.mark.parametrize("name", LAZY)
def test_lazy_configs_with_another_backbone(name):
    """As the package's docstring and the documentation describe it."""
    torch.manual_seed(0)
    model = LazyConfig.load(model_zoo.get_config_file(f"common/models/{name}.py")).model
    features = list(model.backbone.in_features if name in ("retinanet", "fcos") else ["res2", "res3", "res4", "res5"])
    model.backbone.bottom_up = LazyCall(adapter.D2DiNAT)(
        **SMALL, mlp_ratio=2.0, dilations=DILATIONS, out_features=features
    )
    if name == "retinanet":
        model.backbone.top_block.in_channels = 256  # of res5
    model.pixel_mean, model.pixel_std = list(zoo.IMAGENET_MEAN), list(zoo.IMAGENET_STD)
    results = step_and_predict(instantiate(model))
    assert isinstance(results["instances"], Instances)


def test_simple_feature_pyramid_of_one_stage():
    """ViTDet's: all levels from one map."""
    net = adapter.D2DiNAT(**SMALL, mlp_ratio=2.0, dilations=DILATIONS, out_features=["res4"])
    model = SimpleFeaturePyramid(net, "res4", 16, [4.0, 2.0, 1.0, 0.5], top_block=LastLevelMaxPool(), norm="LN")
    maps = model(torch.randn(1, 3, 64, 96))
    assert {name: tuple(value.shape[2:]) for name, value in maps.items()} == {
        f"p{i}": (64 // 2**i, -(-96 // 2**i)) for i in range(2, 7)
    }
    sum(value.square().mean() for value in maps.values()).backward()
    assert all(value.grad is not None for value in net.parameters())


# ------------------------------------------------------------------------------------------ settings of other backbones


def test_settings_of_with_backbone():
    before = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg = adapter.with_backbone(before, "dinat_s_tiny")
    assert before.MODEL.BACKBONE.NAME == "build_retinanet_resnet_fpn_backbone" and "DINAT" not in before.MODEL
    assert cfg.MODEL.BACKBONE.NAME == "build_dinat_s_retinanet_fpn_backbone"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53] and cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert (cfg.INPUT.FORMAT, cfg.MODEL.BACKBONE.FREEZE_AT) == ("RGB", 0)
    assert zoo.PRETRAINED["dinat_s_tiny"] == cfg.MODEL.WEIGHTS
    cfg = adapter.with_backbone(cfg, "nat_mini", checkpoint="file.pth")  # in place of ours, too
    assert cfg.MODEL.BACKBONE.NAME == "build_nat_retinanet_fpn_backbone" and cfg.MODEL.WEIGHTS == "file.pth"
    assert cfg.MODEL.DINAT.DILATIONS is None
    before = dinat_config(layer_scale=1e-5)
    before.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg = adapter.with_backbone(before, "dinat_mini", dilations="mask2former")
    with torch.device("meta"):
        found, expected = build_backbone(cfg).bottom_up, dinat_backbones.DiNAT("dinat_mini", dilations="mask2former")
    assert {n: v.shape for n, v in found.state_dict().items()} == {n: v.shape for n, v in expected.state_dict().items()}
    with pytest.raises(ValueError, match="mask2former.* was never published for DiNAT_s"):
        adapter.with_backbone(before, "dinat_s_tiny", dilations="mask2former")


def dinat_config(**kwargs):
    cfg = get_cfg()
    adapter.add_dinat_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", "build_dinat_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in (SMALL | kwargs).items():
        cfg.MODEL.DINAT[key.upper()] = value
    return cfg


def test_one_warning_names_what_is_a_resnets(caplog):
    cfg = dinat_config()
    cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    build_backbone(cfg)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name.startswith("dinat_backbones")
    for words in (
        "MODEL.PIXEL_MEAN is [103.53, 116.28, 123.675], expected [123.675, 116.28, 103.53]",
        "MODEL.PIXEL_STD is [1.0, 1.0, 1.0], expected [58.395, 57.12, 57.375]",
        "INPUT.FORMAT is BGR, expected RGB",
        "MODEL.WEIGHTS is detectron2://ImageNetPretrained/MSRA/R-50.pkl, expected an address of zoo.PRETRAINED",
        "MODEL.BACKBONE.FREEZE_AT is 2, which freezes nothing here, expected 0 (MODEL.DINAT.FROZEN_STAGES=1 freezes",
    ):
        assert words in record.message
    cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT, cfg.MODEL.DINAT.FROZEN_STAGES = "", "RGB", 1
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    assert not build_backbone(cfg).bottom_up.levels[0].blocks[0].mlp.fc1.weight.requires_grad
    assert len(caplog.records) == 1
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    build_backbone(cfg)
    assert "MODEL.PIXEL_STD is [57.375" in caplog.text and "MODEL.PIXEL_MEAN" not in caplog.records[-1].message


def test_other_channels_have_their_own_mean(caplog):
    cfg = dinat_config()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.MODEL.BACKBONE.FREEZE_AT = [100.0] * 4, [1.0] * 4, 0
    assert build_backbone(cfg)(torch.zeros(1, 4, 32, 32))["p2"].shape[2:] == (8, 8) and not caplog.records


# ----------------------------------------------------------------------------------------------------- MODEL.DINAT.ARCH


@pytest.mark.parametrize(
    ("arch", "setting", "kernel"), [("dinat_tiny", "coco", 7), ("dinat_mini", "mask2former", 11), ("nat_tiny", None, 7)]
)
def test_architectures_by_name(arch, setting, kernel):
    cfg = get_cfg()
    adapter.add_dinat_config(cfg)
    family = zoo.ARCHS[arch].family
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", f"D2{family}", "MODEL.DINAT.ARCH", arch])
    cfg.merge_from_list(["MODEL.DINAT.DILATIONS", setting, "MODEL.DINAT.DROP_PATH_RATE", 0.2])
    with torch.device("meta"):
        found = build_backbone(cfg)
        expected = getattr(dinat_backbones, family)(arch=arch, dilations=setting)
    assert found.kernel_size == kernel and found.dilations == expected.dilations
    assert repr(found).partition("\n")[2] == repr(expected).partition("\n")[2]
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (found, expected)]
    assert shapes[0] == shapes[1]


def test_arch_of_another_family_or_without_dilations():
    cfg = get_cfg()
    adapter.add_dinat_config(cfg)
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "D2DiNAT", "MODEL.DINAT.ARCH", "nat_tiny"])
    with pytest.raises(ValueError, match="belongs to NAT, not to DiNAT"):
        build_backbone(cfg)
    cfg.MODEL.DINAT.ARCH = "dinat_tiny"
    with pytest.raises(ValueError, match="needs dilations="):
        build_backbone(cfg)


# ---------------------------------------------------------------------------------------------- which stages are built


@pytest.mark.parametrize(
    ("features", "levels", "stages"),
    [(["res2", "res3", "res4"], [2, 3, 4, 5], 3), (["res4"], [4, 5], 3), (["res3", "res4", "res5"], [3, 4, 5, 6], 4)],
)
def test_the_pyramid_builds_the_stages_that_it_reads(features, levels, stages):
    cfg = dinat_config()
    cfg.MODEL.FPN.IN_FEATURES = features
    model = build_backbone(cfg)
    assert len(model.bottom_up.levels) == stages and model.bottom_up._out_features == features
    maps = model(torch.randn(1, 3, 64, 64))
    assert list(maps) == list(model.output_shape()) == [f"p{level}" for level in levels]
    sum(value.square().mean() for value in maps.values()).backward()
    assert all(value.grad is not None for value in model.parameters())


@pytest.mark.parametrize("features", [["res3", "res4", "res5"], ["res3", "res4"]])
def test_levels_of_a_retinanet(features):
    """As Detectron2 makes p6 and p7: convolutions with stride 2 of the last stage, the second after a ReLU."""
    cfg = dinat_config()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.IN_FEATURES = "build_dinat_retinanet_fpn_backbone", features
    model = build_backbone(cfg).eval()
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        maps = model(image)
        first = model.top_block.p6(model.bottom_up(image)[features[-1]])
        second = model.top_block.p7(first.relu())
    names = list(maps)
    assert names == [f"p{level}" for level in range(3, len(features) + 5)]
    assert_near([maps[names[-2]], maps[names[-1]]], [first, second])
    assert [model.output_shape()[name].stride for name in names] == [128 // maps[name].shape[-1] for name in names]


@pytest.mark.parametrize("features", [[], ["res2", "res4"], ["res3", "res2"], ["p2"], ["res5", "res6"]])
def test_features_of_a_pyramid_that_do_not_fit(features):
    cfg = dinat_config()
    cfg.MODEL.FPN.IN_FEATURES = features
    with pytest.raises(ValueError, match=r"MODEL.FPN.IN_FEATURES=.*expected consecutive stages of \['res2'"):
        build_backbone(cfg)


@pytest.mark.parametrize(
    ("zoo_name", "key", "value", "missing"),
    [
        ("retinanet_R_50_FPN_1x", "MODEL.BACKBONE.NAME", "build_dinat_fpn_backbone", "p7"),
        ("faster_rcnn_R_50_FPN_1x", "MODEL.BACKBONE.NAME", "build_dinat_retinanet_fpn_backbone", None),
        ("faster_rcnn_R_50_FPN_1x", "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "p2"),
        ("rpn_R_50_C4_1x", "MODEL.DINAT.OUT_FEATURES", ["res5"], "res4"),
    ],
)
def test_maps_that_the_backbone_does_not_return(zoo_name, key, value, missing):
    cfg = zoo_config(f"COCO-Detection/{zoo_name}")
    cfg.merge_from_list([key, value])
    if missing is None:  # p2 to p6 are there
        build_model(cfg)
        return
    with pytest.raises(ValueError, match=rf"reads the feature map '{missing}', and its backbone returns (p|res)\d"):
        build_model(cfg)


# ------------------------------------------------------------------------------------ Detectron2's own checkpointer


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.backbone."])
def test_files_that_detectron2s_checkpointer_cannot_place_are_an_error(tmp_path, prefix):
    model = build_backbone(dinat_config(dilations=DILATIONS))
    source = dinat_backbones.DiNAT(**SMALL, mlp_ratio=2.0, dilations=DILATIONS)
    torch.save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "file.pth")
    detector = torch.nn.ModuleDict({"backbone": model})
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(ValueError, match=r"this model has backbone.bottom_up.patch_embed.proj.0.weight\): load it by"):
        DetectionCheckpointer(detector).load(str(tmp_path / "file.pth"))
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    adapter.Checkpointer(detector).load(str(tmp_path / "file.pth"))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.bottom_up.state_dict().items())
    torch.save(detector.state_dict(), tmp_path / "whole.pth")
    DetectionCheckpointer(detector).load(str(tmp_path / "whole.pth"))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_plain_names_load_by_detectron2s_checkpointer(tmp_path, prefix):
    """As the error says, and for `train.init_checkpoint` of a LazyConfig."""
    source = dinat_backbones.DiNAT(**SMALL, mlp_ratio=2.0, dilations=DILATIONS)
    torch.save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "file.pth")
    if prefix:
        convert.main([str(tmp_path / "file.pth"), str(tmp_path / "plain.pth"), "--to", "imagenet"])
    file = tmp_path / ("plain.pth" if prefix else "file.pth")
    detector = torch.nn.ModuleDict({"backbone": build_backbone(dinat_config(dilations=DILATIONS))})
    DetectionCheckpointer(detector).load(f"{file}?matching_heuristics=True")
    found = detector["backbone"].bottom_up.state_dict()
    different = [name for name, value in source.state_dict().items() if not torch.equal(value, found[name])]
    assert not different


def test_heads_alone_are_loaded_as_before(tmp_path):
    detector = torch.nn.ModuleDict({"backbone": build_backbone(dinat_config()), "head": torch.nn.Linear(2, 2)})
    torch.save({"head.bias": torch.ones(2), "other.weight": torch.ones(1)}, tmp_path / "head.pth")
    DetectionCheckpointer(detector).load(str(tmp_path / "head.pth"))
    assert detector["head"].bias.tolist() == [1, 1]
