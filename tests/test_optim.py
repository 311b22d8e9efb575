"""Layer-wise learning rates against timm's groups of the same models, and through mmengine's and mmpretrain's
constructors."""

import re

import pytest
import torch
from torch import nn

from dinat_backbones import DiNAT, DiNAT_s, create_classifier
from dinat_backbones.optim import layer_scales, parameter_groups

SMALL = dict(embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2], mlp_ratio=2.0, kernel_size=3)


class Detector(nn.Module):
    """With a neck that reads the backbone."""

    def __init__(self, family=DiNAT, **kwargs):
        super().__init__()
        self.backbone = family(**SMALL, **kwargs)
        self.neck = nn.Conv2d(8, 8, 1)


def settings(groups, model, scale=1.0):
    """(learning rate or its scale, weight decay) by parameter name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            rate = group["lr"] / scale if "lr" in group else group["lr_scale"]
            found[names[id(parameter)]] = (pytest.approx(rate, rel=1e-9), group["weight_decay"])
    return found


@pytest.mark.parametrize("name, kwargs", [
    ("dinat_mini", {}), ("dinat_s_tiny", {}), ("nat_mini", {}), ("dinat_large_384", {}), ("nat_isotropic_small", {}),
    ("dinat_mini", dict(num_classes=0)),
])  # fmt: skip
def test_groups_are_those_of_timm(name, kwargs):
    timm = pytest.importorskip("timm", minversion="1.0", reason="timm 1.0 is not installed")
    from timm.optim import param_groups_layer_decay

    import dinat_backbones.adapters.timm  # noqa: F401

    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    theirs = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.8)
    ours = parameter_groups(model, weight_decay=0.05, layer_decay=0.8)
    assert len(theirs) == len(ours)
    for expected, got in zip(theirs, ours, strict=True):
        assert [id(p) for p in got["params"]] == [id(p) for p in expected["params"]]
        assert got["weight_decay"] == expected["weight_decay"]
        assert got["lr_scale"] == pytest.approx(expected["lr_scale"], rel=1e-12)
    with_rate = parameter_groups(model, 2e-4, layer_decay=0.8)
    assert [group["lr"] for group in with_rate] == [2e-4 * group["lr_scale"] for group in ours]


@pytest.mark.parametrize("family, indices", [(DiNAT, None), (DiNAT_s, None), (DiNAT, (1, 2)), (DiNAT, (0, 3))])
def test_scales_of_a_detector(family, indices):
    """Blocks are counted from the neck, which has 1, down to the tokenizer; norms and downsamplers go with theirs."""
    model = Detector(family, out_indices=indices)
    scales = layer_scales(model, 0.5)
    stages = getattr(model.backbone, model.backbone.stages_name)
    blocks = [(i, j) for i, stage in enumerate(stages) for j in range(len(stage.blocks))]
    assert len(blocks) == (4 if indices == (1, 2) else 5)
    last = {i: blocks.index((i, len(stage.blocks) - 1)) for i, stage in enumerate(stages)}
    for name, scale in scales.items():
        numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
        if name.startswith("neck"):
            expected = 0
        elif "patch_embed" in name:
            expected = len(blocks) + 1
        elif ".blocks." in name:
            expected = len(blocks) - blocks.index((numbers[0], numbers[1]))
        elif "downsample" in name:
            expected = len(blocks) - last[numbers[0]]
        else:
            expected = len(blocks) - last[int(re.search(r"norm(\d)", name)[1])]
        assert scale == 0.5**expected, name


def test_frozen_parameters_and_names_without_weight_decay():
    model = Detector(frozen_stages=1)
    groups = parameter_groups(model, 1e-3, no_weight_decay=["neck*"])
    found = settings(groups, model, scale=1e-3)
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decaying = {name for name, (_, decay) in found.items() if decay}
    assert decaying == {name for name in found if name.endswith("weight") and "norm" not in name and "neck" not in name}
    torch.optim.AdamW(groups)


def test_refusals():
    with pytest.raises(ValueError, match="layer_decay=0.5: Linear has no NAT, DiNAT or DiNAT_s in it"):
        parameter_groups(nn.Linear(2, 2), layer_decay=0.5)
    with pytest.raises(ValueError, match="layer_decay=1.5: expected more than 0 and at most 1"):
        parameter_groups(Detector(), layer_decay=1.5)
    assert len(parameter_groups(nn.Linear(2, 2))) == 2


def build(model, paramwise, **kwargs):
    """The optimizer's groups as a config of mmdet or mmseg makes them."""
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    from mmengine.optim import build_optim_wrapper

    import dinat_backbones.adapters.openmmlab  # noqa: F401

    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.05)
    constructor = dict(constructor="LayerDecayOptimWrapperConstructor", paramwise_cfg=paramwise)
    return build_optim_wrapper(model, dict(optimizer=optimizer, **constructor, **kwargs)).optimizer.param_groups


