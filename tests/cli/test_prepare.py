"""`dinat prepare` against brute force from the sources, and against the frameworks' own tables of classes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinat_backbones.zoo import ade20k
from helpers import ROOT, environment

pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install pycocotools")
from pycocotools import mask as coco_mask

from dinat_backbones.cli import prepare
from dinat_backbones.cli.shapes import make_shapes


@pytest.fixture
def run(capsys):
    """The command line in this process: what it printed, or the message it ended with."""

    def call(root, *arguments, code=0):
        words = [*arguments, "--split", "val", "--root", str(root)]
        try:
            prepare.main(words if "--workers" in words else [*words, "--workers", "1"])
        except SystemExit as stopped:
            assert code == 1 and isinstance(stopped.code, str)
            return stopped.code
        assert code == 0
        return capsys.readouterr().out

    return call


def content(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------------- COCO


@pytest.fixture
def coco(tmp_path):
    """Shapes where COCO's files would be."""
    make_shapes(tmp_path / "shapes", train=1, val=3, size=48, layouts=["coco-panoptic"])
    base = tmp_path / "root" / "coco"
    (base / "annotations").mkdir(parents=True)
    (tmp_path / "shapes" / "annotations" / "panoptic_val").rename(base / "panoptic_val2017")
    annotations = json.loads((tmp_path / "shapes" / "annotations" / "panoptic_val.json").read_text())
    del annotations["annotations"][0]["segments_info"][-1]  # so that something is unlabelled
    first = base / "panoptic_val2017" / annotations["annotations"][0]["file_name"]
    pixels = np.array(Image.open(first))
    known = [segment["id"] for segment in annotations["annotations"][0]["segments_info"]]
    pixels[~np.isin(pixels[..., 0], known)] = 0
    Image.fromarray(pixels).save(first)
    (base / "annotations" / "panoptic_val2017.json").write_text(json.dumps(annotations))
    return base


def test_coco_label_maps(coco, run):
    """Pixel by pixel: the class of the segment, counted in the order of the categories."""
    out = run(coco.parent, "coco", "--workers", "2")
    assert "panoptic_semseg_val2017: 3/3" in out and out.endswith("coco val: complete\n")
    annotations = json.loads((coco / "annotations" / "panoptic_val2017.json").read_text())
    order = [category["id"] for category in annotations["categories"]]
    seen = set()
    for entry in annotations["annotations"]:
        segment_map = np.array(Image.open(coco / "panoptic_val2017" / entry["file_name"])).astype(int)
        made = Image.open(coco / "panoptic_semseg_val2017" / entry["file_name"])
        assert made.mode == "L"
        made = np.array(made)
        for y in range(segment_map.shape[0]):
            for x in range(segment_map.shape[1]):
                number = segment_map[y, x, 0] + 256 * segment_map[y, x, 1] + 256**2 * segment_map[y, x, 2]
                found = [segment for segment in entry["segments_info"] if segment["id"] == number]
                assert made[y, x] == (order.index(found[0]["category_id"]) if found else 255)
        seen |= {*np.unique(made).tolist()}
    assert seen >= {3, 255} and len(seen) > 2


def test_what_is_there_is_left_alone_and_the_rest_is_made(coco, run):
    run(coco.parent, "coco")
    before = content(coco)
    run(coco.parent, "coco")
    assert content(coco) == before
    victim = sorted((coco / "panoptic_semseg_val2017").iterdir())[1]
    victim.unlink()
    run(coco.parent, "coco")
    after = content(coco)
    assert after.keys() == before.keys() and after[victim][0] == before[victim][0]
    assert {path for path in after if after[path] != before[path]} == {victim}


def test_coco_images_may_be_beside_their_annotations(coco, run):
    (coco / "panoptic_val2017").rename(coco / "annotations" / "panoptic_val2017")
    run(coco.parent, "coco")
    assert len(list((coco / "panoptic_semseg_val2017").iterdir())) == 3


def test_foreign_images_are_refused_and_nothing_half_is_left(coco, run):
    second = coco / "panoptic_val2017" / "000001.png"
    Image.new("RGB", (48, 48), (1, 2, 3)).save(second)
    message = run(coco.parent, "coco", code=1)
    assert "000001.png has the segments [197121], which its annotations do not list" in message
    assert {path.name for path in (coco / "panoptic_semseg_val2017").iterdir()} <= {"000000.png", "000002.png"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: text.replace('"annotations"', '"others"'), "is not in COCO's panoptic format .*annotations"),
        (lambda text: text.replace('"file_name": "000000.png"', '"name": "x"'), "panoptic format .*file_name"),
        (lambda text: text.replace('"category_id": 1', '"category_id": 99'), r"unlisted categories \[99\]"),
        (lambda text: "[]", "is not in COCO's panoptic format"),
    ],
)
def test_annotations_of_another_format_are_refused(coco, run, change, message):
    path = coco / "annotations" / "panoptic_val2017.json"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    stopped = run(coco.parent, "coco", code=1)
    assert re.search(message, stopped) and str(path) in stopped
    assert not (coco / "panoptic_semseg_val2017").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), prepare.atomic_write(tmp_path / "sub" / "map.png") as name:
        name.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list((tmp_path / "sub").iterdir())


