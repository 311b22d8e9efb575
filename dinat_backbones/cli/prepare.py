"""Make the files that Mask2Former reads and the downloads of COCO, ADE20K and Cityscapes do not have:

    dinat prepare coco|ade20k|cityscapes ... [--root DIR] [--split train|val ...] [--workers N]

| data set   | read                                          | written                                            |
|------------|-----------------------------------------------|----------------------------------------------------|
| coco       | annotations/panoptic_*2017.json and the       | panoptic_semseg_*2017/: label maps of all 133      |
|            | folders panoptic_*2017/                       | classes in the order of the file                   |
| ade20k     | annotations/, images/, annotations_instance/  | annotations_detectron2/: label maps from 0;        |
|            |                                               | ade20k_instance_*.json; ade20k_panoptic_*.json and |
|            |                                               | the folders of that name                           |
| cityscapes | gtFine/                                       | *_labelTrainIds.png beside the annotations;        |
|            |                                               | gtFine/cityscapes_panoptic_*.json and the folders  |
|            |                                               | of that name. Needs `pip install cityscapesscripts`|

DIR holds coco/, ADEChallengeData2016/ (or ade/ADEChallengeData2016/) and cityscapes/; by default it is
$DETECTRON2_DATASETS, and `datasets` without that. In label maps 255 means unlabelled. Existing files are kept,
so an interrupted run continues where it stopped; every file is complete or absent.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ..files import atomic_write
from ..zoo import ade20k
from .common import parallel_map, stop

UNLABELLED = 255
DATASETS = ("coco", "ade20k", "cityscapes")
SPLITS = ("train", "val")
ADE_FOLDERS = {"train": "training", "val": "validation"}
ADE_INSTANCES = "http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar"


# ----------------------------------------------------------------------------------------- files


def save_image(array: np.ndarray, path: Path) -> None:
    with atomic_write(path) as name:
        Image.fromarray(array).save(name)


def save_json(content: dict, path: Path) -> None:
    with atomic_write(path) as name:
        name.write_text(json.dumps(content))


def require_path(path: Path, advice: str) -> Path:
    """`path` if it exists, else a FileNotFoundError whose message ends with `advice`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {advice}")
    return path


# --------------------------------------------------------------------------------------------------------------- COCO


def coco(root: Path, split: str, workers: int) -> None:
    """Label maps of things and stuff from the panoptic annotations."""
    advice = "get panoptic_annotations_trainval2017.zip from https://cocodataset.org/#download and unpack it here"
    annotations = require_path(root / "coco" / "annotations" / f"panoptic_{split}2017.json", advice)
    folders = [root / "coco" / f"panoptic_{split}2017", annotations.with_suffix("")]
    source = next((folder for folder in folders if folder.is_dir()), None)
    if source is None:
        raise FileNotFoundError(f"neither {folders[0]} nor {folders[1]} exists; unpack the archive of that name")
    panoptic_to_semantic(annotations, source, root / "coco" / f"panoptic_semseg_{split}2017", workers)


def panoptic_to_semantic(annotations: Path, source: Path, target: Path, workers: int = 1) -> None:
    """Write a label map for each image of panoptic annotations.

    Args:
        annotations: in COCO's panoptic format.
        source: folder of its images.
        target: folder for 8-bit images of the same names; a pixel is the index of its class in "categories", 255 if
            it is unlabelled.
        workers: number of processes.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: annotations of another format, a segment that they do not list, or more than 255 classes.
    """
    content = read_panoptic(annotations)
    labels = {category["id"]: i for i, category in enumerate(content["categories"])}
    if len(labels) > UNLABELLED:
        raise ValueError(f"{annotations} has {len(labels)} classes; expected at most {UNLABELLED}")
    left = [entry for entry in content["annotations"] if not (target / entry["file_name"]).exists()]
    parallel_map(partial(_semantic, source, target, labels), left, f"{target.name}", workers)


