"""Layouts of Mask2Former against the real models: the same weights have to give the same logits in every layout."""

import pytest
import torch
from torch import nn

from dinat_backbones import DiNAT
from dinat_backbones.checkpoint import convert, load_model, read
from dinat_backbones.checkpoint.mask2former_layouts import LAYOUTS, find_layout
from dinat_backbones.zoo import ade20k
from helpers import ROOT, fill_by_name, run_tool

CONFIG = ROOT / "configs" / "demo" / "mask2former_dinat_shapes.py"
BACKBONE = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0)
BACKBONE["dilations"] = [[1], [2], [1, 2], [1]]
CHANNELS = (32, 64, 128, 256)
STAGES = ["stage1", "stage2", "stage3", "stage4"]
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
    model.backbone.update(BACKBONE, init_cfg=None, drop_path_rate=0.0)
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
    shapes = {
        name: ShapeSpec(channels=c, stride=4 << i) for i, (name, c) in enumerate(zip(names, CHANNELS, strict=True))
    }

    model = nn.Module()
    model.backbone, model.sem_seg_head, model.criterion = (
        DiNAT(**BACKBONE),
        build_sem_seg_head(cfg, shapes),
        nn.Module(),
    )
    model.criterion.register_buffer("empty_weight", torch.full((CLASSES + 1,), float("nan")))
    return model.eval()


@torch.no_grad()
def detectron2_logits(model, image):
    out = model.sem_seg_head({f"res{i}": feature for i, feature in enumerate(model.backbone(image), 2)})
    layers = [*out["aux_outputs"], out]
    return [layer["pred_logits"] for layer in layers], [layer["pred_masks"] for layer in layers]