# ------------------------------------------------------------------------------------------------------------- ADE20K

SIZE = (24, 30)


@pytest.fixture
def ade(tmp_path):
    """Two images: stuff 4 (floor, label 3) and 1 (wall, 0), things of two classes, one of them over unlabelled."""
    base = tmp_path / "ADEChallengeData2016"
    for folder in ("images", "annotations", "annotations_instance"):
        (base / folder / "validation").mkdir(parents=True)
    for index in range(2):
        name = f"ADE_val_{index + 1:08d}"
        labels = np.zeros(SIZE, dtype=np.uint8)
        labels[:10], labels[10:20, :20] = 1, 4
        labels[5:8, 2:9] = 8  # where the label map has the bed, which the instances say better
        instances = np.zeros((*SIZE, 3), dtype=np.uint8)
        instances[5:8, 2 + index : 9] = (1, 1, 0)  # a bed: class 1 of 100
        instances[8:14, 12:18] = (100, 2, 0)  # a flag over wall and floor
        instances[21:23, 3:5] = (100, 3, 0)  # another one
        Image.fromarray(labels).save(base / "annotations" / "validation" / f"{name}.png")
        Image.fromarray(instances).save(base / "annotations_instance" / "validation" / f"{name}.png")
        Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(base / "images" / "validation" / f"{name}.jpg")
    return base


def box(mask):
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    return [int(left), int(top), int(columns.max() - left + 1), int(rows.max() - top + 1)]


def test_ade20k(ade, run):
    out = run(ade.parent, "ade20k")
    assert "ade20k_panoptic_val: 2/2" in out and "annotations_detectron2/validation: 2/2" in out
    panoptic = json.loads((ade / "ade20k_panoptic_val.json").read_text())
    instances = json.loads((ade / "ade20k_instance_val.json").read_text())
    assert [image["id"] for image in panoptic["images"]] == ["ADE_val_00000001", "ADE_val_00000002"]
    assert panoptic["images"] == instances["images"]
    assert panoptic["images"][0] == dict(id="ADE_val_00000001", file_name="ADE_val_00000001.jpg", width=30, height=24)
    assert [annotation["id"] for annotation in instances["annotations"]] == list(range(1, 7))
    for index, entry in enumerate(panoptic["annotations"]):
        name = f"ADE_val_{index + 1:08d}"
        assert (entry["image_id"], entry["file_name"]) == (name, f"{name}.png")
        labels = np.array(Image.open(ade / "annotations" / "validation" / f"{name}.png")).astype(int)
        shifted = np.array(Image.open(ade / "annotations_detectron2" / "validation" / f"{name}.png")).astype(int)
        assert np.array_equal(shifted, np.where(labels == 0, 255, labels - 1))
        bed = np.zeros(SIZE, dtype=bool)
        bed[5:8, 2 + index : 9] = True
        flags = np.zeros((2, *SIZE), dtype=bool)
        flags[0, 8:14, 12:18], flags[1, 21:23, 3:5] = True, True
        expected = [(0, labels == 1), (3, labels == 4), (7, bed), (149, flags[0]), (149, flags[1])]
        # pixels: instances over stuff, unlabelled elsewhere, also where the label map alone has a thing
        segment_map = np.array(Image.open(ade / "ade20k_panoptic_val" / f"{name}.png")).astype(int)
        numbers = segment_map @ np.array([1, 256, 65536])
        assert len(entry["segments_info"]) == len(expected)
        classes = np.full(SIZE, 255)
        for label, mask in expected:
            classes[mask] = label
        by_number = {0: 255} | {segment["id"]: segment["category_id"] for segment in entry["segments_info"]}
        assert np.array_equal(np.vectorize(by_number.get)(numbers), classes)
        assert len(np.unique(numbers)) == len(expected) + 1
        for segment, (label, mask) in zip(entry["segments_info"], expected, strict=True):
            assert segment["category_id"] == label and segment["iscrowd"] == 0
            assert segment["area"] == mask.sum() and segment["bbox"] == box(mask)
        found = [annotation for annotation in instances["annotations"] if annotation["image_id"] == name]
        assert len(found) == 3
        for annotation, (label, mask) in zip(found, expected[2:], strict=True):
            assert annotation["category_id"] == label and annotation["iscrowd"] == 0
            assert np.array_equal(coco_mask.decode(annotation["segmentation"]), mask)
            assert annotation["area"] == mask.sum() and annotation["bbox"] == box(mask)

    before = content(ade)
    run(ade.parent, "ade20k")
    assert content(ade) == before
    (ade / "ade20k_panoptic_val.json").unlink()  # as after an interruption
    run(ade.parent, "ade20k")
    assert {path: data for path, (data, _) in content(ade).items()} == {
        path: data for path, (data, _) in before.items()
    }


