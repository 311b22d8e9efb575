"""checkpoint/layouts.py and tools/convert_checkpoint.py: published layouts, key by key, and the features they give."""

import json

import pytest
import torch

import dinat_backbones
from dinat_backbones import DiNAT
from dinat_backbones.checkpoint import LAYOUTS, convert, load_backbone, load_model, read, resize_rpb
from dinat_backbones.classifier import NATClassifier
from helpers import DATA, ROOT, fill_by_name, load_golden, run_tool

SMALL = dict(embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0)
# Names and shapes of everything but the backbone, as mmdet 2.19.0 and mmseg 0.20.2 build the published models.
HEADS = json.loads((DATA / "published_heads.json").read_text())
CLASSES, PALETTE = ("cat", "dog"), [[0, 0, 0], [255, 0, 0]]


def filled_heads(heads):
    return {
        name: torch.full(shape, 3 if name.endswith("num_batches_tracked") else 0.5)
        for name, shape in HEADS[heads].items()
    }


def old_file(heads="mask_rcnn"):
    """A checkpoint as mmdet 2 wrote it."""
    backbone = fill_by_name(DiNAT(**SMALL)).state_dict()
    state = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    state |= filled_heads(heads)
    meta = dict(CLASSES=CLASSES, PALETTE=PALETTE, epoch=36, config="model = dict()", mmdet_version="2.19.0")
    return {"meta": meta, "state_dict": state, "optimizer": {"state": {0: {"step": 1}}}}


def kinds(changes):
    return {change.source: change.kind for change in changes}


def equal(state, expected):
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("to", ["mmdet3", "mmseg1"])
def test_old_files_keep_every_tensor_and_move_the_class_names(to):
    old = old_file()
    new, changes = convert(old, to)
    assert new["meta"] == {"dataset_meta": {"classes": CLASSES, "palette": PALETTE}} and set(new) == {
        "meta",
        "state_dict",
    }
    assert equal(new["state_dict"], old["state_dict"])
    found = kinds(changes)
    assert {name: found.pop(name) for name in old["state_dict"]} == dict.fromkeys(old["state_dict"], "kept")
    assert found == {
        "optimizer": "dropped",
        "meta.CLASSES": "renamed",
        "meta.PALETTE": "renamed",
        "meta.epoch": "dropped",
        "meta.config": "dropped",
        "meta.mmdet_version": "dropped",
    }


@pytest.mark.parametrize("there, back", [("mmdet3", "mmdet2"), ("mmseg1", "mmseg0")])
def test_there_and_back(there, back):
    old = old_file()
    new, _ = convert(convert(old, there)[0], back)
    assert new["meta"] == {"CLASSES": CLASSES, "PALETTE": PALETTE}
    assert equal(new["state_dict"], old["state_dict"])


def test_backbone_of_a_detector_and_back():
    backbone = fill_by_name(DiNAT(**SMALL)).state_dict()
    bare, changes = convert(old_file(), "imagenet")
    assert equal(bare, backbone)
    found = kinds(changes)
    assert all(found[f"backbone.{name}"] == "renamed" for name in backbone)
    assert all(found[name] == "dropped" for name in HEADS["mask_rcnn"])
    again, _ = convert(bare, "mmdet3")
    assert equal(again["state_dict"], {f"backbone.{name}": tensor for name, tensor in backbone.items()})


def test_classifier_stays_among_imagenet_files_and_has_no_place_elsewhere():
    backbone = {name: t for name, t in DiNAT(**SMALL).state_dict().items() if not name.startswith("norm")}
    file = backbone | {"norm.weight": torch.ones(256), "head.weight": torch.ones(9, 256)}
    same, changes = convert({"model": file, "args": None}, "imagenet")
    assert equal(same, file) and {change.kind for change in changes} == {"kept", "dropped"}
    new, changes = convert(file, "mmdet3")
    assert equal(new["state_dict"], {f"backbone.{name}": tensor for name, tensor in backbone.items()})
    assert [change.source for change in changes if change.kind == "dropped"] == ["norm.weight", "head.weight"]


def test_other_kernel_size():
    old = old_file()
    new, changes = convert(old, "mmdet3", kernel_size=5)
    tables = [name for name in old["state_dict"] if name.endswith("rpb")]
    assert [change.source for change in changes if change.kind == "resized"] == tables and len(tables) == 5
    for name, tensor in old["state_dict"].items():
        assert torch.equal(new["state_dict"][name], resize_rpb(tensor, 5) if name in tables else tensor), name
    text = str(next(change for change in changes if change.kind == "resized"))
    assert text == "resized  backbone.levels.0.blocks.0.attn.rpb  ([1, 5, 5] -> [1, 9, 9])"


@pytest.mark.parametrize(
    "content, named",
    [
        ({"layer1.0.conv1.weight": torch.ones(3)}, "layer1.0.conv1.weight"),
        (
            {"model": {"backbone.patch_embed.norm.bias": torch.ones(3), "sem_seg_head.a": torch.ones(1)}},
            "sem_seg_head.a",
        ),
        ({"epoch": 3}, "no tensors"),
    ],
)
def test_unknown_layouts_are_refused_by_name(content, named):
    with pytest.raises(ValueError, match=f"cannot convert to mmdet3: .*{named}"):
        convert(content, "mmdet3")
    with pytest.raises(ValueError, match=r"layout 'mmdet4': expected one of imagenet, mmdet2"):
        convert(old_file(), "mmdet4")
    assert "mmdet4" not in LAYOUTS


