"""`dinat predict` on drawn scenes: instances, semantic and panoptic maps of small models of mmdet and mmseg."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, environment

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
import mmseg
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from dinat_backbones.cli import predict, shapes
from dinat_backbones.cli.predict_openmmlab import load_predictor

MMSEG = Path(mmseg.__file__).parent / ".mim" / "configs" / "_base_"  # "mmseg::" needs the package's original name

BACKBONE = """
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)
backbone = dict(_delete_=True, type="DiNAT", embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], kernel_size=3,
             mlp_ratio=2.0)
classes = ("circle", "triangle", "ring", "background")
palette = [(0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250)]
test_dataloader = dict(dataset=dict(metainfo=dict(classes=classes, palette=palette)))
"""
MODELS_OF = {
    "instances": f"""
_base_ = "{ROOT}/configs/demo/mask-rcnn_dinat_shapes.py"
model = dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))
""",
    "semantic": f"""
_base_ = ["{MMSEG}/models/upernet_r50.py", "{MMSEG}/datasets/ade20k.py", "{MMSEG}/default_runtime.py"]
{BACKBONE}
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(64, 64)),
    backbone=backbone,
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=16, num_classes=4, norm_cfg=dict(type="BN")),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=4, norm_cfg=dict(type="BN")),
)
test_dataloader["dataset"].update(type="BaseSegDataset", img_suffix=".jpg", seg_map_suffix=".png")
""",
    "panoptic": f"""
