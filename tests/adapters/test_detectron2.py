"""adapters/detectron2/: backbones and pyramids in Detectron2's registry, MODEL.DINAT, checkpoints."""

import logging
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch

import dinat_backbones
from dinat_backbones import zoo
from dinat_backbones.optim import layer_scales
from helpers import ROOT, assert_near, environment

pytest.importorskip("detectron2", reason="detectron2 is not installed: the classic stack has it (make test-classic)")
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone, build_model
from detectron2.solver import get_default_optimizer_params
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from dinat_backbones.adapters import detectron2 as adapter

FAMILIES = ["NAT", "DiNAT", "DiNAT_s"]
SMALL = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, drop_path_rate=0.0)
MLP_RATIO = 2.0  # MODEL.DINAT's default
RGB = ShapeSpec(channels=3)


def config(name="D2DiNAT", **kwargs):
    cfg = get_cfg()
    adapter.add_dinat_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    for key, value in (SMALL | kwargs).items():
        setattr(cfg.MODEL.DINAT, key.upper(), value)
    return cfg


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_features_as_the_plain_backbone(family):
    dilations = None if family == "NAT" else [[2], [2], [1, 3], [1]]
    backbone = randomize(getattr(dinat_backbones, family)(**SMALL, mlp_ratio=MLP_RATIO, dilations=dilations))
    model = build_backbone(config(f"D2{family}", dilations=dilations)).eval()
    assert isinstance(model, (Backbone, type(backbone)))
    model.load_state_dict(backbone.state_dict())  # strict: the published names, without a prefix
    image = torch.randn(2, 3, 70, 93)
    with torch.no_grad():
        features, expected = model(image), backbone(image)
    assert list(features) == ["res2", "res3", "res4", "res5"]
    shapes = model.output_shape()
    for (name, found), wanted in zip(features.items(), expected, strict=True):
        assert_near([found], [wanted], 1e-6)
        stride = shapes[name].stride
        assert found.shape == (2, shapes[name].channels, -(-70 // stride), -(-93 // stride))
    assert model.size_divisibility == 32


def test_defaults_are_the_published_ones():
    """A config that sets what the published Mask2Former configs set builds the backbone of the table."""
    cfg = get_cfg()
    adapter.add_dinat_config(cfg)
    dilations = [list(stage) for stage in zoo.dilations("dinat_large", "mask2former")]
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "D2DiNAT", "MODEL.DINAT.KERNEL_SIZE", 11])
    cfg.merge_from_list(["MODEL.DINAT.DILATIONS", dilations])
    with torch.device("meta"):
        model = build_backbone(cfg)
        backbone = dinat_backbones.DiNAT(
            arch="dinat_large", kernel_size=11, dilations="mask2former", drop_path_rate=0.3
        )
    assert repr(model).partition("\n")[2] == repr(backbone).partition("\n")[2]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in backbone.state_dict().items()}


def test_lazy_config_and_further_arguments():
    model = instantiate(LazyCall(adapter.D2NAT)(arch="nat_small", out_features=["res5", "res3"], frozen_stages=1))
    assert model._out_features == ["res3", "res5"] and "levels.0.blocks.0.gamma1" in model.state_dict()
    assert not model.patch_embed.norm.weight.requires_grad and model.levels[1].blocks[0].norm1.weight.requires_grad
    assert {name: shape.channels for name, shape in model.output_shape().items()} == {"res3": 192, "res5": 768}
    layer_scale = build_backbone(config(layer_scale=1e-5, with_cp=True))
    assert layer_scale.levels[0].with_cp and layer_scale.levels[0].blocks[0].gamma1[0] == 1e-5


def test_wrong_configs():
    with pytest.raises(ValueError, match=r"OUT_FEATURES=\['res6'\]: expected some of res2, res3, res4, res5"):
        build_backbone(config(out_features=["res6"]))
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "D2DiNAT"
    with pytest.raises(ValueError, match=r"call add_dinat_config\(cfg\)"):
        build_backbone(cfg)


