"""checkpoint/huggingface.py: published layout to that of transformers and back, without transformers."""

import re

import pytest
import torch

from dinat_backbones import DiNAT
from dinat_backbones.checkpoint import convert
from dinat_backbones.checkpoint.huggingface import from_huggingface, to_huggingface

ARCH = dict(embed_dim=16, depths=[1, 2, 1], num_heads=[2, 4, 8], kernel_size=3, mlp_ratio=2.0)
DILATIONS = [[3], [1, 2], [1]]


def equal(state, expected) -> bool:
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("layout", ["huggingface", "huggingface-nat"])
def test_conversion_there_and_back(layout, layer_scale):
    backbone = DiNAT(**ARCH, dilations=DILATIONS, layer_scale=layer_scale).state_dict()
    classifier = {name: tensor for name, tensor in backbone.items() if not re.match(r"norm\d", name)}
    classifier |= {f"{name}.{kind}": torch.randn(64) for name in ("norm", "head") for kind in ("weight", "bias")}
    for state in (backbone, classifier):
        assert equal(from_huggingface(to_huggingface(state)), state)
        converted, changes = convert({"model": state, "args": None}, layout)
        assert {change.kind for change in changes} == {"renamed", "dropped"} and changes[-1].source == "args"
        prefix = {"huggingface": "dinat.", "huggingface-nat": "nat."}[layout] if state is classifier else ""
        assert f"{prefix}embeddings.norm.weight" in converted and ("classifier.bias" in converted) == bool(prefix)
        assert equal(convert(converted, "imagenet")[0], state)
        assert equal(convert(converted, layout)[0], converted)
        detector, changes = convert(converted, "mmdet3")
        dropped = {change.source for change in changes if change.kind == "dropped"}
        assert dropped == {name for name in converted if re.search("classifier|layernorm[.]", name)}
        without = {name: tensor for name, tensor in state.items() if not name.startswith(("norm.", "head."))}
        assert equal(detector["state_dict"], {f"backbone.{name}": tensor for name, tensor in without.items()})
        assert equal(convert(detector, layout)[0], to_huggingface(without))


def test_report_and_other_kernel_size():
    state = DiNAT(**ARCH, dilations=DILATIONS, layer_scale=0.5).state_dict()
    converted, changes = convert(state, "huggingface", kernel_size=5)
    lines = [str(change) for change in changes]
    start, target = "levels.2.blocks.0.", "encoder.levels.2.layers.0."
    assert f"resized  {start}attn.rpb -> {target}attention.self.rpb  ([8, 5, 5] -> [8, 9, 9])" in lines
    three = f"{target}attention.self.{{query,key,value}}.bias"
    assert f"renamed  {start}attn.qkv.bias -> {three}  ([192] -> [64] + [64] + [64])" in lines
    assert f"renamed  {start}gamma{{1,2}} -> {target}layer_scale_parameters  ([64] + [64] -> [2, 64])" in lines
    lines = [str(change) for change in convert(converted, "imagenet")[1]]
    assert f"renamed  {three} -> {start}attn.qkv.bias  ([64] + [64] + [64] -> [192])" in lines
    assert f"renamed  {target}layer_scale_parameters -> {start}gamma2  ([2, 64] -> [64])" in lines


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("layers.0.blocks.0.norm1.weight", [3], "layers.0.blocks.0.norm1.weight has no name in transformers"),
        ("levels.0.blocks.0.attn.qkv.bias", [4], "expected query, key and value in equal parts"),
        ("levels.0.blocks.0.gamma1", [4], "has no levels.0.blocks.0.gamma2"),
        ("encoder.levels.0.layers.0.attention.self.key.bias", [4], "query.bias, .*value.bias"),
        ("encoder.levels.0.layers.0.layer_scale_parameters", [3, 4], r"expected \[2, dim\]"),
        ("encoder.levels.0.layers.0.other.bias", [4], "other.bias has no place"),
    ],
)
def test_conversion_refuses_what_does_not_fit(name, shape, message):
    rename = from_huggingface if name.startswith("encoder") else to_huggingface
    with pytest.raises(ValueError, match=message):
        rename({name: torch.ones(shape)})