def huggingface_model(backbone=None):
    """With the backbone of this configuration, or with none."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    channels = SwinConfig(embed_dim=CHANNELS[0], depths=[1] * 4, num_heads=[1] * 4, out_features=STAGES)
    config = Mask2FormerConfig(
        backbone_config=backbone or channels,
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
    )
    model = Mask2FormerForUniversalSegmentation(config)
    if backbone is None:
        model.model.pixel_level_module.encoder = nn.Identity()
    return model.eval()


@torch.no_grad()
def huggingface_logits(model, image, features=None):
    from transformers.modeling_outputs import BackboneOutput

    if features is not None:
        model.model.pixel_level_module.encoder.forward = lambda *args, **kwargs: BackboneOutput(feature_maps=features)
    out = model(pixel_values=image, output_auxiliary_logits=True)
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
    DetectionCheckpointer(theirs).load(str(tmp_path / f"d2{suffix}"))
    assert_equal(theirs.state_dict(), convert(weights, "detectron2")[0]["model"])
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
    assert_same_logits(huggingface_logits(theirs, image, features), mmdet_logits(ours, image), 1e-4)


def test_transformers_with_its_dinat_gives_mmdets_logits(tmp_path, weights, image):
    """The backbone, too; from a file as transformers saves it, and back bit by bit."""
    reason = "transformers' models are not there: pip install 'dinat_backbones[huggingface]'"
    adapter = pytest.importorskip("dinat_backbones.adapters.huggingface", reason=reason)
    theirs, ours = (
        huggingface_model(adapter.DinatConfig(**BACKBONE, drop_path_rate=0.0, out_features=STAGES)),
        mmdet_model(),
    )
    state, _ = convert(weights, "huggingface")
    theirs.load_state_dict(state)
    ours.load_state_dict(weights["state_dict"])
    assert_same_logits(huggingface_logits(theirs, image), mmdet_logits(ours, image), 1e-4)
    theirs.save_pretrained(tmp_path)
    back, _ = convert(read(tmp_path / "model.safetensors"), "mmdet3")
    assert_equal(back["state_dict"], weights["state_dict"])


# -------------------------------------------------------------------------------------------------------- round trips


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def bare(checkpoint):
    return checkpoint.get("state_dict", checkpoint.get("model", checkpoint))


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_there_and_back(weights, first, second):
    heads = {name: tensor for name, tensor in weights["state_dict"].items() if not name.startswith("backbone.")}
    heads = weights["state_dict"] if "huggingface" not in (first, second) else heads
    there, _ = convert(heads, first)
    between, changes = convert(there, second)
    assert find_layout(bare(there)) == first and find_layout(bare(between)) == second
    assert {change.kind for change in changes} <= {"kept", "renamed", "added", "dropped"}
    lost = {change.source for change in changes if change.kind == "dropped" and change.source in bare(there)}
    assert lost <= {"criterion.empty_weight"} and bool(lost) == (first not in LAYOUTS[:2] and second in LAYOUTS[:2])
    assert_equal(bare(convert(between, first)[0]), bare(there))
    assert_equal(convert(between, "mmdet3")[0]["state_dict"], heads)


# ----------------------------------------------------------------------------------------------------- order of classes


def numbered(classes):
    """A file of detectron2 whose rows of class logits say their number; "no object" is -1."""
    rows = torch.tensor([*range(classes), -1.0])
    predictor = "sem_seg_head.predictor."
    names = {f"{predictor}class_embed.weight": rows[:, None].repeat(1, 2), f"{predictor}class_embed.bias": rows}
    return {
        "model": names
        | {f"{predictor}query_embed.weight": torch.ones(1), f"{predictor}query_feat.weight": torch.ones(1)}
    }


def rows(checkpoint, name="panoptic_head.cls_embed"):
    bias, weight = (bare(checkpoint)[f"{name}.{kind}"] for kind in ("bias", "weight"))
    assert torch.equal(weight, bias[:, None].repeat(1, 2)) and bias[-1] == -1
    return [int(row) for row in bias[:-1]]


def test_ade20k_has_mmdets_order_in_mmdet_alone():
    mmdet = pytest.importorskip("mmdet.datasets.ade20k", reason="mmdet is not installed")
    there, changes = convert(numbered(150), "mmdet3")
    expected = [
        ade20k.NAMES.index(name) for name in mmdet.ADE20KPanopticDataset.METAINFO["classes"] if name != "screen"
    ]
    assert [row for row in rows(there) if ade20k.NAMES[row] != "screen"] == expected  # two classes have that name
    assert sorted(rows(there)) == list(range(150)) and rows(there)[:2] == [7, 8]
    assert [change.target for change in changes if change.kind == "reordered"] == [
        "panoptic_head.cls_embed.weight",
        "panoptic_head.cls_embed.bias",
    ]
    assert rows(convert(there, "detectron2")[0], "sem_seg_head.predictor.class_embed") == list(range(150))
    assert rows(convert(there, "huggingface")[0], "class_predictor") == list(range(150))
    assert rows(convert(there, "mmseg1")[0], "decode_head.cls_embed") == list(range(150))


def test_cityscapes_has_things_first_in_mmdet():
    """Person, rider, car, ... are 11 to 18 of the 19 classes."""
    there, _ = convert(numbered(19), "mmdet3")
    assert rows(there) == [*range(11, 19), *range(11)]
    assert rows(convert(there, "detectron2")[0], "sem_seg_head.predictor.class_embed") == list(range(19))


@pytest.mark.parametrize("classes", [133, 100, 80, 8])
def test_other_data_sets_have_things_first_anyway(classes):
    assert rows(convert(numbered(classes), "mmdet3")[0]) == list(range(classes))


def test_things_of_another_data_set():
    there, _ = convert(numbered(5), "mmdet3", things=[4, 1])
    assert rows(there) == [4, 1, 0, 2, 3]
    assert rows(convert(there, "mmseg1", things=[4, 1])[0], "decode_head.cls_embed") == list(range(5))
    assert rows(convert(numbered(150), "mmdet3", things=[])[0]) == list(range(150))
    for wrong in ([5], [0, 0], [-1]):
        with pytest.raises(ValueError, match=r"things \[.*expected different numbers from 0 to 4"):
            convert(numbered(5), "mmdet3", things=wrong)


# ----------------------------------------------------------------------------------------------- files of detectron2


def test_names_of_the_first_version(weights):
    present, _ = convert(weights, "detectron2")
    first = {
        name.replace("head.pixel_decoder.", "head.").replace("query_feat", "static_query"): tensor
        for name, tensor in present["model"].items()
    }
    assert "sem_seg_head.predictor.static_query.weight" in first and "sem_seg_head.adapter_1.weight" in first
    first["pixel_mean"] = torch.ones(3, 1, 1)
    state, changes = convert({"model": first}, "mmdet3")
    assert_equal(state["state_dict"], weights["state_dict"])
    assert {c.source for c in changes if c.kind == "dropped"} == {"pixel_mean", "criterion.empty_weight"}


def test_own_weights_of_the_loss_are_kept_where_there_is_a_place(weights):
    file, _ = convert(weights, "detectron2")
    file["model"]["criterion.empty_weight"] = own = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5])
    assert torch.equal(convert(file, "detectron2")[0]["model"]["criterion.empty_weight"], own)
    assert "criterion.empty_weight" not in convert(file, "mmdet3")[0]["state_dict"]


def test_other_kernel_size(weights):
    file, changes = convert(weights, "detectron2", kernel_size=5)
    tables = [name for name in file["model"] if name.endswith("rpb")]
    assert len(tables) == 5 and all(file["model"][name].shape[-1] == 9 for name in tables)
    assert [change.target for change in changes if change.kind == "resized"] == tables


def test_backbone_of_a_mask2former(weights):
    backbone = {k.removeprefix("backbone."): v for k, v in weights["state_dict"].items() if k.startswith("backbone.")}
    state, changes = convert(convert(weights, "detectron2")[0], "imagenet")
    assert_equal(state, backbone)
    assert {change.kind for change in changes} == {"renamed", "dropped"}


def imagenet():
    backbone = {
        name: t for name, t in fill_by_name(DiNAT(**BACKBONE)).state_dict().items() if not name.startswith("norm")
    }
    return backbone | {"norm.weight": torch.ones(256), "norm.bias": torch.ones(256), "head.weight": torch.ones(9, 256)}


def test_classification_to_detectron2_and_back():
    file, changes = convert(imagenet(), "detectron2")
    assert file["matching_heuristics"] is True and set(file) == {"model", "__author__", "matching_heuristics"}
    backbone = {name: t for name, t in imagenet().items() if not name.startswith(("norm.", "head."))}
    assert_equal(file["model"], backbone)
    assert {c.source for c in changes if c.kind == "dropped"} == {"norm.weight", "norm.bias", "head.weight"}
    assert_equal(convert(file, "imagenet")[0], backbone)
    assert_equal(convert(file, "mmdet3")[0]["state_dict"], {f"backbone.{name}": t for name, t in backbone.items()})


def test_backbone_with_output_norms_keeps_its_prefix():
    """Without it, detectron2 would put `norm2.weight` wherever a name ends like that."""
    backbone = fill_by_name(DiNAT(**BACKBONE)).state_dict()
    file, _ = convert(backbone, "detectron2")
    assert "matching_heuristics" not in file and all(name.startswith("backbone.") for name in file["model"])
    pyramid = {f"backbone.bottom_up.{name}": t for name, t in backbone.items()} | {
        "backbone.fpn_lateral2.weight": torch.ones(1)
    }
    assert_equal(convert({"model": pyramid, "iteration": 3}, "imagenet")[0], backbone)


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.bottom_up."])
def test_detectron2_finds_the_place_of_a_classification_file(tmp_path, prefix):
    pytest.importorskip("detectron2", reason="detectron2 is not installed: make setup-classic")
    from detectron2.checkpoint import DetectionCheckpointer

    torch.save(imagenet(), tmp_path / "imagenet.pth")
    run_tool(tmp_path / "imagenet.pth", tmp_path / "backbone.pkl", "--to", "detectron2")
    model = nn.Module()
    model.backbone = holder = nn.Module() if "bottom_up" in prefix else DiNAT(**BACKBONE)
    if "bottom_up" in prefix:
        holder.bottom_up = DiNAT(**BACKBONE)
    DetectionCheckpointer(model).load(str(tmp_path / "backbone.pkl"))
    found = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    expected = imagenet()
    for name, tensor in found.items():
        if not name.startswith("norm"):
            assert torch.equal(tensor, expected[name]), name
        else:
            assert torch.equal(tensor, torch.full_like(tensor, name.endswith("weight"))), name


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_converted_is_said(weights):
    heads = {name: tensor for name, tensor in weights["state_dict"].items() if not name.startswith("backbone.")}
    theirs, _ = convert(heads, "huggingface")
    key = next(name for name in theirs if name.endswith("self_attn.k_proj.weight"))
    for broken, to, words in (
        (
            heads | {"panoptic_head.pixel_decoder.lateral_convs.1.conv.weight": torch.ones(1)},
            "detectron2",
            "lateral_convs.1",
        ),
        (heads, "mmdet2", "cannot convert a Mask2Former to mmdet2: expected imagenet, mmdet3, mmseg1"),
        ({name: tensor for name, tensor in theirs.items() if name != key}, "mmdet3", f"one tensor with {key}"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(broken, to)


def test_suffixes_of_targets(tmp_path, weights):
    torch.save(weights, tmp_path / "mmdet.pth")
    for suffix, to, words in (
        ("safetensors", "detectron2", "reads .pth and .pkl"),
        ("pkl", "mmdet3", "only detectron2"),
    ):
        assert words in run_tool(tmp_path / "mmdet.pth", tmp_path / f"new.{suffix}", "--to", to, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mmdet.pth"]
