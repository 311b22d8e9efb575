"""The timm adapter: registration, feature extraction, weights, and timm's own optimizers and trainers on top."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinat_backbones import create_classifier, list_models, zoo
from helpers import GOLDEN, assert_near, fill_by_name, load_golden

timm = pytest.importorskip("timm", minversion="1.0", reason="timm 1.0 is not installed: pip install timm")
for module in ("dinat_backbones.adapters.timm", "timm.loss", "timm.optim", "timm.scheduler", "timm.utils"):
    importlib.import_module(module)

SMALL = dict(arch=None, embed_dim=16, depths=[1, 2, 1], num_heads=[1, 2, 4], mlp_ratio=2.0, kernel_size=3)
SMALL_ISO = dict(embed_dim=16, depth=4, num_heads=2, patch_size=8, img_size=48, mlp_ratio=2.0)
DILATIONS = [[4], [1, 2], [1]]
MADE = {
    "nat_mini": dict(SMALL, dilations=None),
    "dinat_mini": dict(SMALL, dilations=DILATIONS),
    "dinat_s_tiny": dict(SMALL, dilations=DILATIONS),
    "dinat_isotropic_small": dict(SMALL_ISO, kernel_size=3),
    "vitrpb_small": SMALL_ISO,
}


def images(side=48):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_all_published_models_are_registered():
    ours = set(list_models())
    assert ours <= set(timm.list_models()) and ours <= set(timm.list_models(pretrained=True))


@pytest.mark.parametrize("name", list_models())
def test_pretrained_cfg(name):
    """What timm's data pipeline and loader read, against the table."""
    size = 384 if "384" in name else 224
    config = timm.get_pretrained_cfg(name)
    assert config.url == zoo.PRETRAINED[name]
    assert config.input_size == (3, size, size)
    assert config.crop_pct == {224: 0.875, 384: 1.0}[size] and config.interpolation == "bicubic"
    assert config.mean == pytest.approx((0.485, 0.456, 0.406)) and config.std == pytest.approx((0.229, 0.224, 0.225))
    assert config.num_classes == (21841 if "21k" in name else 1000)
    with torch.device("meta"):
        model = timm.create_model(name)
    state = model.state_dict()
    assert {f"{config.classifier}.weight", f"{config.first_conv}.weight"} <= state.keys()
    assert state[f"{config.first_conv}.weight"].shape[1] == 3
    assert model.num_classes == config.num_classes
    with torch.device("meta"):
        features = model.forward_features(torch.empty(1, *config.input_size))
        assert model.forward_head(features).shape == (1, config.num_classes)
    assert tuple(features.shape[2:]) == config.pool_size


@pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("cls_*mini.npz"))])
def test_golden(name):
    meta, arrays = load_golden(name)
    model = fill_by_name(timm.create_model(meta["model"])).eval()
    x = torch.randn(meta["shape"], generator=torch.Generator().manual_seed(meta["seed"]))
    with torch.no_grad():
        assert_near([model(x)], [torch.tensor(arrays["logits"])], 1e-4)


def test_features_only_of_a_published_model():
    with torch.device("meta"):
        model = timm.create_model("dinat_mini", features_only=True)
        maps = model(torch.empty(1, 3, 224, 224))
    assert model.feature_info.channels() == [64, 128, 256, 512]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(m.shape) for m in maps] == [(1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("indices", [None, (0, 1), (-1,)])
def test_features_only(name, indices):
    """The extractor's maps are those of the whole model, what it does not need is gone."""
    kwargs = {} if indices is None else {"out_indices": indices}
    whole = fill_by_name(timm.create_model(name, **MADE[name])).eval()
    model = timm.create_model(name, features_only=True, **MADE[name], **kwargs).eval()
    model.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.model.state_dict()})
    with torch.no_grad():
        maps = model(images())
        expected = whole.forward_intermediates(images(), indices=list(model.out_indices), intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))
    for features, channels, stride in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert features.shape == (2, channels, 48 // stride, 48 // stride)
    if indices == (0, 1):
        assert len(getattr(model.model, model.model.stages_name)) == 2
    assert not any(key.startswith(("model.head", "model.norm.")) for key in model.state_dict())


@pytest.mark.parametrize("name", MADE)
def test_headless_and_unpooled(name):
    model = timm.create_model(name, num_classes=0, **MADE[name]).eval()
    with torch.no_grad():
        assert model(images()).shape == (2, model.num_features) and model.head_hidden_size == model.num_features
        model.reset_classifier(0, "")
        assert model(images()).shape == model.forward_features(images()).shape


def test_weights_from_a_file(tmp_path, monkeypatch):
    """Published layout; another head and other image channels are adapted by timm, another kernel size by us."""
    model = fill_by_name(timm.create_model("dinat_mini", **MADE["dinat_mini"]))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "m.pth")
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "m.pth")))
    again = timm.create_model("dinat_mini", **MADE["dinat_mini"], **overlay)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    kwargs = {**MADE["dinat_mini"], "kernel_size": 5}
    other = timm.create_model("dinat_mini", num_classes=4, in_chans=1, **kwargs, **overlay).state_dict()
    assert other["head.weight"].shape == (4, 64) and other["patch_embed.proj.0.weight"].shape[1] == 1
    assert other["levels.0.blocks.0.attn.rpb"].shape == (1, 9, 9)
    assert torch.equal(
        other["levels.1.blocks.1.mlp.fc1.weight"], model.state_dict()["levels.1.blocks.1.mlp.fc1.weight"]
    )