_base_ = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py"
{BACKBONE}
test_dataloader["dataset"]["metainfo"].update(thing_classes=classes[:-1], stuff_classes=classes[-1:])
layers = dict(self_attn_cfg=dict(embed_dims=32, num_heads=2), ffn_cfg=dict(embed_dims=32, feedforward_channels=32))
model = dict(
    backbone=backbone,
    panoptic_head=dict(
        in_channels=[16, 32, 64, 128], feat_channels=32, out_channels=32, num_things_classes=3, num_stuff_classes=1,
        num_queries=20, loss_cls=dict(class_weight=[1.0] * 4 + [0.1]),
        pixel_decoder=dict(
            encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=dict(embed_dims=32, num_heads=2),
                                                      ffn_cfg=dict(embed_dims=32, feedforward_channels=32))),
            positional_encoding=dict(num_feats=16)),
        positional_encoding=dict(num_feats=16),
        transformer_decoder=dict(num_layers=1, layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=32, num_heads=2), cross_attn_cfg=dict(embed_dims=32, num_heads=2),
            ffn_cfg=dict(embed_dims=32, feedforward_channels=32)))),
    panoptic_fusion_head=dict(num_things_classes=3, num_stuff_classes=1),
    test_cfg=dict(object_mask_thr=0.0, iou_thr=0.0, instance_on=False),
)
""",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    for index, name in enumerate(("a.jpg", "below/b.png")):
        Image.fromarray(shapes.scene("val", index, 96, 0).image).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:100])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("kind", ["instances", "semantic"])
def test_empty_files_are_reported_and_gifs_drawn(tmp_path, images, kind, capsys):
    """A file of no bytes among them is reported, and the others are done; a GIF is read as PIL reads it."""
    config, checkpoint = saved_model(tmp_path, kind)
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    (folder / "a.png").touch()
    (folder / "b.gif.png").write_bytes((images / "below/b.png").read_bytes()[:30])
    Image.open(images / "below/b.png").convert("P").save(folder / "c.gif")
    (folder / "d.png").write_bytes((images / "below/b.png").read_bytes())
    words = map(str, (folder, "--config", config, "--checkpoint", checkpoint, "--out", out, "--device", "cpu"))
    with pytest.raises(SystemExit, match="2 of 4 images could not be read"):
        predict.main([*words])
    lines = capsys.readouterr().out.splitlines()
    assert [": NOT READ: not an image, or damaged" in line for line in lines[-4:]] == [True, True, False, False]
    assert {path.name for path in out.iterdir()} == {"c.gif.png", "d.png"}
    assert pixels(out / "c.gif.png").shape == pixels(folder / "c.gif").shape


def saved_model(folder, kind, change=lambda model: None):
    """Config and checkpoint of a small model with random weights; `change` may alter them."""
    config, checkpoint = folder / "config.py", folder / "model.pth"
    config.write_text(MODELS_OF[kind])
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    change(model)
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    return str(config), str(checkpoint)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", MODELS_OF)
def test_what_is_found_is_drawn_and_named(tmp_path, images, kind):
    run = load_predictor(*saved_model(tmp_path, kind), device="cpu", score=0.0)
    words = run(images / "a.jpg", tmp_path / "out" / "a.jpg")
    names = set(re.findall("[a-z]+", words))
    assert names and names <= {*shapes.CLASSES, shapes.BACKGROUND}, words
    before, after = pixels(images / "a.jpg"), pixels(tmp_path / "out" / "a.jpg")
    assert after.shape == before.shape
    assert np.abs(after - before).mean() > 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jpg"]


def test_classes_and_colours_are_those_of_the_config(tmp_path, images):
    def all_triangles(model):
        torch.nn.init.zeros_(model.decode_head.conv_seg.weight)
        model.decode_head.conv_seg.bias.data = torch.tensor([0.0, 9, 0, 0])

    run = load_predictor(*saved_model(tmp_path, "semantic", all_triangles), device="cpu")
    assert run(images / "below/b.png", tmp_path / "out.png") == "triangle"
    change = pixels(tmp_path / "out.png") - pixels(images / "below/b.png")
    assert change[..., 2].mean() > 30 > 0 > change[..., 0].mean()  # towards blue


def all_of_class(layer, label, beyond):
    """Makes a classifying layer answer `label` with all certainty: the scores of the others are exactly 0."""
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.bias, -beyond)
    layer.bias.data[label] = beyond


# What makes a model find nothing, and what is said then. Scores of 0 are above no threshold; class 3 of the segmentor
# is one that the data set does not have.
NOTHING = {
    "instances": (lambda model: all_of_class(model.roi_head.bbox_head.fc_cls, -1, 500), "", "no instance"),
    "panoptic": (lambda model: all_of_class(model.panoptic_head.cls_embed, -1, 500), "", "nothing"),
    "semantic": (
        lambda model: all_of_class(model.decode_head.conv_seg, 3, 500),
        'test_dataloader["dataset"]["metainfo"].update(classes=classes[:-1], palette=palette[:-1])\n',
        "nothing",
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_an_image_in_which_nothing_is_found_is_drawn_as_it_is(tmp_path, images, kind, monkeypatch):
    change, config, words = NOTHING[kind]
    monkeypatch.setitem(MODELS_OF, kind, MODELS_OF[kind] + config)
    run = load_predictor(*saved_model(tmp_path, kind, change), device="cpu", score=0.0)
    assert run(images / "below/b.png", tmp_path / "out.png") == words
    assert np.abs(pixels(tmp_path / "out.png") - pixels(images / "below/b.png")).max() == 0


def test_a_folder_is_finished_in_several_runs(tmp_path, images, monkeypatch, capsys):
    config, checkpoint = saved_model(tmp_path, "instances")
    out = tmp_path / "out"

    def words(*more, source=images):
        return [*map(str, (source, "--config", config, "--checkpoint", checkpoint, "--out", out)), *more]

    # the first one in a process of its own
    command = [sys.executable, ROOT / "tools/predict.py", *words()]
    first = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert first.returncode == 1, first.stdout + first.stderr
    assert "[2/3] below/b.png: " in first.stdout and "[3/3] broken.jpg: NOT READ" in first.stdout
    assert first.stderr.strip().splitlines()[-1] == "1 of 3 images could not be read"
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert {path.relative_to(out).as_posix() for path in done} == {"a.jpg", "below/b.png"}
    (out / "a.jpg").unlink()
    with pytest.raises(SystemExit, match="1 of 2 images could not be read"):
        predict.main(words())
    second = capsys.readouterr().out
    assert "1 of 3 images are there already" in second and "a.jpg: " in second
    assert (out / "below/b.png").stat().st_mtime_ns == done[out / "below/b.png"]
    predict.main(words("--force", source=images / "below" / "b.png"))
    assert "[1/1] b.png: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(source="nowhere"), "nowhere: not there"),
        (dict(source="empty"), "empty: no images there"),
        (dict(config="nowhere.py"), "config nowhere.py is not there"),
        (dict(checkpoint="nowhere.pth"), "checkpoint nowhere.pth is not there"),
        (dict(checkpoint="part.pth"), "tensors are not in the file: backbone."),
        (dict(out="source"), "is where the images are"),
        (dict(task="semantic"), "--task semantic is for YAML configs of Detectron2"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, images, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "source").mkdir()
    Image.open(images / "a.jpg").save(tmp_path / "source" / "a.png")
    (tmp_path / "config.py").write_text(MODELS_OF["instances"])
    torch.save({"state_dict": {"a": torch.ones(1)}}, "part.pth")
    given = dict(source="source", config="config.py", checkpoint="part.pth", out="out") | change
    options = [word for name in given if name != "source" for word in (f"--{name}", given[name])]
    monkeypatch.setattr(sys, "argv", ["predict.py", given["source"], *options])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        predict.main()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_attention_of_a_detector_is_drawn(tmp_path, images, capsys):
    """At the pixel of the file, which the model sees enlarged."""
    from dinat_backbones.cli import attend

    config, checkpoint = saved_model(tmp_path, "panoptic")
    words = [str(images / "a.jpg"), "--config", config, "--checkpoint", checkpoint, "--device", "cpu"]
    attend.main([*words, "--at", "48,24", "--out", str(tmp_path / "out.png")])
    lines = capsys.readouterr().out.splitlines()
    blocks = [line for line in lines if "keys" in line]
    assert [line.split(",")[1].split(";")[0] for line in blocks] == [f" {2**i} pixels apart" for i in (2, 3, 4, 5)]
    drawing = pixels(tmp_path / "out.png")
    green = np.argwhere((drawing == (0, 255, 0)).all(-1) & (np.arange(len(drawing)) < 6 + 14 + 240)[:, None])
    assert np.abs(green.mean(0) - (20 + 240 * 24 / 96, 6 + 240 * 48 / 96)).max() < 5
    with pytest.raises(SystemExit, match="has 96 x 96 pixels"):
        attend.main([*words, "--at", "96,0", "--out", str(tmp_path / "out.png")])
