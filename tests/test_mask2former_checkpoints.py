"""checkpoint/mask2former.py against the real models: the same weights have to give the same logits in every home."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from conftest import fill_by_name
from test_convert import run_tool
from torch import nn

from dinat_backbones import DiNAT
from dinat_backbones.checkpoint import backbone_state, convert, load_backbone, load_model, read
from dinat_backbones.checkpoint.layouts import LAYOUTS
from dinat_backbones.checkpoint.mask2former import HOMES, home
from dinat_backbones.zoo import ade20k

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo" / "mask2former_dinat_shapes.py"
TRUNK = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, dilations=[[1], [2], [1, 2], [1]])
CHANNELS = (32, 64, 128, 256)
WIDTH, HEADS, ENCODER, DECODER, FFN, QUERIES, CLASSES = 64, 4, 2, 4, 80, 7, 4


# ---------------------------------------------------------------------------------------------------------- models


def fill(model):
    """Weights by name; offsets of a few pixels, so that axes and scales of the deformable attention matter."""
    with torch.no_grad():
        for name, value in fill_by_name(model).named_parameters():
            if "sampling_offsets.bias" in name:
                value *= 20
            elif "query_" in name or "level_e" in name:
                value *= 3
    return model.eval()


@pytest.fixture(scope="module")
def image():
    """Ramps and waves: a different one in each corner and channel."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    planes = torch.stack([y + torch.sin(9 * x), x * y, torch.cos(13 * y * x) - x])
    return (planes + 0.3 * torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(0)))[None]


def mmdet_model():
    pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    import dinat_backbones.adapters.openmmlab  # noqa: F401

    model = Config.fromfile(CONFIG).model
    model.backbone.update(TRUNK, init_cfg=None, drop_path_rate=0.0)
    head = model.panoptic_head
    head.num_queries = QUERIES
    head.enforce_decoder_input_project = True  # so that every line of the table has a tensor
    head.pixel_decoder.norm_cfg.num_groups = 32  # detectron2 and transformers know no other
    head.pixel_decoder.encoder.num_layers = ENCODER
    head.pixel_decoder.encoder.layer_cfg.ffn_cfg.feedforward_channels = 1024  # detectron2 knows no other
    head.transformer_decoder.num_layers = DECODER
    head.transformer_decoder.layer_cfg.ffn_cfg.feedforward_channels = FFN
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(model).eval()


@torch.no_grad()
def mmdet_logits(model, image):
    """Class and mask logits after every layer of the decoder."""
    return model.panoptic_head(model.backbone(image), [])


@pytest.fixture(scope="module")
def weights():
    """A file of mmdet with random weights."""
    return {"meta": {"dataset_meta": {"classes": ("a", "b", "c", "d")}}, "state_dict": fill(mmdet_model()).state_dict()}


def detectron2_model():
    pytest.importorskip("detectron2", reason="detectron2 is not installed: make setup-classic")
    pytest.importorskip("mask2former.modeling", reason="Mask2Former is not installed: make setup-classic")
    from detectron2.config import get_cfg
    from detectron2.modeling import ShapeSpec, build_sem_seg_head
    from detectron2.projects.deeplab import add_deeplab_config
    from mask2former import add_maskformer2_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    names = [f"res{i}" for i in (2, 3, 4, 5)]
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    head.NAME, head.IN_FEATURES, head.NUM_CLASSES, head.NORM = "MaskFormerHead", names, CLASSES, "GN"
    head.PIXEL_DECODER_NAME, head.TRANSFORMER_ENC_LAYERS = "MSDeformAttnPixelDecoder", ENCODER
    head.CONVS_DIM = head.MASK_DIM = former.HIDDEN_DIM = WIDTH
    former.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    former.TRANSFORMER_IN_FEATURE, former.DEC_LAYERS = "multi_scale_pixel_decoder", DECODER + 1
    former.NHEADS, former.DIM_FEEDFORWARD, former.NUM_OBJECT_QUERIES = HEADS, FFN, QUERIES
    former.ENFORCE_INPUT_PROJ = True
    shapes = {name: ShapeSpec(channels=c, stride=4 << i) for i, (name, c) in enumerate(zip(names, CHANNELS, strict=True))}

    model = nn.Module()
    model.backbone, model.sem_seg_head, model.criterion = DiNAT(**TRUNK), build_sem_seg_head(cfg, shapes), nn.Module()
    model.criterion.register_buffer("empty_weight", torch.full((CLASSES + 1,), float("nan")))
    return model.eval()


@torch.no_grad()
def detectron2_logits(model, image):
    out = model.sem_seg_head({f"res{i}": feature for i, feature in enumerate(model.backbone(image), 2)})
    layers = [*out["aux_outputs"], out]
    return [layer["pred_logits"] for layer in layers], [layer["pred_masks"] for layer in layers]


