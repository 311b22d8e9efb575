"""The generated shapes dataset (tools/make_shapes.py) and the demo config that trains on it."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

coco_mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is missing; it comes with mmdet")

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo" / "mask_rcnn_dinat_shapes.py"


sys.path.insert(0, str(ROOT / "tools"))  # which is no package; worker processes import the module by its name
shapes = importlib.import_module("make_shapes")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "set"
    assert shapes.make_shapes(out, train=12, val=4, size=96, seed=3)
    return out


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_arguments_same_bytes(dataset, tmp_path):
    shapes.make_shapes(tmp_path / "again", train=12, val=4, size=96, seed=3)
    shapes.make_shapes(tmp_path / "other", train=12, val=4, size=96, seed=4)
    assert _contents(tmp_path / "again") == _contents(dataset)
    assert _contents(tmp_path / "other").keys() == _contents(dataset).keys()
    for name, content in _contents(tmp_path / "other").items():
        assert content != _contents(dataset)[name], name


def test_a_second_call_changes_nothing_and_other_arguments_need_replace(dataset, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    assert not shapes.make_shapes(dataset, train=12, val=4, size=96, seed=3)
    with pytest.raises(FileExistsError, match="'train': 12"):
        shapes.make_shapes(dataset, train=13, val=4, size=96, seed=3)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before

    shapes.make_shapes(tmp_path / "set", train=2, val=1, size=64)
    assert shapes.make_shapes(tmp_path / "set", train=3, val=1, size=64, replace=True)
    assert len(list((tmp_path / "set" / "train").iterdir())) == 3

    (tmp_path / "precious").mkdir()
    with pytest.raises(FileExistsError, match="not written by make_shapes"):
        shapes.make_shapes(tmp_path / "precious", train=2, val=1, size=64, replace=True)


@pytest.mark.parametrize("wrong", [dict(train=0), dict(val=0), dict(size=8), dict(seed=-1)])
def test_out_of_range_arguments(wrong, tmp_path):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        shapes.make_shapes(tmp_path / "set", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(line):
        if line.startswith("drawing val"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shapes.make_shapes(tmp_path / "set", train=4, val=2, size=64, progress=stop)
    assert not list(tmp_path.iterdir())

    # a run killed outright leaves its partial folder, which the next one clears away
    (tmp_path / ".set.partial" / "train").mkdir(parents=True)
    assert shapes.make_shapes(tmp_path / "set", train=2, val=1, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_annotations_agree_with_masks(dataset):
    for split, count in (("train", 12), ("val", 4)):
        content = json.loads((dataset / "annotations" / f"instances_{split}.json").read_text())
        assert [category["name"] for category in content["categories"]] == list(shapes.CLASSES)
        assert len(content["images"]) == count == len(list((dataset / split).iterdir()))
        assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])
        covered = {image["id"]: np.zeros((image["height"], image["width"]), int) for image in content["images"]}
        for annotation in content["annotations"]:
            mask = coco_mask.decode(annotation["segmentation"])
            ys, xs = np.nonzero(mask)
            corner, far = [xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]
            assert annotation["area"] == mask.sum() >= shapes.MIN_VISIBLE_PIXELS
            assert annotation["bbox"] == [*corner, far[0] - corner[0], far[1] - corner[1]]
            assert annotation["iscrowd"] == 0
            covered[annotation["image_id"]] += mask
        assert max(mask.max() for mask in covered.values()) == 1, "visible masks overlap"
        assert all(mask.any() for mask in covered.values()), "an image without any shape"


def test_masks_are_where_the_shapes_were_painted(monkeypatch):
    monkeypatch.setattr(shapes, "_texture", lambda rng, size, colour: np.broadcast_to(colour, (size, size, 3)).copy())
    for seed in range(8):
        scene = shapes.draw_scene(np.random.default_rng(seed), 96)
        for _, mask in scene.instances:
            # away from blended outlines a plain shape has one colour, but for the noise
            inner = mask.copy()
            for axis in (0, 1):
                inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
            if inner.sum() >= 10:
                assert np.abs(scene.image[inner].astype(float) - np.median(scene.image[inner], 0)).mean() < 12


def test_colour_says_nothing_about_the_class():
    samples = {kind: [] for kind in range(len(shapes.CLASSES))}
    for index in range(250):
        scene = shapes.scene("train", index, 48, seed=0)
        for kind, mask in scene.instances:
            samples[kind].append(scene.image[mask].mean(0))
    everything = np.concatenate([np.array(colours) for colours in samples.values()])
    for kind, colours in samples.items():
        # 4 standard errors of a mean of that many draws from one common distribution
        tolerance = 4 * everything.std(0) / np.sqrt(len(colours))
        assert len(colours) >= 50
        assert (np.abs(np.mean(colours, 0) - everything.mean(0)) < tolerance).all(), shapes.CLASSES[kind]


def test_the_config_trains_a_step(dataset):
    pytest.importorskip("mmdet", reason="mmdet is missing; the demo config needs it")
    import torch
    from mmdet.registry import DATASETS, MODELS
    from mmengine.config import Config
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DefaultScope

    config = Config.fromfile(CONFIG)
    config.merge_from_dict({"train_dataloader.dataset.data_root": str(dataset)})
    assert config.classes == shapes.CLASSES
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        data = DATASETS.build(config.train_dataloader.dataset)
        model = MODELS.build(config.model)
        model.init_weights()
        batch = model.data_preprocessor(pseudo_collate([data[0], data[1]]), training=True)
        losses, _ = model.parse_losses(model(**batch, mode="loss"))
        losses.backward()
    assert torch.isfinite(losses)
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, without