@pytest.mark.parametrize("key", ["layer_decay_rate", "decay_rate"])
def test_constructor_of_mmengine(key):
    model = Detector()
    got = settings(build(model, {key: 0.7}), model, scale=1e-3)
    assert got == settings(parameter_groups(model, 1e-3, layer_decay=0.7), model, scale=1e-3)


def test_constructor_keeps_custom_keys():
    """A tenth of the learning rate for the backbone, besides the decay of layers."""
    model = Detector(frozen_stages=0)
    got = settings(build(model, dict(layer_decay_rate=0.7, custom_keys=dict(backbone=dict(lr_mult=0.1)))), model, 1e-3)
    expected = settings(parameter_groups(model, 1e-3, layer_decay=0.7), model, 1e-3)
    assert got.keys() == expected.keys()
    for name, (rate, decay) in expected.items():
        factor = 0.1 if name.startswith("backbone") else 1.0
        assert got[name] == (pytest.approx(rate.expected * factor), decay)


def test_constructor_refuses():
    with pytest.raises(ValueError, match="LayerDecayOptimWrapperConstructor needs layer_decay_rate, such as 0.8"):
        build(Detector(), dict(num_layers=12))
    with pytest.raises(ValueError, match="decay_type='stage_wise': expected 'layer_wise'"):
        build(Detector(), dict(decay_rate=0.8, decay_type="stage_wise"))


def test_constructor_of_mmpretrain():
    """Its layer-wise constructor asks the classifier, which asks the backbone's `get_layer_depth`."""
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    from mmengine.optim import build_optim_wrapper
    from mmpretrain.models import ImageClassifier
    from mmpretrain.utils import register_all_modules

    import dinat_backbones.adapters.openmmlab  # noqa: F401

    register_all_modules()
    model = ImageClassifier(
        backbone=dict(type="DiNAT", **SMALL, out_indices=[3]),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=3, in_channels=64),
    )
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
            constructor="LearningRateDecayOptimWrapperConstructor",
            paramwise_cfg=dict(
                layer_decay_rate=0.8,
                norm_decay_mult=0.0,
                bias_decay_mult=0.0,
                flat_decay_mult=0.0,
                custom_keys={".rpb": dict(decay_mult=0.0)},
            ),
        ),
    )
    expected = settings(parameter_groups(model, 1e-3, layer_decay=0.8), model, 1e-3)
    assert settings(wrapper.optimizer.param_groups, model, 1e-3) == expected


def test_trainer_of_detectron2():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    pytest.importorskip("mask2former", reason="Mask2Former is not installed")
    from detectron2.config import get_cfg

    from dinat_backbones.adapters.detectron2 import add_dinat_config
    from dinat_backbones.adapters.detectron2.trainer import parameter_groups as detectron2_groups

    cfg = get_cfg()
    add_dinat_config(cfg)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.LAYER_DECAY, cfg.SOLVER.BACKBONE_MULTIPLIER = 1e-3, 0.8, 0.1
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    model = Detector()
    got, scales = settings(detectron2_groups(cfg, model), model, 1e-3), layer_scales(model, 0.8)
    for name, (rate, _) in got.items():
        assert rate == scales[name] * (0.1 if "backbone" in name else 1.0)


def test_classifier_alone():
    model = create_classifier("dinat_mini", 10)
    scales = layer_scales(model, 0.9)
    assert scales["head.weight"] == 1 and scales["norm.weight"] == scales["levels.3.blocks.4.mlp.fc1.weight"] == 0.9