def huggingface_model():
    """Without a trunk."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    names = [f"stage{i}" for i in (1, 2, 3, 4)]
    trunk = SwinConfig(embed_dim=CHANNELS[0], depths=[1] * 4, num_heads=[1] * 4, out_features=names)
    config = Mask2FormerConfig(
        backbone_config=trunk,
        feature_size=WIDTH,
        mask_feature_size=WIDTH,
        hidden_dim=WIDTH,
        encoder_feedforward_dim=1024,
        encoder_layers=ENCODER,
        decoder_layers=DECODER + 1,
        num_attention_heads=HEADS,
        dim_feedforward=FFN,
        num_queries=QUERIES,
        num_labels=CLASSES,
        enforce_input_projection=True,
        use_auxiliary_loss=True,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder = nn.Identity()
    return model.eval()


@torch.no_grad()
def huggingface_logits(model, features):
    from transformers.modeling_outputs import BackboneOutput

    model.model.pixel_level_module.encoder.forward = lambda *args, **kwargs: BackboneOutput(feature_maps=features)
    out = model(pixel_values=torch.zeros(1, 3, 96, 128))
    layers = [*out.auxiliary_logits, out]
    return [layer["class_queries_logits"] for layer in layers], [layer["masks_queries_logits"] for layer in layers]


def assert_same_logits(got, expected, tolerance):
    for kind in (0, 1):
        assert len(got[kind]) == len(expected[kind]) == DECODER + 1
        for layer, (a, b) in enumerate(zip(got[kind], expected[kind], strict=True)):
            assert a.shape == b.shape and float(b.std()) > 0.05, (kind, layer)
            error = float((a - b).abs().max())
            print(f"{('class', 'mask')[kind]} logits after layer {layer}: {error:.1e} of {float(b.abs().max()):.1f}")
            assert error <= tolerance, (kind, layer, error)


# ------------------------------------------------------------------------------------------- same weights, same logits


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_gives_mmdets_logits(tmp_path, weights, image, suffix):
    """Loaded by detectron2's own checkpointer, from both kinds of file, and read back bit by bit."""
    theirs, ours = detectron2_model(), mmdet_model()
    from detectron2.checkpoint import DetectionCheckpointer

    torch.save(weights, tmp_path / "mmdet.pth")
    run_tool(tmp_path / "mmdet.pth", tmp_path / f"d2{suffix}", "--to", "detectron2")
    incompatible = DetectionCheckpointer(theirs)._load_model(
        DetectionCheckpointer(theirs)._load_file(str(tmp_path / f"d2{suffix}"))
    )
    assert not incompatible.missing_keys and not incompatible.unexpected_keys and not incompatible.incorrect_shapes
    assert theirs.criterion.empty_weight.tolist() == pytest.approx([1] * CLASSES + [0.1])
    ours.load_state_dict(weights["state_dict"])
    assert_same_logits(detectron2_logits(theirs, image), mmdet_logits(ours, image), 1e-4)
    load_model(theirs, tmp_path / f"d2{suffix}")  # which renames nothing, either
    back, _ = convert(read(tmp_path / f"d2{suffix}"), "mmdet3")
    assert_equal(back["state_dict"], weights["state_dict"])


def test_transformers_gives_mmdets_logits(weights, image):
    theirs, ours = huggingface_model(), mmdet_model()
    heads = {name: tensor for name, tensor in weights["state_dict"].items() if not name.startswith("backbone.")}
    state, _ = convert(heads, "huggingface")
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state)
    ours.load_state_dict(weights["state_dict"])
    with torch.no_grad():
        features = ours.backbone(image)
    assert_same_logits(huggingface_logits(theirs, features), mmdet_logits(ours, image), 1e-4)


# -------------------------------------------------------------------------------------------------------- round trips


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def bare(checkpoint):
    return checkpoint.get("state_dict", checkpoint.get("model", checkpoint))


@pytest.mark.parametrize("first", HOMES)
@pytest.mark.parametrize("second", HOMES)
def test_there_and_back(weights, first, second):
    heads = {name: tensor for name, tensor in weights["state_dict"].items() if not name.startswith("backbone.")}
    heads = weights["state_dict"] if "huggingface" not in (first, second) else heads
    there, _ = convert(heads, first)
    between, changes = convert(there, second)
    assert home(bare(there)) == first and home(bare(between)) == second
    assert {change.kind for change in changes} <= {"kept", "renamed", "added", "dropped"}
    lost = {change.source for change in changes if change.kind == "dropped"}
    assert lost <= {"criterion.empty_weight"} and bool(lost) == (first not in HOMES[:2] and second in HOMES[:2])
    assert_equal(bare(convert(between, first)[0]), bare(there))
    assert_equal(convert(between, "mmdet3")[0]["state_dict"], heads)
