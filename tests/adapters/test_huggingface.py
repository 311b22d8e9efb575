"""adapters/huggingface: golden outputs, published names, transformers' own contract."""

import copy
import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dinat_backbones
from dinat_backbones import NAT, DiNAT, mlp
from dinat_backbones.checkpoint import convert, load_backbone, read
from dinat_backbones.checkpoint.huggingface import split_prefix, to_huggingface
from helpers import assert_near, fill_by_name, load_golden, run_tool

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="transformers 5 is not installed: pip install 'dinat_backbones[huggingface]'"
)
import dinat_backbones.adapters.huggingface as hf  # noqa: E402

ARCH = dict(embed_dim=16, depths=[1, 2, 1], num_heads=[2, 4, 8], kernel_size=3, mlp_ratio=2.0)
DILATIONS = [[3], [1, 2], [1]]  # on the maps of a 64x64 image the widest that fit
MODELS = ("Model", "ForImageClassification", "Backbone")
CLASSES = [family + model for family in ("Nat", "Dinat") for model in MODELS]


def config_of(name: str, **kwargs):
    kwargs = ARCH | dict(num_labels=5, out_features=["stage1", "stage2"]) | kwargs
    return hf.NatConfig(**kwargs) if name.startswith("Nat") else hf.DinatConfig(**{"dilations": DILATIONS} | kwargs)


def model_of(name: str, **kwargs):
    torch.manual_seed(0)
    return getattr(hf, name)(config_of(name, **kwargs)).eval()


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main_output(output) -> torch.Tensor:
    return output.feature_maps[-1] if "feature_maps" in output else output[0]


def equal(state, expected) -> bool:
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


def original_classifier(arch: str, **kwargs) -> nn.Module:
    """A backbone with the published names of an ImageNet file, filled as for the golden runs."""
    backbone = (NAT if arch.startswith("nat") else DiNAT)(arch=arch, out_indices=(), **kwargs)
    backbone.norm, backbone.head = nn.LayerNorm(8 * backbone.patch_embed.norm.weight.numel()), nn.Linear(512, 1000)
    return fill_by_name(backbone)


# ------------------------------------------------------------------------------------------- the published checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What the hub has: configuration, preprocessing and weights, converted from the original layout by the tool."""
    found = {}
    for arch, dilations in (("dinat_mini", "imagenet-224"), ("nat_mini", None)):
        folder = found[arch] = tmp_path_factory.mktemp(arch)
        original = {"model": original_classifier(arch, dilations=dilations).state_dict()}
        if arch == "nat_mini":  # as the hub has it
            torch.save(convert(original, "huggingface-nat")[0], folder / "pytorch_model.bin")
        else:
            torch.save(original, folder / "original.pth")
            run_tool(folder / "original.pth", folder / "model.safetensors", "--to", "huggingface")
        hf.published_config(arch).save_pretrained(folder)
        processing = dict(feature_extractor_type="ViTFeatureExtractor", size=224, resample=3)
        processing |= dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
        (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return found


@pytest.mark.parametrize("arch, family", [("dinat_mini", "Dinat"), ("nat_mini", "Nat")])
def test_documented_snippets(folders, arch, family, monkeypatch):
    """The calls of transformers' documentation, with the classes imported from here and a folder for the address."""
    from PIL import Image
    from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification

    configuration = getattr(hf, f"{family}Config")()
    assert getattr(hf, f"{family}Model")(configuration).config is configuration

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8))
    inputs = AutoImageProcessor.from_pretrained(folders[arch])(image, return_tensors="pt")
    for model_class in (getattr(hf, f"{family}Model"), AutoModel):
        model = model_class.from_pretrained(folders[arch])
        with torch.no_grad():
            outputs = model(**inputs)
        last_hidden_states = outputs.last_hidden_state
        assert list(last_hidden_states.shape) == [1, 7, 7, 512]
    for model_class in (getattr(hf, f"{family}ForImageClassification"), AutoModelForImageClassification):
        model = model_class.from_pretrained(folders[arch])
        with torch.no_grad():
            logits = model(**inputs).logits
        predicted_label = logits.argmax(-1).item()
        names = hf.published_config(arch).id2label  # test_huggingface_auto.py says what they are
        assert model.config.id2label[predicted_label] == names[predicted_label] and logits.shape == (1, 1000)
    # transformers 5.23 asks the hub whether the address exists, and takes no folder here
    monkeypatch.setattr(transformers.models.auto.auto_factory.hf_api(), "repo_exists", lambda *_: True)
    model = AutoBackbone.from_pretrained(folders[arch], out_features=["stage1", "stage2", "stage3", "stage4"])
    feature_maps = model(**inputs).feature_maps
    assert isinstance(model, getattr(hf, f"{family}Backbone")) and list(feature_maps[-1].shape) == [1, 512, 7, 7]


