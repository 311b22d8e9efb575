"""The classifiers against the original code's logits (golden arrays), published names, and full attention by a loop."""

import logging
from pathlib import Path

import pytest
import torch

from dinat_backbones import DiNAT, NeighborhoodAttention2D, create_classifier, list_models, zoo
from dinat_backbones.attention import GlobalAttention2D
from dinat_backbones.checkpoint import load_backbone, load_classifier, resize_rpb
from dinat_backbones.classifier import DiNAT_sClassifier, DiNATClassifier, IsotropicClassifier, NATClassifier
from helpers import GOLDEN, assert_near, fill_by_name, load_golden, published_state

GOLDEN_CLASSIFIERS = sorted(path.stem for path in GOLDEN.glob("cls_*.npz"))
SMALL = dict(embed_dim=16, depths=[1, 2], num_heads=[1, 2], mlp_ratio=2.0, kernel_size=3, drop_path_rate=0.0)
SMALL_ISO = dict(embed_dim=16, depth=3, num_heads=2, patch_size=8, img_size=48, mlp_ratio=2.0)
MADE = {
    "NAT": lambda **kw: NATClassifier(**SMALL, **kw),
    "DiNAT": lambda **kw: DiNATClassifier(**SMALL, dilations=[[2], [1, 2]], **kw),
    "DiNAT_s": lambda **kw: DiNAT_sClassifier(**SMALL, dilations=[[2], [1, 2]], **kw),
    "dinat_isotropic": lambda **kw: IsotropicClassifier("dinat_isotropic_small", **SMALL_ISO, kernel_size=3, **kw),
    "vitrpb": lambda **kw: IsotropicClassifier("vitrpb_small", **SMALL_ISO, **kw),
}


@pytest.fixture(params=MADE)
def model(request):
    return fill_by_name(MADE[request.param](num_classes=7)).eval()


