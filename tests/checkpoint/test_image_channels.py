"""RGB weights for images of other channels, through every way to load them, against timm's rule."""

import logging

import pytest
import torch

from dinat_backbones import DiNAT, DiNAT_s, create_classifier
from dinat_backbones.checkpoint import load_backbone
from dinat_backbones.checkpoint.fitting import adapt_image_channels
from helpers import fill_by_name

SMALL = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0)
FIRST = {DiNAT: "patch_embed.proj.0.weight", DiNAT_s: "patch_embed.proj.weight"}
CHANNELS = [1, 2, 4, 8]


def expected(weight, channels):
    """timm's rule, channel by channel: the sum for one, else the three in turn, times 3 / channels."""
    if channels == 1:
        return weight[:, :1] + weight[:, 1:2] + weight[:, 2:]
    return torch.stack([weight[:, i % 3] * 3 / channels for i in range(channels)], 1)


@pytest.fixture(scope="module")
def rgb(tmp_path_factory):
    """By family: a file of RGB weights, and they."""
    folder, found = tmp_path_factory.mktemp("rgb"), {}
    for family in FIRST:
        state = fill_by_name(family(**SMALL)).state_dict()
        torch.save({"model": state}, folder / f"{family.__name__}.pth")
        found[family] = folder / f"{family.__name__}.pth", state
    return found


def check(model, state, family, channels, prefix=""):
    own = {key.removeprefix(prefix): value for key, value in model.state_dict().items() if key.startswith(prefix)}
    first = FIRST[family]
    assert torch.allclose(own[first], expected(state[first], channels), rtol=1e-6, atol=1e-7)
    others = [key for key in state if key != first and key in own]
    assert len(others) > 50 and all(torch.equal(own[key], state[key]) for key in others)


@pytest.mark.parametrize("channels", CHANNELS)
def test_rule_is_that_of_timm(channels):
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float16)
    got = adapt_image_channels(weight, channels)
    assert got.dtype == weight.dtype and got.shape == (6, channels, 3, 3)
    assert torch.allclose(got.float(), expected(weight.float(), channels), atol=2e-3)
    try:
        from timm.models import adapt_input_conv
    except ImportError:
        pytest.skip("timm is not installed")
    assert torch.equal(got, adapt_input_conv(channels, weight.clone()))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("family", FIRST)
def test_load_backbone(rgb, family, channels, caplog):
    path, state = rgb[family]
    model = family(**SMALL, in_chans=channels)
    with caplog.at_level(logging.INFO):
        report = load_backbone(model, path)
    check(model, state, family, channels)
    assert report.complete and report.adapted == (FIRST[family],)
    assert f"{FIRST[family]} adapted from RGB to the model's image channels" in caplog.text
    assert model(torch.randn(1, channels, 32, 32))[0].isfinite().all()


def test_a_gray_image_gives_what_it_gave_as_rgb(rgb):
    path, _ = rgb[DiNAT]
    gray, colour = DiNAT(**SMALL, in_chans=1).eval(), DiNAT(**SMALL).eval()
    load_backbone(gray, path), load_backbone(colour, path)
    image = torch.randn(1, 1, 40, 40)
    for a, b in zip(gray(image), colour(image.expand(-1, 3, -1, -1)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_other_files_are_not_adapted(rgb, tmp_path):
    """From RGB alone: what four channels mean, nobody knows."""
    torch.save(DiNAT(**SMALL, in_chans=4).state_dict(), tmp_path / "four.pth")
    with pytest.raises(
        ValueError, match=r"patch_embed.proj.0.weight is \[16, 4, 3, 3\] in the file and \[16, 3, 3, 3\]"
    ):
        load_backbone(DiNAT(**SMALL), tmp_path / "four.pth")
    report = load_backbone(DiNAT(**SMALL, in_chans=4), tmp_path / "four.pth")
    assert report.complete and not report.adapted


def test_classifier(tmp_path):
    classifier = create_classifier("dinat_mini")
    torch.save(classifier.state_dict(), tmp_path / "file.pth")
    model = create_classifier("dinat_mini", pretrained=tmp_path / "file.pth", in_chans=4)
    check(model, classifier.state_dict(), DiNAT, 4)


@pytest.mark.parametrize("channels", [1, 4])
def test_timm(tmp_path, channels):
    timm = pytest.importorskip("timm", minversion="1.0", reason="timm 1.0 is not installed")
    import dinat_backbones.adapters.timm  # noqa: F401

    classifier = create_classifier("dinat_mini")
    torch.save(classifier.state_dict(), tmp_path / "file.pth")
    overlay = dict(file=str(tmp_path / "file.pth"))
    model = timm.create_model("dinat_mini", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels)
    check(model, classifier.state_dict(), DiNAT, channels)


@pytest.mark.parametrize("channels", [1, 4])
def test_init_cfg(rgb, channels):
    registry = pytest.importorskip("mmengine.registry", reason="mmengine is not installed")
    import dinat_backbones.adapters.openmmlab  # noqa: F401

    path, state = rgb[DiNAT]
    init_cfg = dict(type="Pretrained", checkpoint=str(path))
    model = registry.MODELS.build(dict(type="DiNAT", **SMALL, in_chans=channels, init_cfg=init_cfg))
    model.init_weights()
    check(model, state, DiNAT, channels)


def test_detectron2(rgb):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg

    from dinat_backbones.adapters.detectron2 import Checkpointer, add_dinat_config, build_dinat_fpn_backbone

    path, state = rgb[DiNAT]
    cfg = get_cfg()
    add_dinat_config(cfg)
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in SMALL.items():
        cfg.MODEL.DINAT[key.upper()] = value
    from detectron2.layers import ShapeSpec

    model = build_dinat_fpn_backbone(cfg, ShapeSpec(channels=4))  # what PIXEL_MEAN of four numbers leads to
    Checkpointer(model).load(str(path))
    check(model, state, DiNAT, 4, prefix="bottom_up.")


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("name", ["DinatForImageClassification", "DinatBackbone"])
def test_transformers(tmp_path, name, how):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from dinat_backbones.adapters import huggingface

    shape = dict(embed_dim=32, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[1], [2]])
    rgb = huggingface.DinatForImageClassification(huggingface.DinatConfig(**shape, num_labels=5))
    rgb.save_pretrained(tmp_path / "rgb")
    family = getattr(huggingface, name)
    given = dict(num_channels=4)
    if how == "config":
        given = dict(config=huggingface.DinatConfig.from_pretrained(tmp_path / "rgb", num_channels=4))
    model = family.from_pretrained(tmp_path / "rgb", **given)
    first = "embeddings.patch_embeddings.projection.0.weight"
    own, state = model.state_dict(), rgb.state_dict()
    ours = next(key for key in own if key.endswith(first))
    assert torch.allclose(own[ours], expected(state[f"dinat.{first}"], 4), rtol=1e-6)
    assert model.config.num_channels == 4
    assert model(torch.randn(1, 4, 32, 32)) is not None
    model.save_pretrained(tmp_path / "four")  # and is loaded again as it is
    again = family.from_pretrained(tmp_path / "four", num_channels=4)
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
    assert family.from_pretrained(tmp_path / "four").config.num_channels == 4