# ------------------------------------------------------------------------------------------------------- the heads


CONFIGS = {
    "mask_rcnn": ("mmdet", "dinat/mask-rcnn_dinat-mini_*coco.py", "net_dinat_mini_det_224x224"),
    "cascade_mask_rcnn": ("mmdet", "dinat/cascade-mask-rcnn_dinat-mini_*coco.py", "net_dinat_mini_det_224x224"),
    "upernet": ("mmseg", "dinat_s/dinat-s-tiny_upernet_*ade20k-512x512.py", "net_dinat_s_tiny_ade_150x203"),
}


@pytest.mark.parametrize("heads", CONFIGS)
def test_published_files_load_strictly_and_give_the_published_features(tmp_path, heads):
    """Filled by the published names, converted, loaded without leaving anything out, run; against the original code."""
    framework, pattern, golden = CONFIGS[heads]
    pytest.importorskip(framework, reason=f"{framework} is not installed: pip install 'dinat_backbones[openmmlab]'")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    (path,) = (ROOT / "configs" / framework).glob(pattern)
    cfg = Config.fromfile(path)
    cfg.model.backbone.update(init_cfg=None)
    with DefaultScope.overwrite_default_scope(framework):
        model = MODELS.build(cfg.model).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("backbone.")} == HEADS[heads]

    meta, arrays = load_golden(golden)
    backbone = fill_by_name(getattr(dinat_backbones, meta["cls"])(**meta["kwargs"])).state_dict()
    state = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    state |= filled_heads(heads)
    torch.save({"meta": {"CLASSES": CLASSES}, "state_dict": state}, tmp_path / "old.pth")
    run_tool(tmp_path / "old.pth", tmp_path / "new.pth", "--to", {"mmdet": "mmdet3", "mmseg": "mmseg1"}[framework])
    load_model(model, tmp_path / "new.pth")
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    with torch.no_grad():
        features = model.backbone(torch.randn(meta["shape"], generator=torch.Generator().manual_seed(meta["seed"])))
    for i, feature in enumerate(features):
        got = feature.flatten()[:: int(arrays[f"out{i}_step"])].numpy()
        assert abs(got - arrays[f"out{i}"]).max() <= 1e-4, i


# -------------------------------------------------------------------------------------------------- command line


def test_every_suffix_and_the_report(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    old = old_file()
    torch.save(old, tmp_path / "old.pth")
    lines = run_tool(tmp_path / "old.pth", tmp_path / "new.safetensors", "--to", "mmdet3").splitlines()
    assert len(lines) == len(old["state_dict"]) + 6 + 1
    assert "kept     backbone.levels.0.blocks.0.attn.rpb  ([1, 5, 5])" in lines
    assert "renamed  meta.CLASSES -> meta.dataset_meta.classes" in lines
    assert lines[-1].endswith(f"layout mmdet3; {len(old['state_dict'])} kept, 2 renamed, 0 resized, 4 dropped")
    run_tool(tmp_path / "new.safetensors", tmp_path / "sub" / "back.pth", "--to", "mmdet2")
    back = read(tmp_path / "sub" / "back.pth")
    assert equal(back["state_dict"], {name: old["state_dict"][name] for name in back["state_dict"]})
    assert back["state_dict"].keys() == old["state_dict"].keys()
    assert back["meta"] == {"CLASSES": list(CLASSES), "PALETTE": PALETTE}
    run_tool(tmp_path / "sub" / "back.pth", tmp_path / "backbone.safetensors", "--to", "imagenet")
    model = DiNAT(**SMALL)
    assert not load_backbone(model, tmp_path / "backbone.safetensors").missing


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    torch.save(old_file(), tmp_path / "old.pth")
    (tmp_path / "new.pth").write_bytes(b"precious")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    wrong = [
        (("old.pth", "new.pth", "--to", "mmdet3"), "new.pth exists; name another file or add --force", 2),
        (("old.pth", "new.bin", "--to", "mmdet3"), "new.bin: expected a name that ends in .pth", 2),
        (("nowhere.pth", "other.pth", "--to", "mmdet3"), "nowhere.pth is not there", 1),
        (("new.pth", "other.pth", "--to", "mmdet3"), "cannot be read", 1),
        (("old.pth", "other.pth", "--to", "mmdet3", "--kernel-size", "8"), "kernel_size=8", 1),
    ]
    for (source, target, *rest), message, code in wrong:
        assert message in run_tool(tmp_path / source, tmp_path / target, *rest, code=code)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run_tool(tmp_path / "old.pth", tmp_path / "new.pth", "--to", "mmdet3", "--force")
    assert read(tmp_path / "new.pth")["meta"]["dataset_meta"]["classes"] == CLASSES


def test_a_classifier_of_mmpretrain_is_the_published_layout_again():
    """Its model has the norm in the backbone, whose last map is averaged, and the head's layer is `fc`."""
    published = NATClassifier(embed_dim=8, depths=[1, 1], num_heads=[1, 2], mlp_ratio=2.0, kernel_size=3).state_dict()
    names = {key: f"backbone.{key}" for key in published}
    names |= {
        key: key.replace("norm.", "backbone.norm1.").replace("head.", "head.fc.")
        for key in published
        if key.startswith(("norm.", "head."))
    }
    converted, _ = convert({"state_dict": {names[key]: value for key, value in published.items()}}, "imagenet")
    assert converted.keys() == published.keys()
    assert all(torch.equal(converted[key], value) for key, value in published.items())