@pytest.mark.parametrize("family", FAMILIES)
def test_feature_pyramid(family):
    model = BACKBONE_REGISTRY.get(f"build_{family.lower()}_fpn_backbone")(rcnn_config(), RGB)
    assert isinstance(model.bottom_up, getattr(dinat_backbones, family))
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))
    sizes = {name: (tuple(values.shape[1:]), shape.stride) for (name, values), shape in pairs(maps, model)}
    assert sizes == {f"p{i}": ((16, -(-64 // 2**i), -(-96 // 2**i)), 2**i) for i in range(2, 7)}


def pairs(maps, model):
    return zip(maps.items(), (model.output_shape()[name] for name in maps), strict=True)


def rcnn_config():
    cfg = config("build_dinat_fpn_backbone")
    cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16])
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True])
    levels = [f"p{i}" for i in range(2, 7)]
    cfg.merge_from_list(["MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels[:4]])
    cfg.merge_from_list(["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]])
    cfg.merge_from_list(["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1])
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7])
    cfg.merge_from_list(["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1])
    cfg.merge_from_list(["MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7])
    return cfg


def test_mask_rcnn_trains_every_parameter():
    torch.manual_seed(0)
    cfg = rcnn_config()
    cfg.INPUT.MASK_FORMAT = "bitmask"
    model = build_model(cfg).train()
    target = Instances((64, 64))
    target.gt_boxes = Boxes(torch.tensor([[8.0, 8, 40, 40], [20, 4, 60, 30]]))
    target.gt_classes = torch.tensor([0, 1])
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 8:40, 8:40] = masks[1, 4:30, 20:60] = True
    target.gt_masks = BitMasks(masks)
    with EventStorage():
        losses = model([dict(image=torch.randint(0, 256, (3, 64, 64)), instances=target)])
    assert {"loss_mask", "loss_box_reg", "loss_rpn_cls"} <= set(losses)
    sum(losses.values()).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert not without and all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("names", [["res2", "res3", "res4", "res5"], ["res3", "res4"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_lr_factor_func_gives_the_rates_of_layer_scales(family, names):
    cfg = rcnn_config()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.IN_FEATURES = f"build_{family.lower()}_fpn_backbone", names
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = [name.replace("res", "p") for name in names]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8]] * len(names)
    model = build_model(cfg)
    factor = partial(adapter.get_lr_decay_rate, lr_decay_rate=0.8, depths=SMALL["depths"], out_features=names)
    expected = layer_scales(model, 0.8)
    groups = get_default_optimizer_params(model, base_lr=1.0, lr_factor_func=factor)
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    assert {name: found[id(parameters[name])] for name in parameters} == pytest.approx(expected, rel=1e-12)
    blocks = sum(SMALL["depths"]) - (1 if len(names) == 2 else 0)
    assert len(set(found.values())) == blocks + 2  # tokenizer and heads


def test_wrong_lr_factors():
    name = "backbone.levels.17.blocks.0.norm1.weight"
    assert adapter.get_lr_decay_rate("backbone.levels.3.blocks.4.norm1.weight", 0.5, arch="dinat_mini") == 0.5
    with pytest.raises(ValueError, match="needs the backbone's arch"):
        adapter.get_lr_decay_rate(name, 0.5)
    with pytest.raises(ValueError, match="lr_decay_rate=1.5: expected more than 0"):
        adapter.get_lr_decay_rate(name, 1.5, arch="dinat_mini")
    with pytest.raises(ValueError, match=r"out_features=\['p2'\]: expected some of res2"):
        adapter.get_lr_decay_rate(name, 0.5, arch="dinat_mini", out_features=["p2"])


def test_scripting_is_refused_and_tracing_works():
    model = build_model(rcnn_config()).eval()
    for module in (model, model.backbone.bottom_up):
        with pytest.raises(RuntimeError, match="torch.jit.script cannot compile D2DiNAT: use torch.jit.trace"):
            scripting_with_instances(module, dict(proposal_boxes=Boxes))
    images, larger = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        traced = torch.jit.trace(TracingAdapter(model.backbone.bottom_up, images), images)
        expected = model.backbone.bottom_up(larger)
        assert_near(traced(larger), expected.values(), 1e-6)


# ---------------------------------------------------------------------------------------------------- checkpoints


class Detector(torch.nn.Module):
    def __init__(self, seed=0, **kwargs):
        super().__init__()
        self.backbone = build_backbone(config(**kwargs))
        self.head = torch.nn.Linear(4, 2)
        randomize(self, seed)


def load(model, path, **kwargs):
    return adapter.Checkpointer(model, **kwargs).load(str(path))


def test_own_checkpoints_come_back_with_what_was_saved_beside_them(tmp_path):
    model, other = Detector(), Detector(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    adapter.Checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_1", iteration=41)
    again = adapter.Checkpointer(other, str(tmp_path), optimizer=torch.optim.AdamW(other.parameters()))
    assert again.resume_or_load("", resume=True) == {"iteration": 41}
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_weights_of_a_backbone_alone(tmp_path, wrapper, prefix, caplog):
    backbone = randomize(dinat_backbones.DiNAT(**SMALL, mlp_ratio=MLP_RATIO), seed=2)
    state = {prefix + name: value for name, value in backbone.state_dict().items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "backbone.pth")
    model = BACKBONE_REGISTRY.get("build_dinat_fpn_backbone")(rcnn_config(), RGB)
    with caplog.at_level(logging.INFO):
        load(model, tmp_path / "backbone.pth")
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in model.bottom_up.state_dict().items())
    assert "loaded" in caplog.text


def test_weights_of_a_smaller_kernel_are_resized(tmp_path):
    backbone = randomize(dinat_backbones.DiNAT(**SMALL | dict(kernel_size=7), mlp_ratio=MLP_RATIO), seed=2)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    model = Detector(kernel_size=11)
    load(model, tmp_path / "backbone.pth")
    table, source = (m.levels[2].blocks[1].attn.rpb for m in (model.backbone, backbone))
    resized = torch.nn.functional.interpolate(source[None], size=(21, 21), mode="bicubic", align_corners=False)[0]
    assert torch.equal(table, resized) and table.shape[-1] == 21


def test_another_architecture_is_an_error(tmp_path):
    deeper = dinat_backbones.DiNAT(**SMALL | dict(depths=[1, 1, 3, 1]), mlp_ratio=MLP_RATIO)
    torch.save(deeper.state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match=r"levels\.2 has 3 blocks in the file and 2 in the model"):
        load(Detector(), tmp_path / "deeper.pth")


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


def test_code_in_checkpoints_is_not_run(tmp_path):
    torch.save({"model": Detector().state_dict(), "trap": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="needs code"):
        load(Detector(), tmp_path / "trap.pth")
    with open(tmp_path / "trap.pkl", "wb") as file:
        pickle.dump({"model": {}, "trap": Trap()}, file)
    with pytest.raises(ValueError):
        load(Detector(), tmp_path / "trap.pkl")


def test_a_missing_checkpoint_says_where_the_published_one_is():
    with pytest.raises(FileNotFoundError, match=r"set MODEL.WEIGHTS to https://.*/dinat_large_in22k_224.pth"):
        load(Detector(), "dinat_large_in22k_224.pkl")
    with pytest.raises(FileNotFoundError, match="nothing.pth is not there$"):
        load(Detector(), "nothing.pth")


def test_one_sentence_without_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; import dinat_backbones.adapters.detectron2"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert (
        run.stderr.strip().split("\n")[-1].startswith("ModuleNotFoundError: dinat_backbones.adapters.detectron2 needs")
    )


def test_files_are_saved_whole_or_not_at_all(tmp_path):
    """The file before stays as it is if writing the next one fails; what is saved is what Detectron2 saves."""
    model = torch.nn.Linear(2, 1)
    ours, original = adapter.Checkpointer(model, str(tmp_path)), DetectionCheckpointer(model, str(tmp_path))
    original.save("original", iteration=3)
    ours.save("model", iteration=3)
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"
    path = tmp_path / "model.pth"
    assert torch.load(path).keys() == torch.load(tmp_path / "original.pth").keys()
    content = path.read_bytes()
    with pytest.raises(AttributeError):
        ours.save("model", trap=lambda: None)
    assert path.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"original.pth", "model.pth", "last_checkpoint"}