def test_golden_logits_and_the_pipeline(folders):
    meta, arrays = load_golden("cls_dinat_mini")
    model = hf.DinatForImageClassification.from_pretrained(folders["dinat_mini"]).eval()
    with torch.no_grad():
        logits = model(image(*meta["shape"], seed=meta["seed"])).logits
    assert_near([logits], [torch.tensor(arrays["logits"])], 1e-4)
    original = original_classifier("dinat_mini", dilations="imagenet-224").state_dict()
    backbone = DiNAT(arch="dinat_mini", dilations="imagenet-224", out_indices=(3,)).eval()
    backbone.load_state_dict({re.sub("^norm", "norm3", key): original[key] for key in original if "head" not in key})
    with torch.no_grad():
        (feature,) = backbone(image(*meta["shape"], seed=meta["seed"]))
        theirs = F.linear(feature.mean((2, 3)), original["head.weight"], original["head.bias"])
    assert_near([logits], [theirs])
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    assert len(model.state_dict()) == meta["keys"] + 4 * sum(model.config.depths)  # two more for each weight and bias
    pipe = transformers.pipeline("image-classification", model=str(folders["dinat_mini"]))
    from PIL import Image

    assert len(pipe(Image.new("RGB", (50, 40)), top_k=3)) == 3


@pytest.mark.parametrize(
    "golden, backbone", [("net_nat_mini_97x131", hf.NatBackbone), ("net_small_layerscale_64x96", hf.DinatBackbone)]
)
def test_golden_features(golden, backbone):
    meta, arrays = load_golden(golden)
    plain = fill_by_name(getattr(dinat_backbones, meta["cls"])(**meta["kwargs"])).eval()
    names = ("embed_dim", "depths", "num_heads", "kernel_size", "dilations", "mlp_ratio")
    kwargs = {name: meta["kwargs"][name] for name in names if name in meta["kwargs"]}
    scale = meta["kwargs"].get("layer_scale") or 0.0
    model = backbone(backbone.config_class(**kwargs, layer_scale_init_value=scale, out_indices=[1, 2, 3, 4])).eval()
    model.load_state_dict(to_huggingface(plain.state_dict()))
    assert any("layer_scale" in name for name in model.state_dict()) == bool(scale)
    x = image(*meta["shape"], seed=meta["seed"])
    with torch.no_grad():
        for i, (ours, feature) in enumerate(zip(plain(x), model(x).feature_maps, strict=True)):
            assert_near([feature], [ours])
            golden = torch.tensor(arrays[f"out{i}"])
            assert_near([feature.flatten()[:: int(arrays[f"out{i}_step"])]], [golden], 1e-4)


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 18)])
def test_maps_smaller_than_the_window(size):
    backbone = DiNAT(**ARCH, dilations=DILATIONS, out_indices=(1, 2)).eval()
    model = model_of("DinatBackbone", out_indices=[2, 3], out_features=None)
    model.load_state_dict(to_huggingface(backbone.state_dict()))
    with torch.no_grad():
        assert_near(model(image(2, 3, *size)).feature_maps, backbone(image(2, 3, *size)))