def read_panoptic(path: Path) -> dict:
    """Annotations in COCO's panoptic format; ValueError, naming the file, if they lack what label maps are made of."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); unpack it anew") from None
    try:
        known = {category["id"] for category in content["categories"]}
        for entry in content["annotations"]:
            name = entry["file_name"]
            categories = {segment["id"]: segment["category_id"] for segment in entry["segments_info"]}
            if unlisted := set(categories.values()) - known:
                raise ValueError(f"{path}: {name} has segments of unlisted categories {sorted(unlisted)}")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not in COCO's panoptic format ({type(error).__name__}: {error}); expected categories with ids, "
            "and annotations with a file_name and segments_info"
        ) from None
    return content


def _semantic(source: Path, target: Path, labels: dict[int, int], entry: dict) -> None:
    path = require_path(source / entry["file_name"], "unpack the images that belong to the annotations")
    colours = np.asarray(Image.open(path).convert("RGB"), dtype=np.uint32)
    ids, positions = np.unique(colours @ np.array([1, 256, 65536], dtype=np.uint32), return_inverse=True)
    classes = {segment["id"]: labels[segment["category_id"]] for segment in entry["segments_info"]} | {0: UNLABELLED}
    if unknown := set(ids.tolist()) - set(classes):
        raise ValueError(f"{path} has the segments {sorted(unknown)[:3]}, which its annotations do not list")
    table = np.array([classes[i] for i in ids.tolist()], dtype=np.uint8)
    save_image(table[positions].reshape(colours.shape[:2]), target / entry["file_name"])


# ------------------------------------------------------------------------------------------------------------- ADE20K


def ade(root: Path, split: str, workers: int) -> None:
    """Label maps that start at 0; instance and panoptic annotations."""
    folders = [root / "ADEChallengeData2016", root / "ade" / "ADEChallengeData2016"]
    advice = "get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu and unpack it here"
    base = require_path(next((folder for folder in folders if folder.is_dir()), folders[0]), advice)
    part = ADE_FOLDERS[split]
    maps = sorted(require_path(base / "annotations" / part, advice).glob("*.png"))
    target = base / "annotations_detectron2" / part
    left = [path for path in maps if not (target / path.name).exists()]
    parallel_map(partial(_from_zero, target), left, f"{target.parent.name}/{part}", workers)

    require_path(base / "annotations_instance" / part, f"get {ADE_INSTANCES} and unpack it here")
    names = sorted(path.stem for path in require_path(base / "images" / part, advice).glob("*.jpg"))
    instances = base / f"ade20k_instance_{split}.json"
    if not instances.exists():
        found = parallel_map(partial(_ade_instances, base, part), names, instances.stem, workers)
        categories = [dict(id=label, name=name) for label, name in ade20k.THING_NAMES.items()]
        annotations = [annotation for _, annotations in found for annotation in annotations]
        numbered = [dict(id=i) | annotation for i, annotation in enumerate(annotations, 1)]
        images = [image for image, _ in found]
        save_json(dict(images=images, annotations=numbered, categories=categories), instances)
    panoptic = base / f"ade20k_panoptic_{split}.json"
    if not panoptic.exists():
        found = parallel_map(
            partial(_ade_panoptic, base, part, panoptic.with_suffix("")), names, panoptic.stem, workers
        )
        # detectron2 reads the ids, mmdet relies on this order: things first
        categories = [
            dict(id=label, name=ade20k.NAMES[label], isthing=int(label in ade20k.THINGS))
            for label in (*ade20k.THINGS, *ade20k.STUFF)
        ]
        images, annotations = map(list, zip(*found, strict=True))
        save_json(dict(images=images, annotations=annotations, categories=categories), panoptic)


def _from_zero(target: Path, path: Path) -> None:
    save_image(np.asarray(Image.open(path)) - np.uint8(1), target / path.name)  # 0, which is unlabelled, becomes 255


def _ade_image(base: Path, folder: str, name: str) -> dict:
    with Image.open(base / "images" / folder / f"{name}.jpg") as image:
        return dict(id=name, file_name=f"{name}.jpg", width=image.width, height=image.height)


def _ade_things(base: Path, folder: str, name: str) -> list[tuple[int, np.ndarray]]:
    """Label and bool mask ``[H, W]`` of each instance; red is the class, from 1, green the instance number."""
    path = require_path(
        base / "annotations_instance" / folder / f"{name}.png", f"get {ADE_INSTANCES} and unpack it here"
    )
    classes, numbers, _ = np.moveaxis(np.asarray(Image.open(path).convert("RGB")), -1, 0)
    things = []
    for number in np.unique(numbers[numbers > 0]):
        mask = numbers == number
        found = np.unique(classes[mask]).tolist()
        if len(found) > 1 or not 1 <= found[0] <= len(ade20k.THINGS):
            raise ValueError(f"{path}: instance {number} has classes {found}; expected one from 1 to 100")
        things.append((ade20k.THINGS[found[0] - 1], mask))
    return things


def _measures(mask: np.ndarray) -> dict:
    """Area and box of a mask in COCO's format: pixels; left, top, width, height."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(area=int(coco_mask.area(rle)), bbox=[int(side) for side in coco_mask.toBbox(rle)], iscrowd=0)