def test_published_weights_come_through_our_download(monkeypatch, tmp_path):
    """A file put where the message says is found."""

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("dinat_backbones.checkpoint.download.urlopen", no_network)
    with pytest.raises(FileNotFoundError, match=r"dinat_mini_in1k_224.pth \(no network\).*put it at") as said:
        timm.create_model("dinat_mini", pretrained=True)
    file = Path(str(said.value).partition("put it at ")[2])
    file.parent.mkdir(parents=True, exist_ok=True)
    state = fill_by_name(create_classifier("dinat_mini")).state_dict()
    torch.save(state, file)
    model = timm.create_model("dinat_mini", pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("source", ["file", "url"])
@pytest.mark.parametrize("features_only", [False, True])
def test_weights_pass_our_reader(tmp_path, monkeypatch, source, features_only):
    """Nothing of the file runs, timm's own reader never sees it, and the weights are not kept twice."""
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("dinat_backbones.checkpoint.reading.fetch", lambda address: tmp_path / Path(address).name)
    location = {"file": tmp_path, "url": "https://host"}[source]
    kwargs = dict(MADE["dinat_mini"], pretrained=True, features_only=features_only)

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the file"),)

    model = fill_by_name(timm.create_model("dinat_mini", **MADE["dinat_mini"]))
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "good.pth")
    torch.save({"state_dict": model.state_dict(), "args": Code()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="needs code to be read"):
        timm.create_model("dinat_mini", pretrained_cfg_overlay={source: f"{location}/bad.pth"}, **kwargs)
    assert not (tmp_path / "made by the file").exists()
    made = timm.create_model("dinat_mini", pretrained_cfg_overlay={source: f"{location}/good.pth"}, **kwargs)
    extracted = made.model if features_only else made
    state = extracted.state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    for holder in (made, extracted):
        assert "state_dict" not in holder.pretrained_cfg
        assert holder.pretrained_cfg[source] == f"{location}/good.pth"


@pytest.mark.parametrize("name", MADE)
def test_optimizers_of_timm(name):
    """Weight decay leaves the bias tables out; layer-wise rates fall from the head to the patches."""
    model = timm.create_model(name, num_classes=3, **MADE[name])
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[names[id(parameter)]], decay[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert scale.keys() == set(names.values())
    for key, value in decay.items():
        assert (value == 0) == (key.endswith((".rpb", "bias")) or "norm" in key), key
    stage = model.stages_name
    if "isotropic" in name or "vitrpb" in name:
        expected = {"patch_embed.norm.bias": 5, **{f"{stage}.{i}.attn.rpb": 4 - i for i in range(4)}}
    else:  # a downsampler belongs to the last block before it
        expected = {"patch_embed.norm.bias": 5, f"{stage}.0.blocks.0.attn.rpb": 4, f"{stage}.1.blocks.0.attn.rpb": 3}
        expected |= {f"{stage}.1.blocks.1.attn.rpb": 2, f"{stage}.2.blocks.0.attn.rpb": 1}
        expected |= {f"{stage}.0.downsample.norm.bias": 4, f"{stage}.1.downsample.norm.bias": 2}
    expected |= {"norm.bias": 1, "head.weight": 0}
    assert {key: scale[key] for key in expected} == {key: 0.5**depth for key, depth in expected.items()}


@pytest.mark.parametrize("name", MADE)
def test_gradient_checkpointing(name):
    grads = []
    for enable in (False, True):
        model = fill_by_name(timm.create_model(name, num_classes=3, drop_path_rate=0.0, **MADE[name])).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert_near(*grads)


def test_size_of_vitrpb():
    with torch.device("meta"):
        assert timm.create_model("vitrpb_small").layers[0].attn.size == 14
        assert timm.create_model("vitrpb_small", img_size=(256, 256)).layers[0].attn.size == 16
        with pytest.raises(ValueError, match="vitrpb_small takes squares"):
            timm.create_model("vitrpb_small", img_size=(256, 224))


def test_dilations_are_checked_as_everywhere():
    with torch.device("meta"):
        assert timm.create_model("dinat_tiny", dilations="coco").dilations[0] == (1, 28, 1)
        assert timm.create_model("dinat_tiny", dilations=None).dilations[0] == (1, 8, 1)  # timm leaves None out
        with pytest.raises(ValueError, match="arch='nat_tiny' with dilations='coco': NAT has dilation 1 everywhere"):
            timm.create_model("nat_tiny", dilations="coco")
        with pytest.raises(ValueError, match="kernel_size=7 contradicts dilations='imagenet-384-k11'"):
            timm.create_model("dinat_large_384_11x11", kernel_size=7)


def test_device_dtype_and_channels():
    model = timm.create_model("vitrpb_small", device="meta", dtype=torch.bfloat16, in_chans=5)
    assert model.in_chans == 5
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert all(buffer.is_meta and buffer.dtype == torch.int64 for buffer in model.buffers())


def test_learns_with_what_timm_has():
    """A few steps of timm's optimizer, schedule, loss and averaging, as its training script has them."""
    torch.manual_seed(0)
    model = timm.create_model("dinat_mini", num_classes=2, drop_path_rate=0.0, **MADE["dinat_mini"])
    average = timm.utils.ModelEmaV3(model)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=20)
    loss_of = timm.loss.LabelSmoothingCrossEntropy()
    x, labels, losses = images(32), torch.tensor([0, 1]), []
    for epoch in range(20):
        optimizer.zero_grad()
        loss = loss_of(model(x), labels)
        loss.backward()
        optimizer.step()
        average.update(model)
        scheduler.step(epoch + 1)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_timm():
    code = "import sys; sys.modules['timm'] = None\nimport dinat_backbones.adapters.timm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        'ModuleNotFoundError: dinat_backbones.adapters.timm needs timm: pip install "dinat_backbones[timm]"'
    )