def test_published_names():
    """Those of the hub's files, spelled out."""
    linear = ["weight", "bias"]
    layer = {
        "": ["layer_scale_parameters"],
        "layernorm_before.": linear,
        "attention.self.": ["rpb", *(f"{part}.{name}" for part in ("query", "key", "value") for name in linear)],
        "attention.output.dense.": linear,
        "layernorm_after.": linear,
        "intermediate.dense.": linear,
        "output.dense.": linear,
    }
    backbone = {f"embeddings.patch_embeddings.projection.{i}.{name}" for i in (0, 1) for name in linear}
    backbone |= {f"embeddings.norm.{name}" for name in linear}
    for level, depth in enumerate(ARCH["depths"]):
        for j in range(depth):
            prefix = f"encoder.levels.{level}.layers.{j}."
            backbone |= {prefix + module + name for module, names in layer.items() for name in names}
        if level + 1 < len(ARCH["depths"]):
            names = ("reduction.weight", "norm.weight", "norm.bias")
            backbone |= {f"encoder.levels.{level}.downsample.{name}" for name in names}
    model = backbone | {"layernorm.weight", "layernorm.bias"}
    found = {name: set(model_of(name, layer_scale_init_value=0.1).state_dict()) for name in CLASSES}
    assert found["DinatModel"] == found["NatModel"] == model
    for family in ("Nat", "Dinat"):
        names = {f"{family.lower()}.{name}" for name in model} | {"classifier.weight", "classifier.bias"}
        assert found[f"{family}ForImageClassification"] == names
        norms = {f"hidden_states_norms.stage{stage}.{name}" for stage in (1, 2) for name in linear}
        unused = ("encoder.levels.1.downsample.", "encoder.levels.2.")  # beyond stage 2
        assert found[f"{family}Backbone"] == {name for name in backbone if not name.startswith(unused)} | norms


def test_files_load_into_backbones(tmp_path):
    model = model_of("DinatForImageClassification", layer_scale_init_value=0.1)
    model.save_pretrained(tmp_path)
    backbone = DiNAT(**ARCH, dilations=DILATIONS, layer_scale=1.0, out_indices=(2,)).eval()
    report = load_backbone(backbone, tmp_path / "model.safetensors")
    assert report.complete and not report.missing  # the classifier's norm is that of the last stage
    with torch.no_grad():
        (feature,) = backbone(image(1, 3, 40, 64))
        assert_near([feature], [model.dinat(image(1, 3, 40, 64)).last_hidden_state.permute(0, 3, 1, 2)])


def test_stem_and_other_heads_are_set_apart():
    state = model_of("NatBackbone", out_features=["stem", "stage3"]).state_dict()
    whole = {f"model.encoder.{name}": tensor for name, tensor in state.items()} | {"head.weight": torch.ones(1)}
    backbone, others = split_prefix(whole)
    stem = [f"model.encoder.hidden_states_norms.stem.{name}" for name in ("weight", "bias")]
    assert list(others) == [*stem, "head.weight"] and len(backbone) == len(state) - 2
    with pytest.raises(ValueError, match="expected a NAT or DiNAT of transformers"):
        split_prefix({"conv.weight": torch.ones(1)})


# -------------------------------------------------------------------------------------------- transformers' contract