def _ade_instances(base: Path, folder: str, name: str) -> tuple[dict, list[dict]]:
    annotations = []
    for label, mask in _ade_things(base, folder, name):
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        rle["counts"] = rle["counts"].decode()
        annotations.append(dict(image_id=name, category_id=label, segmentation=rle) | _measures(mask))
    return _ade_image(base, folder, name), annotations


def _ade_panoptic(base: Path, folder: str, target: Path, name: str) -> tuple[dict, dict]:
    """The stuff of the label map, and the instances drawn over it.

    The area and box of a stuff segment include what instances cover, as in Mask2Former's annotations.
    """
    labels = np.asarray(Image.open(base / "annotations" / folder / f"{name}.png")).astype(int) - 1
    stuff = [(label, labels == label) for label in np.unique(labels).tolist() if label in ade20k.STUFF]
    segment_map = np.zeros((*labels.shape, 3), dtype=np.uint8)
    segments = []
    for number, (label, mask) in enumerate(stuff + _ade_things(base, folder, name), 1):
        segment_map[mask] = (number % 256, number // 256, 0)
        segments.append(dict(id=number, category_id=label) | _measures(mask))
    save_image(segment_map, target / f"{name}.png")
    image = _ade_image(base, folder, name)
    return image, dict(image_id=name, file_name=f"{name}.png", segments_info=segments)


# --------------------------------------------------------------------------------------------------------- Cityscapes


def cityscapes(root: Path, split: str, workers: int) -> None:
    """Label maps of the 19 classes and panoptic annotations, made by the data set's own cityscapesscripts."""
    advice = "get gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads and unpack it here"
    base = require_path(root / "cityscapes" / "gtFine", advice)
    polygons = sorted(require_path(base / split, advice).glob("*/*_gtFine_polygons.json"))
    try:
        from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Cityscapes needs its own tools ({error}): pip install cityscapesscripts") from error
    left = [path for path in polygons if not _train_ids(path).exists()]
    parallel_map(_label_train_ids, left, f"gtFine/{split}/*_labelTrainIds.png", workers)
    annotations = base / f"cityscapes_panoptic_{split}.json"
    if not annotations.exists():
        if not any((base / split).glob("*/*_gtFine_instanceIds.png")):
            raise FileNotFoundError(f"no */*_gtFine_instanceIds.png in {base / split}; {advice}")
        unfinished = base / f".{annotations.stem}.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            convert2panoptic(str(base), str(unfinished), False, [split])
            shutil.rmtree(annotations.with_suffix(""), ignore_errors=True)
            os.replace(unfinished / annotations.stem, annotations.with_suffix(""))
            os.replace(unfinished / annotations.name, annotations)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _train_ids(polygons: Path) -> Path:
    return polygons.with_name(polygons.name.replace("_polygons.json", "_labelTrainIds.png"))


def _label_train_ids(polygons: Path) -> None:
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    with atomic_write(_train_ids(polygons)) as name:
        json2labelImg(str(polygons), str(name), "trainIds")


# ------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", choices=DATASETS)
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    parser.add_argument("--root", type=Path, default=root, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="default: both")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    for name in args.datasets:
        for split in args.split:
            try:
                {"coco": coco, "ade20k": ade, "cityscapes": cityscapes}[name](
                    args.root.expanduser(), split, args.workers
                )
            except (OSError, ValueError, ModuleNotFoundError) as error:
                stop(str(error))
            print(f"{name} {split}: complete", flush=True)