def images(height=48, width=48, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------ the published models


@pytest.mark.parametrize("name", GOLDEN_CLASSIFIERS)
def test_golden(name):
    meta, arrays = load_golden(name)
    model = fill_by_name(create_classifier(meta["model"])).eval()
    assert len(model.state_dict()) == meta["keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == meta["params"]
    x = torch.randn(meta["shape"], generator=torch.Generator().manual_seed(meta["seed"]))
    with torch.no_grad():
        assert_near([model(x)], [torch.tensor(arrays["logits"])], 1e-4)


def isotropic_state(name):
    """Names and shapes of a published isotropic file, typed from the description of the release."""
    model = zoo.ISOTROPIC[name]
    dim, full = model.embed_dim, model.kernel_size is None
    span = 2 * (14 if full else model.kernel_size) - 1
    shapes = {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    norms = ["patch_embed.norm"]
    for i in range(12):
        for layer, (rows, columns) in {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (4 * dim, dim),
            "mlp.fc2": (dim, 4 * dim),
        }.items():
            shapes |= {f"layers.{i}.{layer}.weight": (rows, columns), f"layers.{i}.{layer}.bias": (rows,)}
        shapes[f"layers.{i}.attn.rpb"] = (model.num_heads, span, span)
        if full:
            shapes[f"layers.{i}.attn.relative_position_index"] = (196, 196)
        norms += [f"layers.{i}.norm1", f"layers.{i}.norm2"]
    for norm in norms:
        shapes |= {f"{norm}.weight": (dim,), f"{norm}.bias": (dim,)}
    return shapes


@pytest.mark.parametrize("name", list_models())
def test_published_names_and_shapes(name):
    classes = 21841 if "21k" in name else 1000
    with torch.device("meta"):
        model = create_classifier(name)
    got = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    arch = name.removesuffix("_11x11").removesuffix("_384").removesuffix("_21k")
    if arch in zoo.ISOTROPIC:
        expected, width = isotropic_state(arch), zoo.ISOTROPIC[arch].embed_dim
    else:
        backbone = zoo.ARCHS[arch]
        values = (backbone.embed_dim, backbone.depths, backbone.num_heads, backbone.mlp_ratio, backbone.layer_scale)
        width = backbone.embed_dim * 8
        expected = {k: v for k, v in published_state(backbone.family, *values).items() if not k.startswith("norm")}
        if "11x11" in name:
            expected = {k: (*v[:1], 21, 21) if k.endswith("rpb") else v for k, v in expected.items()}
    expected |= {"norm.weight": (width,), "norm.bias": (width,)}
    expected |= {"head.weight": (classes, width), "head.bias": (classes,)}
    assert got == expected


def test_list_models():
    assert list_models() == [*zoo.CLASSIFICATION, "dinat_large_21k", "dinat_large_21k_11x11", "dinat_s_large_21k"]
    assert len(list_models()) == 25
    assert list_models("vit*") == ["vitrpb_small", "vitrpb_base"]


@pytest.mark.parametrize(
    "name, dilations",
    [
        ("nat_mini", [[1] * 3, [1] * 4, [1] * 6, [1] * 5]),
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_384_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_large_21k_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
        ("nat_isotropic_small", [[1] * 12]),
        ("dinat_isotropic_base", [[1, 2] * 6]),
    ],
)
def test_dilations_and_kernel(name, dilations):
    with torch.device("meta"):
        model = create_classifier(name)
    layers = [module for module in model.modules() if isinstance(module, NeighborhoodAttention2D)]
    assert [layer.dilation for layer in layers] == [number for stage in dilations for number in stage]
    assert {layer.kernel_size for layer in layers} == {11 if "11x11" in name else 7}


def test_stochastic_depth_of_isotropic_models():
    with torch.device("meta"):
        blocks = create_classifier("vitrpb_base").layers
    assert [block.drop_path.p for block in blocks] == pytest.approx([0.4 * i / 11 for i in range(12)])


def test_overrides():
    with torch.device("meta"):
        model = create_classifier("dinat_mini", 5, dilations="coco", in_chans=1, drop_path_rate=0.5)
        assert model.dilations[0] == (1, 28, 1) and model.head.out_features == 5
        assert model.patch_embed.proj[0].in_channels == 1
        assert create_classifier("dinat_large_21k", 1000).head.out_features == 1000
        assert create_classifier("vitrpb_small", img_size=240).layers[0].attn.size == 15


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create_classifier("dinat_minni"), "unknown classifier 'dinat_minni'. Did you mean 'dinat_mini'?"),
        (lambda: create_classifier("dinat_mini", -1), "num_classes=-1: expected at least 0"),
        (lambda: create_classifier("dinat_mini", global_pool="max"), "global_pool='max': expected 'avg'"),
        (lambda: create_classifier("dinat_mini", dilations=None), "DiNAT(arch='dinat_mini') needs dilations="),
        (lambda: DiNAT_sClassifier("dinat_s_tiny"), "DiNAT_s(arch='dinat_s_tiny') needs dilations="),
        (
            lambda: create_classifier("dinat_mini", kernel_size=11),
            "kernel_size=11 contradicts dilations='imagenet-224'",
        ),
        (lambda: create_classifier("nat_mini", dilations="coco"), "NAT has dilation 1 everywhere"),
        (lambda: IsotropicClassifier("dinat_mini"), "unknown isotropic model 'dinat_mini'"),
        (lambda: DiNATClassifier("nat_mini"), "belongs to NAT"),
        (lambda: GlobalAttention2D(8, 2, 0), "size=0: expected at least 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize("made", MADE.values())
def test_unknown_arguments_are_not_ignored(made):
    with pytest.raises(TypeError, match="(unexpected keyword argument 'drop_rat'|no argument drop_rat )"):
        made(drop_rat=0.1)


# --------------------------------------------------------------------------------------------------- global attention


def test_window_over_the_whole_map_is_global_attention():
    """Odd sizes, where the op can do it, too; forward and gradients, in float64: no machine's rounding matters."""
    full, window = GlobalAttention2D(8, 2, 7), NeighborhoodAttention2D(8, 2, 7, backend="reference")
    fill_by_name(full)
    state = full.state_dict()
    del state["relative_position_index"]
    window.load_state_dict(state)
    full.double(), window.double()
    results = []
    for module in (full, window):
        x = torch.randn(2, 7, 7, 8, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        results.append((out, x.grad, module.rpb.grad, module.qkv.weight.grad))
    assert_near(*results, tolerance=1e-13)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_global_attention_by_a_loop(size):
    """Key and query by their coordinates, one pair after the other, in float64; even sizes, as published (14)."""
    heads, head_dim = 2, 3
    layer = fill_by_name(GlobalAttention2D(heads * head_dim, heads, size)).double()
    x = torch.randn(1, size, size, heads * head_dim, dtype=torch.float64)
    query, key, value = layer.qkv(x)[0].unflatten(-1, (3, heads, head_dim)).unbind(2)
    pixels = [(row, column) for row in range(size) for column in range(size)]
    expected = torch.zeros(size, size, heads, head_dim, dtype=torch.float64)
    for head in range(heads):
        for i, j in pixels:
            logits = [
                query[i, j, head] @ key[k, l, head] / head_dim**0.5
                + layer.rpb[head, k - i + size - 1, l - j + size - 1]
                for k, l in pixels
            ]
            weights = torch.stack(logits).softmax(0)
            expected[i, j, head] = sum(w * value[k, l, head] for w, (k, l) in zip(weights, pixels, strict=True))
    with torch.no_grad():
        assert_near([layer(x)], [layer.proj(expected.flatten(2))[None]], 1e-13)


def test_isotropic_model_whose_window_covers_the_map():
    """The op with K = L inside NAT-iso against ViT-rpb, on a grid of 5 x 5."""
    settings = dict(SMALL_ISO, img_size=40)
    full = fill_by_name(IsotropicClassifier("vitrpb_small", **settings, num_classes=7)).eval()
    window = IsotropicClassifier("nat_isotropic_small", **settings, kernel_size=5, num_classes=7).eval()
    window.load_state_dict({k: v for k, v in full.state_dict().items() if not k.endswith("relative_position_index")})
    with torch.no_grad():
        assert_near([full(images(40, 40))], [window(images(40, 40))])


def test_no_bias():
    layer = GlobalAttention2D(8, 2, 4, rel_pos_bias=False)
    assert {key.split(".")[0] for key in layer.state_dict()} == {"qkv", "proj"}
    query, key, value = layer.qkv(x := torch.randn(1, 4, 4, 8)).unflatten(-1, (3, 2, 4)).unbind(3)
    flat = [t.reshape(1, 16, 2, 4).transpose(1, 2) for t in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(1, 4, 4, 8)
    assert_near([layer(x)], [layer.proj(expected)])


def test_global_attention_knows_one_size():
    model = MADE["vitrpb"]()
    with pytest.raises(ValueError, match="got a map of 7x6; expected 6x6.*img_size"):
        model(images(56, 48))
    assert model(images(41, 45)).shape == (2, 1000)  # padded to full patches


# ------------------------------------------------------------------------------------------------------------ features


def test_features_and_head(model):
    with torch.no_grad():
        x, logits = images(), model(images())
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert logits.shape == (2, 7) and pooled.shape == (2, model.num_features)
        stride = model.stage_strides[-1]
        assert features.shape == (2, model.num_features, 48 // stride, 48 // stride)
        assert_near([pooled], [features.flatten(2).mean(2)])
        assert_near([logits], [pooled @ model.head.weight.T + model.head.bias])
        model.reset_classifier(0)
        assert model.num_classes == 0 and torch.equal(model(x), pooled)
        model.reset_classifier(3, global_pool="")
        mapped = model(x)
        assert mapped.shape == (2, 3, 48 // stride, 48 // stride)
        assert_near([mapped.mean((2, 3))], [pooled @ model.head.weight.T + model.head.bias])


def test_intermediates_are_the_outputs_of_the_stages(model):
    kept = []
    for stage in getattr(model, model.stages_name):
        stage.register_forward_hook(lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        last, maps = model.forward_intermediates(images())
        assert len(maps) == len(kept) == len(model.stage_channels)
        for features, seen, channels, stride in zip(maps, kept, model.stage_channels, model.stage_strides, strict=True):
            assert features.shape == (2, channels, 48 // stride, 48 // stride)
            assert torch.equal(features, seen.permute(0, 3, 1, 2))
        assert torch.equal(last, model.forward_features(images()))
        kept.clear()
        first, final = model.forward_intermediates(images(), indices=[0, -1], norm=True, intermediates_only=True)
        assert torch.equal(final, last)
        assert torch.equal(first, maps[0]) == (model.stage_channels[0] != model.num_features)
        kept.clear()
        (early,) = model.forward_intermediates(
            images(), indices=[0], stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        assert len(kept) == 1 and torch.equal(early.permute(0, 3, 1, 2), maps[0])
        last_one = model.forward_intermediates(images(), indices=1, intermediates_only=True)
        assert len(last_one) == 1 and torch.equal(last_one[0], maps[-1])
    for wrong in ([9], 9, []):
        with pytest.raises(ValueError, match="expected some of the"):
            model.forward_intermediates(images(), indices=wrong)
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(images(), output_fmt="NLC")


def test_training_step(model):
    model.train()
    model(images()).logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_activation_checkpointing_changes_nothing():
    grads = []
    for with_cp in (False, True):
        made = fill_by_name(MADE["dinat_isotropic"](num_classes=3, with_cp=with_cp)).train()
        made.zero_grad()
        for block in made.layers:
            block.drop_path.p = 0.0
        made(images()).square().sum().backward()
        grads.append([parameter.grad for parameter in made.parameters()])
    assert_near(*grads)


def test_compile_fullgraph(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near([compiled(images())], [model(images())])


def test_export(model):
    program = torch.export.export(model, (images(),))
    with torch.no_grad():
        assert_near([program.module()(images())], [model(images())])


def test_bfloat16_autocast(model):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(images())
    with torch.no_grad():
        exact = model(images())
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_images_of_other_sizes():
    with torch.no_grad():
        for name in ("NAT", "DiNAT", "DiNAT_s", "dinat_isotropic"):
            for size in ((1, 1), (33, 70)):
                assert MADE[name](num_classes=4).eval()(images(*size)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path):
    """A small DiNAT of 7 classes and its file."""
    model = fill_by_name(MADE["DiNAT"](num_classes=7)).eval()
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}])
def test_file_loads_strictly(saved, tmp_path, wrap):
    model, _ = saved
    path = tmp_path / "wrapped.pth"
    torch.save(wrap(model.state_dict()), path)
    fresh = MADE["DiNAT"](num_classes=7).eval()
    report = load_classifier(fresh, path)
    assert report.complete and torch.equal(fresh(images()), model(images()))


def test_head_of_other_classes_starts_anew_and_is_said(saved, caplog):
    model, path = saved
    fresh = MADE["DiNAT"](num_classes=3).eval()
    head = fresh.head.weight.clone()
    load_classifier(fresh, path)
    assert "the file's head is for 7 classes, the model's for 3 keeps its random weights" in caplog.text
    assert torch.equal(fresh.head.weight, head)
    with torch.no_grad():
        assert torch.equal(fresh.forward_features(images()), model.forward_features(images()))
        caplog.clear()
        headless = MADE["DiNAT"](num_classes=0).eval()
        load_classifier(headless, path)
        assert "7 classes, the model has none" in caplog.text
        assert torch.equal(headless(images()), model.forward_head(model.forward_features(images()), pre_logits=True))


def test_same_classes_are_no_warning(saved, caplog):
    with caplog.at_level(logging.INFO):
        load_classifier(MADE["DiNAT"](num_classes=7), saved[1])
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_other_kernel_size_is_resized(saved):
    model, path = saved
    wide = DiNATClassifier(**{**SMALL, "kernel_size": 5}, dilations=[[2], [1, 2]], num_classes=7)
    report = load_classifier(wide, path)
    name = "levels.1.blocks.1.attn.rpb"
    assert len(report.resized) == 3
    assert torch.equal(wide.state_dict()[name], resize_rpb(model.state_dict()[name], 5))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("norm.weight"), "1 tensors are not in the file: norm.weight"),
        (lambda s: s.pop("head.weight"), "1 tensors are not in the file: head.weight"),
        (lambda s: s.update({"levels.7.x": torch.ones(1)}), "1 tensors are not in the model: levels.7.x"),
        (lambda s: s.update({"norm.bias": torch.ones(5)}), r"norm.bias is \[5\] in the file and \[32\] in the model"),
    ],
)
def test_file_that_does_not_fit(saved, tmp_path, change, message):
    state = saved[0].state_dict()
    change(state)
    torch.save(state, tmp_path / "wrong.pth")
    fresh = MADE["DiNAT"](num_classes=7)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=f"does not fit this DiNATClassifier: {message}"):
        load_classifier(fresh, tmp_path / "wrong.pth")
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_create_classifier_with_a_file(tmp_path):
    model = fill_by_name(create_classifier("dinat_mini", num_classes=2))
    torch.save(model.state_dict(), tmp_path / "m.pth")
    again = create_classifier("dinat_mini", num_classes=2, pretrained=tmp_path / "m.pth")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match="levels.2.blocks.6.*The file looks like nat_mini or dinat_mini"):
        create_classifier("dinat_tiny", pretrained=str(tmp_path / "m.pth"))
    with pytest.raises(FileNotFoundError, match="checkpoint .*none.pth is not there"):
        create_classifier("dinat_mini", pretrained=tmp_path / "none.pth")


def test_backbone_of_the_last_stage_alone_takes_the_norm_of_the_classifier(saved, caplog):
    """It then returns what the head of the classifier sees; a pyramid keeps its own norms."""
    model, path = saved
    backbone = DiNAT(**SMALL, dilations=[[2], [1, 2]], out_indices=[1]).eval()
    assert "norm1.weight" in load_backbone(backbone, path).loaded
    with torch.no_grad():
        assert torch.equal(backbone(images())[0], model.forward_features(images()))
    pyramid = DiNAT(**SMALL, dilations=[[2], [1, 2]])
    assert "norm1.weight" in load_backbone(pyramid, path).missing
    first = DiNAT(**SMALL, dilations=[[2], [1, 2]], out_indices=[0])
    assert load_backbone(first, path).missing == ("norm0.weight", "norm0.bias")


def test_published_weights_without_network(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("dinat_backbones.checkpoint.download.urlopen", no_network)
    with pytest.raises(
        FileNotFoundError, match=r"imagenet1k/dinat_mini_in1k_224.pth \(no network\).*put it at"
    ) as said:
        create_classifier("dinat_mini", pretrained=True)
    path = Path(str(said.value).partition("put it at ")[2])
    assert tmp_path in path.parents
    model = fill_by_name(create_classifier("dinat_mini"))  # put there by hand, it is found
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    loaded = create_classifier("dinat_mini", pretrained=True)
    assert torch.equal(loaded.head.weight, model.head.weight)