@pytest.mark.parametrize("name", CLASSES)
def test_save_and_load(name, tmp_path):
    model, x = model_of(name, layer_scale_init_value=0.1), image(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    assert set(read(tmp_path / "model.safetensors")) == set(model.state_dict())
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and equal(again.state_dict(), model.state_dict())
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    with torch.no_grad():
        assert torch.equal(main_output(again.eval()(x)), main_output(model(x)))
        assert torch.equal(main_output(copy.deepcopy(model)(x)), main_output(model(x)))


def test_classifier_files_give_backbones_and_other_heads(tmp_path):
    model = model_of("DinatForImageClassification")
    model.save_pretrained(tmp_path)
    _, info = hf.DinatModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    backbone, info = hf.DinatBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("hidden_states_norms.") for name in info["missing_keys"])
    assert torch.equal(backbone.hidden_states_norms["stage1"].weight, torch.ones(16))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        hf.DinatForImageClassification.from_pretrained(tmp_path, num_labels=7)
    other, info = hf.DinatForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert other(image(1, 3, 32, 32)).logits.shape == (1, 7)
    assert equal(other.dinat.state_dict(), model.dinat.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_fresh_weights(name):
    model = model_of(name, initializer_range=1e-10, layer_scale_init_value=0.25)
    for parameter_name, parameter in model.named_parameters():
        expected = (0.25,) if "layer_scale" in parameter_name else (0.0, 1.0)
        assert min(abs(parameter.mean().item() - value) for value in expected) < 1e-6, parameter_name
    table = model_of(name).encoder.levels[1].layers[0].attention.self.rpb if "For" not in name else None
    assert table is None or 0.015 < float(table.std()) < 0.025


@pytest.mark.parametrize("name", CLASSES)
def test_outputs(name):
    model, x = model_of(name), image(2, 3, 64, 60)
    backbone = name.endswith("Backbone")
    assert list(inspect.signature(model.forward).parameters)[0] == "pixel_values"
    with torch.no_grad():
        plain, full = model(x), model(x, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    assert_near([main_output(full)], [main_output(plain)])
    sizes = [(16, 15, 16), (16, 15, 16), (8, 8, 32), (4, 4, 64)]
    if backbone:
        sizes = sizes[:3]  # up to its last output, before downsampling
    expected = sizes if backbone else [*sizes[:1], *sizes[2:], sizes[-1]]
    assert [tuple(state.shape[1:]) for state in full.hidden_states] == expected
    heads_and_maps = zip(ARCH["num_heads"][: len(sizes) - 1], sizes[1:], strict=True)
    assert [tuple(a.shape) for a in full.attentions] == [(2, heads, h, w, 9) for heads, (h, w, _) in heads_and_maps]
    assert all(abs(attention.sum(-1) - 1).max() < 1e-5 for attention in full.attentions)
    if not backbone:
        for state, reshaped in zip(full.hidden_states, full.reshaped_hidden_states, strict=True):
            assert torch.equal(reshaped, state.permute(0, 3, 1, 2))
    with torch.no_grad():
        for flags in ({}, dict(output_hidden_states=True), dict(output_attentions=True)):
            names = [key for key in model(x, **flags) if key != "reshaped_hidden_states"]
            found = model(x, **flags, return_dict=False)
            assert len(found) == len(names)
            for key, value in zip(names, found, strict=True):
                torch.testing.assert_close(value, model(x, **flags)[key])
        model.config.output_hidden_states = True
        assert len(model(x).hidden_states) == len(expected)


def test_tuple_without_a_pooler():
    model = hf.DinatModel(config_of("Dinat"), add_pooling_layer=False).eval()
    last, pooled = model(image(1, 3, 32, 32), return_dict=False)
    assert pooled is None and model(image(1, 3, 32, 32)).pooler_output is None
    pooled = model_of("DinatModel")(image(1, 3, 32, 32))
    torch.testing.assert_close(pooled.pooler_output, pooled.last_hidden_state.mean((1, 2)))


@pytest.mark.parametrize("name", CLASSES)
def test_one_step_of_training_with_and_without_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(name, drop_path_rate=0.0, layer_scale_init_value=0.5).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        encoder = model.encoder if hasattr(model, "encoder") else getattr(model, model.base_model_prefix).encoder
        calls = []
        encoder.levels[0].layers[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = model(image(2, 3, 32, 32).double(), output_attentions=checkpointing)
        maps = output.feature_maps if name.endswith("Backbone") else [main_output(output)]
        sum(part.square().mean() for part in maps).backward()
        assert len(calls) == 1 + checkpointing  # once more for the gradients
        unused = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not unused  # of a backbone the last stage is not asked for, nor built
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = (torch.cat([g.flatten() for g in found.values()]) for found in gradients)
    assert gradients[0].keys() == gradients[1].keys()
    assert_near([recomputed], [plain], tolerance=1e-13)  # some gradients are 0 but for rounding: those of key biases


@pytest.mark.parametrize(
    "num_labels, labels, loss",
    [
        (1, torch.tensor([0.5, -1.0]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
        (5, torch.tensor([4, 0]), F.cross_entropy),
        (5, torch.eye(5)[:2], F.binary_cross_entropy_with_logits),
    ],
)
def test_losses(num_labels, labels, loss):
    model = model_of("NatForImageClassification", num_labels=num_labels)
    output = model(image(2, 3, 32, 32), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    torch.testing.assert_close(model(image(2, 3, 32, 32), labels=labels, return_dict=False)[0], output.loss)


@pytest.mark.parametrize("family", ["Nat", "Dinat"])
def test_backbone_contract(family):
    name, x = f"{family}Backbone", image(2, 3, 64, 64)
    config = config_of(family, out_features=None)
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"] and config.hidden_size == 64
    assert (config.out_features, config.out_indices, config.num_hidden_layers) == (["stage3"], [3], 3)
    config = config_of(family, out_features=None, out_indices=[0, 2])
    assert config.out_features == ["stem", "stage2"]
    with pytest.raises(ValueError, match="out_features and out_indices"):
        config_of(family, out_features=["stage1", "stage2"], out_indices=[0, 2])
    with pytest.raises(ValueError, match="stage9"):
        config_of(family, out_features=["stage9"])
    model = getattr(hf, name)(config).eval()
    assert model.channels == [16, 32] and model.num_features == [16, 16, 32, 64]
    assert model.out_feature_channels == dict(stem=16, stage1=16, stage2=32, stage3=64)
    assert [tuple(m.shape) for m in model(x).feature_maps] == [(2, 16, 16, 16), (2, 32, 8, 8)]
    assert isinstance(model.get_input_embeddings(), nn.Module)
    config.out_features = None
    model = transformers.AutoBackbone.from_config(config).eval()
    assert type(model) is getattr(hf, name) and model.channels == [64]
    states = model(x, output_hidden_states=True)
    torch.testing.assert_close(  # a fresh norm
        states.feature_maps[0], F.layer_norm(states.hidden_states[-1], [64]).permute(0, 3, 1, 2)
    )


@pytest.mark.parametrize("name", CLASSES)
def test_export(name):
    model, x = model_of(name, layer_scale_init_value=0.5), image(2, 3, 64, 64)
    exported = torch.export.export(model, args=(), kwargs={"pixel_values": x}).module()
    with torch.no_grad():
        assert_near([main_output(exported(pixel_values=x))], [main_output(model(x))])


def test_replaced_and_hooked_projections_are_heard():
    model, x = model_of("DinatModel"), image(1, 3, 64, 64)
    attention = model.encoder.levels[0].layers[0].attention.self
    before, calls = model(x).last_hidden_state, []
    handle = attention.value.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    handle.remove()
    attention.query = nn.Sequential(attention.query, nn.Hardtanh(-1e-3, 1e-3))
    assert calls == [1] and not torch.equal(model(x).last_hidden_state, before)


@pytest.mark.parametrize("hooked", [False, True])
def test_large_maps_are_computed_in_pieces_that_nobody_sees(monkeypatch, hooked):
    model, x, shapes = model_of("DinatModel"), image(2, 3, 64, 60), []
    expected = model(x).last_hidden_state.detach()  # gradients are on: in one piece
    monkeypatch.setattr(mlp, "LARGE_BYTES", 0)
    monkeypatch.setattr(mlp, "PIECE_BYTES", 1000)
    layer = model.encoder.levels[0].layers[0]
    watched = [layer.layernorm_after]
    if hooked:
        watched += [layer.intermediate, layer.intermediate.dense, layer.output.dense]
    for module in watched:
        module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        assert_near([model(x).last_hidden_state], [expected])
    assert sorted(shapes) == sorted([(2, 16, 15, 16)] * (3 if hooked else 1) + [(2, 16, 15, 32)] * hooked)


def test_dropout_of_the_attention():
    model = model_of("DinatModel", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5)
    x = image(1, 3, 32, 32)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


# ----------------------------------------------------------------------------------------------------- at the door


def test_wrong_arguments():
    with pytest.raises(ValueError, match="patch_size=8"):
        model_of("NatModel", patch_size=8)
    with pytest.raises(ValueError, match=r"dilations has \[1\] entries per stage; expected one per block"):
        model_of("DinatModel", dilations=[[1]])
    with pytest.raises(
        ValueError, match=r"depths=\[3, 4, 18, 5\] need dilations: .*'coco' \(detection.*kernel size 11"
    ):
        hf.DinatConfig(depths=[3, 4, 18, 5])
    with pytest.raises(ValueError, match="dilations='coco': expected one list per stage"):
        hf.DinatConfig(dilations="coco")
    with pytest.raises(ValueError, match="num_heads"):
        model_of("NatModel", num_heads=[1, 2])
    model = model_of("DinatModel")
    with pytest.raises(ValueError, match=r"\[1, 1, 8, 8\]; expected \[B, 3, H, W\]"):
        model(image(1, 1, 8, 8))
    with pytest.raises(ValueError, match="pixel_values are missing"):
        model()
    with pytest.raises(ValueError, match="dinat_s_tiny.*nat_mini, .*dinat_large_384_11x11"):
        hf.published_config("dinat_s_tiny")
    large = hf.published_config("dinat_large_384_11x11", num_labels=3)
    assert (large.kernel_size, large.num_labels, max(large.dilations[0])) == (11, 3, 8)
    assert hf.published_config("nat_base").layer_scale_init_value == 1e-5


def test_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None
import dinat_backbones, dinat_backbones.checkpoint.huggingface, dinat_backbones.adapters
try:
    import dinat_backbones.adapters.huggingface
except ModuleNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        'dinat_backbones.adapters.huggingface needs transformers 5: pip install "dinat_backbones[huggingface]"\n'
    )
