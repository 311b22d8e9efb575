"""The generated shapes data set (`dinat shapes`) and the demo config that trains on it."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT

pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install pycocotools")
from pycocotools import mask as coco_mask

from dinat_backbones.cli import shapes

CONFIG = ROOT / "configs" / "demo" / "mask-rcnn_dinat_shapes.py"


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
    with pytest.raises(FileExistsError, match="does not hold shapes"):
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


# -------------------------------------------------------------------------------------------------------- all layouts


COUNTS = dict(train=3, val=4)
ALL = dict(**COUNTS, size=64, seed=1)


@pytest.fixture(scope="module")
def every_layout(tmp_path_factory):
    out = tmp_path_factory.mktemp("layouts") / "set"
    assert shapes.make_shapes(out, **ALL, layouts=shapes.LAYOUTS)
    return out


def test_layouts_share_a_folder_and_do_not_depend_on_each_other(every_layout, tmp_path):
    together = _contents(every_layout)
    for layout in shapes.LAYOUTS:
        shapes.make_shapes(tmp_path / layout, **ALL, layouts=[layout])
        alone = _contents(tmp_path / layout)
        assert len(alone) >= 2 * sum(COUNTS.values()) or layout == "coco"
        for name, content in alone.items():
            assert name.name == "shapes.json" or content == together[name], name


def test_a_layout_that_is_there_is_not_made_again(every_layout, tmp_path):
    assert not shapes.make_shapes(every_layout, **ALL, layouts=["ade20k", "coco"])
    shapes.make_shapes(tmp_path / "set", **ALL, layouts=["ade20k"])
    with pytest.raises(FileExistsError, match="as ade20k, not .* as cityscapes"):
        shapes.make_shapes(tmp_path / "set", **ALL, layouts=["cityscapes"])
    assert shapes.make_shapes(tmp_path / "set", **ALL, layouts=["cityscapes"], replace=True)
    assert not (tmp_path / "set" / "images").exists()
    with pytest.raises(ValueError, match=r"layouts=\['voc'\]: expected some of coco, coco-panoptic"):
        shapes.make_shapes(tmp_path / "voc", layouts=["voc"])


def _labels(split, index):
    """The class of every pixel as it was drawn, the background as the last one."""
    labels = np.full((ALL["size"],) * 2, len(shapes.CLASSES))
    for kind, mask in shapes.scene(split, index, ALL["size"], ALL["seed"]).instances:
        labels[mask] = kind
    return labels


@pytest.mark.parametrize("split, part", [("train", "training"), ("val", "validation")])
def test_label_maps_hold_what_was_drawn(every_layout, split, part):
    for index in range(COUNTS[split]):
        city = f"gtFine/{split}/shapes/shapes_{index:06d}_000000_gtFine_labelTrainIds.png"
        ade = Image.open(every_layout / "annotations" / part / f"{index:06d}.png")
        cityscapes = Image.open(every_layout / city)
        assert ade.mode == cityscapes.mode == "L"
        assert np.array_equal(np.asarray(cityscapes), _labels(split, index))
        assert np.array_equal(np.asarray(ade), _labels(split, index) + 1)
        image = Image.open(
            every_layout / city.replace("gtFine/", "leftImg8bit/").replace("gtFine_labelTrainIds", "leftImg8bit")
        )
        assert np.array_equal(np.asarray(image), shapes.scene(split, index, ALL["size"], ALL["seed"]).image)


@pytest.mark.parametrize("split", COUNTS)
def test_panoptic_files_hold_what_was_drawn(every_layout, split):
    content = json.loads((every_layout / "annotations" / f"panoptic_{split}.json").read_text())
    names = {category["id"]: (category["name"], category["isthing"]) for category in content["categories"]}
    assert list(names.values()) == [*((name, 1) for name in shapes.CLASSES), (shapes.BACKGROUND, 0)]
    assert [image["file_name"] for image in content["images"]] == [f"{i:06d}.jpg" for i in range(COUNTS[split])]
    for index, annotation in enumerate(content["annotations"]):
        file = every_layout / "annotations" / f"panoptic_{split}" / annotation["file_name"]
        pixels = np.asarray(Image.open(file)).astype(int)
        ids = pixels @ (1, 256, 65536)
        assert {info["id"] for info in annotation["segments_info"]} == set(np.unique(ids).tolist())
        drawn = shapes.scene(split, index, ALL["size"], ALL["seed"]).instances
        for info, (kind, mask) in zip(annotation["segments_info"], drawn, strict=False):
            assert info["category_id"] == kind + 1 and np.array_equal(ids == info["id"], mask)
        for info in annotation["segments_info"]:
            ys, xs = np.nonzero(ids == info["id"])
            assert info["area"] == len(ys) and info["iscrowd"] == 0
            assert info["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert (_labels(split, index)[ids == info["id"]] == info["category_id"] - 1).all()


# ------------------------------------------------------------------- what was drawn, as prediction, by the frameworks


def evaluate(framework, dataset, metric, prediction, part="val"):
    """A framework's metric of a dataset's files, given a function of the index that returns what was drawn."""
    pytest.importorskip(framework, reason=f"{framework} is missing: pip install 'dinat_backbones[openmmlab]'")
    from mmengine.registry import DATASETS, METRICS, DefaultScope

    import dinat_backbones.adapters.openmmlab  # noqa: F401  # before the framework: mmcv's operators

    with DefaultScope.overwrite_default_scope(framework):
        dataset = DATASETS.build(dict(dataset, test_mode=True))
        metric = METRICS.build(metric)
    metric.dataset_meta = dataset.metainfo
    assert len(dataset) == COUNTS[part]
    for index in range(len(dataset)):
        sample = dataset[index]["data_samples"].to_dict()
        metric.process({}, [{**sample, **prediction(index)}])
    return metric.evaluate(len(dataset))


def test_coco_metric_of_what_was_drawn_is_1(every_layout):
    import torch

    def instances(index):
        kinds, masks = zip(*shapes.scene("val", index, ALL["size"], ALL["seed"]).instances, strict=True)
        ends = [np.nonzero(mask) for mask in masks]
        boxes = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] for ys, xs in ends]
        return dict(
            pred_instances=dict(
                bboxes=torch.tensor(np.array(boxes, np.float32)),
                labels=torch.tensor(kinds),
                scores=torch.ones(len(kinds)),
                masks=torch.from_numpy(np.stack(masks)),
            )
        )

    expected = str(every_layout / "annotations" / "instances_val.json")
    dataset = dict(
        type="CocoDataset",
        data_root=str(every_layout),
        ann_file=expected,
        data_prefix=dict(img="val"),
        metainfo=dict(classes=shapes.CLASSES),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackDetInputs")],
    )
    found = evaluate("mmdet", dataset, dict(type="CocoMetric", ann_file=expected, metric=["bbox", "segm"]), instances)
    assert found["coco/bbox_mAP"] == found["coco/segm_mAP"] == 1.0


def test_panoptic_quality_of_what_was_drawn_is_100(every_layout):
    import torch

    def panoptic(index):
        found = _labels("val", index)
        for number, (_, mask) in enumerate(shapes.scene("val", index, ALL["size"], ALL["seed"]).instances, 1):
            found[mask] += 1000 * number  # mmdet's INSTANCE_OFFSET
        return dict(pred_panoptic_seg=dict(sem_seg=torch.from_numpy(found)[None]))

    expected, folder = every_layout / "annotations" / "panoptic_val.json", every_layout / "annotations" / "panoptic_val"
    classes = (*shapes.CLASSES, shapes.BACKGROUND)
    dataset = dict(
        type="CocoPanopticDataset",
        data_root=str(every_layout),
        ann_file=str(expected),
        data_prefix=dict(img="val", seg=str(folder)),
        metainfo=dict(classes=classes, thing_classes=shapes.CLASSES, stuff_classes=(shapes.BACKGROUND,)),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackDetInputs")],
    )
    metric = dict(type="CocoPanopticMetric", ann_file=str(expected), seg_prefix=str(folder), nproc=1)
    found = evaluate("mmdet", dataset, metric, panoptic)
    assert [found[f"coco_panoptic/{name}"] for name in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")] == [100.0] * 5


@pytest.mark.parametrize("layout", ["ade20k", "cityscapes"])
def test_mean_iou_of_what_was_drawn_is_100(every_layout, layout):
    import torch

    kind, images, maps = {
        "ade20k": ("ADE20KDataset", "images/validation", "annotations/validation"),
        "cityscapes": ("CityscapesDataset", "leftImg8bit/val", "gtFine/val"),
    }[layout]
    dataset = dict(
        type=kind,
        data_root=str(every_layout),
        data_prefix=dict(img_path=images, seg_map_path=maps),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
    )
    for wrong, expected in ((0, 100.0), (1, None)):

        def drawn(index, wrong=wrong):
            return dict(pred_sem_seg=dict(data=torch.from_numpy(_labels("val", index) + wrong)[None]))

        found = evaluate("mmseg", dataset, dict(type="IoUMetric", iou_metrics=["mIoU"]), drawn)
        assert found["mIoU"] == expected if expected else found["mIoU"] < 50  # labels off by one


# ------------------------------------------------------------------------------------------------------------ the demo


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
