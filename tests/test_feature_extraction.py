"""torchvision's feature extraction (torch.fx) and detectors on top of the backbones, against forward hooks."""

import copy

import pytest
import torch

from dinat_backbones import NAT, DiNAT, DiNAT_s, create_classifier
from helpers import assert_near, fill_by_name

FAMILIES = dict(NAT=NAT, DiNAT=DiNAT, DiNAT_s=DiNAT_s)
SMALL = dict(embed_dim=16, depths=[1, 2, 1], num_heads=[1, 2, 4], mlp_ratio=2.0, kernel_size=3, drop_path_rate=0.5)


def hooked(model, names, image):
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: found.__setitem__(name, out))
        for name in names
    ]
    outs = model(image)
    for handle in handles:
        handle.remove()
    return outs, found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_cp", [False, True])
def test_create_feature_extractor(family, with_cp):
    """Any module by its name, at sizes the graph was not made with, padded ones included; gradients flow."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision is not installed")
    dilations = None if family == "NAT" else [[4], [1, 2], [1]]
    model = fill_by_name(FAMILIES[family](**SMALL, dilations=dilations, layer_scale=0.5, with_cp=with_cp)).eval()
    names = [f"{model.stages_name}.1.blocks.0.attn", f"{model.stages_name}.2.blocks.0.mlp.fc1", "patch_embed", "norm1"]
    extractor = extraction.create_feature_extractor(model, names)
    for shape in ((1, 3, 33, 50), (2, 3, 70, 64)):
        image = torch.randn(shape)
        expected, got = hooked(model, names, image)[1], extractor(image)
        assert set(got) == set(names)
        for name in names:
            assert torch.allclose(got[name], expected[name], atol=1e-6), name
    got["norm1"].sum().backward()
    assert dict(extractor.named_parameters())["patch_embed.norm.weight"].grad.abs().sum() > 0


def test_symbolic_trace_computes_the_same_and_trains():
    model = fill_by_name(DiNAT(**SMALL, dilations=[[4], [1, 2], [1]])).train()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    image, outs, grads = torch.randn(2, 3, 40, 50), [], []
    for module in (model, traced):
        torch.manual_seed(0)  # drop path
        outs.append(module(image))
        sum(out.square().sum() for out in outs[-1]).backward()
        grads.append({name: parameter.grad for name, parameter in module.named_parameters()})
    assert_near(*outs)  # the model does not compute what drop path drops, the graph does
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-4) for name in grads[0])


def test_classifiers_are_traced():
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision is not installed")
    model = create_classifier("dinat_mini", 3).eval()
    extractor = extraction.create_feature_extractor(model, {"levels.3": "last", "head": "logits"})
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(extractor(image)["logits"], model(image), atol=1e-6)