def test_ade20k_without_instances_says_where_they_are_and_keeps_the_rest(ade, run):
    (ade / "annotations_instance" / "validation").rename(ade / "elsewhere")
    message = run(ade.parent, "ade20k", code=1)
    assert "annotations_instance.tar" in message and len(message.splitlines()) == 1
    assert len(list((ade / "annotations_detectron2" / "validation").iterdir())) == 2


def test_an_instance_with_two_classes_is_refused(ade, run):
    path = ade / "annotations_instance" / "validation" / "ADE_val_00000002.png"
    pixels = np.array(Image.open(path))
    pixels[5, 4, 0] = 9
    Image.fromarray(pixels).save(path)
    message = run(ade.parent, "ade20k", code=1)
    assert "ADE_val_00000002.png: instance 1 has classes [1, 9]" in message
    assert not (ade / "ade20k_instance_val.json").exists()


def test_classes_of_ade20k_are_mmdets():
    """Positions, too: mmdet takes the classes in the order of the file."""
    mmdet = pytest.importorskip("mmdet.datasets.ade20k", reason="mmdet is not installed")
    ordered = tuple(ade20k.NAMES[label] for label in (*ade20k.THINGS, *ade20k.STUFF))
    assert ordered == tuple(mmdet.ADE20KPanopticDataset.METAINFO["classes"])
    assert tuple(ade20k.THING_NAMES.values()) == tuple(mmdet.ADE20KInstanceDataset.METAINFO["classes"])


def test_classes_of_ade20k_are_mask2formers():
    try:
        import dinat_backbones.adapters.detectron2.maskformer_compat  # noqa: F401  # without its CUDA op, too
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    import mask2former.data.datasets.register_ade20k_instance as instance
    import mask2former.data.datasets.register_ade20k_panoptic as panoptic

    assert {category["id"]: category["name"] for category in instance.ADE_CATEGORIES} == ade20k.THING_NAMES
    for category in panoptic.ADE20K_150_CATEGORIES:
        assert category["isthing"] == (category["id"] in ade20k.THINGS)
        same = category["name"].strip() == ade20k.NAMES[category["id"]]
        assert same or category["name"] == "plane", category  # which mmdet calls airplane


# --------------------------------------------------------------------------------------------------------- Cityscapes


@pytest.fixture
def city(tmp_path):
    """A road, and a car on it."""
    folder = tmp_path / "cityscapes" / "gtFine" / "val" / "town"
    folder.mkdir(parents=True)
    corners = [[0, 0], [39, 0], [39, 19], [0, 19]]
    road = dict(label="road", polygon=corners)
    car = dict(label="car", polygon=[[5, 5], [14, 5], [14, 9], [5, 9]])
    polygons = dict(imgHeight=20, imgWidth=40, objects=[road, car])
    (folder / "town_000000_000000_gtFine_polygons.json").write_text(json.dumps(polygons))
    numbers = np.full((20, 40), 7, dtype=np.uint16)  # road is 7, the first car 26000
    numbers[5:10, 5:15] = 26000
    Image.fromarray(numbers).save(folder / "town_000000_000000_gtFine_instanceIds.png")
    return folder


def test_cityscapes(city, run):
    pytest.importorskip("cityscapesscripts", reason="cityscapesscripts is not installed: pip install cityscapesscripts")
    root = city.parents[3]
    run(root, "cityscapes")
    labels = np.array(Image.open(city / "town_000000_000000_gtFine_labelTrainIds.png"))
    expected = np.zeros((20, 40), dtype=int)
    expected[5:10, 5:15] = 13
    assert np.array_equal(labels, expected)
    base = city.parents[1]
    (entry,) = json.loads((base / "cityscapes_panoptic_val.json").read_text())["annotations"]
    assert sorted(segment["category_id"] for segment in entry["segments_info"]) == [7, 26]
    assert (base / "cityscapes_panoptic_val" / entry["file_name"]).exists()
    before = content(base)
    run(root, "cityscapes")
    assert content(base) == before


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("coco", "panoptic_val2017.json does not exist; get panoptic_annotations_trainval2017.zip"),
        ("ade20k", "ADEChallengeData2016 does not exist; get ADEChallengeData2016.zip"),
        ("cityscapes", "gtFine does not exist; get gtFine_trainvaltest.zip"),
    ],
)
def test_missing_downloads_are_named(tmp_path, dataset, words, run):
    message = run(tmp_path, dataset, code=1)
    assert words in message and len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "prepare_datasets.py"), "coco"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(DETECTRON2_DATASETS=str(tmp_path)))
    assert done.returncode == 1 and str(tmp_path / "coco" / "annotations") in done.stderr
