"""A small synthetic segmentation data set in the layouts of COCO, ADE20K and Cityscapes: rotated, overlapping shapes.

    dinat shapes OUT [--layout coco|coco-panoptic|ade20k|cityscapes ...] [--train N] [--val N] [--size PX] [--seed S]
                     [--replace]

| layout        | images                                 | annotations                                            |
|---------------|----------------------------------------|--------------------------------------------------------|
| coco          | OUT/{train,val}/*.jpg                  | OUT/annotations/instances_{train,val}.json             |
| coco-panoptic | OUT/{train,val}/*.jpg                  | OUT/annotations/panoptic_{train,val}.json, and *.png   |
|               |                                        | in the folders of that name                            |
| ade20k        | OUT/images/{training,validation}/*.jpg | OUT/annotations/{training,validation}/*.png            |
| cityscapes    | OUT/leftImg8bit/{train,val}/shapes/    | OUT/gtFine/{train,val}/shapes/                         |
|               | shapes_*_leftImg8bit.png               | shapes_*_gtFine_labelTrainIds.png                      |

Shapes are things and the background is stuff. In every layout the classes are `CLASSES` and then `BACKGROUND`, counted
from 1 in COCO and ADE20K (where 0 means unlabelled) and from 0 in Cityscapes. Classes differ in outline only, not in
colour or texture. The same arguments give the same bytes.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from .common import parallel_map, print_progress

CLASSES = ("circle", "triangle", "ring")
BACKGROUND = "background"
EXTENTS = dict(circle=0.85, triangle=1.2, ring=0.9)  # relative radii, for similar areas of all classes
LAYOUTS = ("coco", "coco-panoptic", "ade20k", "cityscapes")
FORMAT = 5  # to be increased when the same arguments give other data
OVERSAMPLING = 4  # outlines are drawn this much larger and averaged down
MIN_VISIBLE_FRACTION = 0.5  # a shape of which less is visible is left out of the scene
MIN_VISIBLE_PIXELS = 30
MIN_CONTRAST = 80.0  # between a shape's mean colour and what it is painted on, as a distance in RGB (0 to 441)


@dataclass(frozen=True)
class Scene:
    """One image and its instances.

    Attributes:
        image: ``[size, size, 3]`` uint8, RGB.
        instances: pairs of an index into `CLASSES` and the visible mask, ``[size, size]`` bool, from the rearmost shape
            to the foremost. Masks are disjoint; every shape that was painted is listed.
    """

    image: np.ndarray
    instances: list[tuple[int, np.ndarray]]


# Drawing


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw one scene of up to 5 shapes, from a fifth to over two thirds of `size` (pixels) across."""
    outlines = []
    for _ in range(rng.integers(2, 6)):
        label = int(rng.integers(len(CLASSES)))
        radius = size * EXTENTS[CLASSES[label]] * np.exp(rng.uniform(np.log(0.13), np.log(0.3)))
        outlines.append((label, _coverage(rng, CLASSES[label], radius, size)))

    # from the foremost to the rearmost, so that a shape left out does not hide anything itself
    covered = np.zeros((size, size), bool)
    kept = []
    for label, coverage in reversed(outlines):
        solid = coverage >= 0.5
        visible = solid & ~covered
        if visible.sum() >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_FRACTION * solid.sum()):
            covered |= solid
            kept.append((label, coverage, visible))
    kept.reverse()

    canvas = _texture(rng, size, rng.uniform(0, 255, 3))
    for _, coverage, _ in kept:
        colour = _contrasting_colour(rng, canvas[coverage >= 0.5].mean(0))
        alpha = coverage[..., None]
        canvas = canvas * (1 - alpha) + _texture(rng, size, colour) * alpha
    canvas += rng.normal(0, rng.uniform(0, 8), canvas.shape)
    image = canvas.clip(0, 255).round().astype(np.uint8)
    return Scene(image, [(label, visible) for label, _, visible in kept])


def _polygons(rng: np.random.Generator, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Outline of a class around the origin, ``[n, 2]``, at most 1 away from it, and that of its hole if it has one."""

    def regular(corners: int) -> np.ndarray:
        angles = np.arange(corners) * 2 * np.pi / corners
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    if name == "circle":
        return regular(48), None
    if name == "triangle":
        return regular(3), None
    if name == "ring":
        return regular(48), regular(48) * rng.uniform(0.5, 0.65)
    raise ValueError(f"unknown shape {name!r}; expected one of {CLASSES}")


def _coverage(rng: np.random.Generator, name: str, radius: float, size: int) -> np.ndarray:
    """The fraction of each pixel that a randomly placed and rotated shape covers: ``[size, size]`` float32 in 0..1."""
    angle, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # mostly inside the image; the margin is smaller than the radius so that borders cut some shapes
    centre = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
    large = Image.new("L", (size * OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(large)
    for outline, value in zip(_polygons(rng, name), (255, 0), strict=True):
        if outline is not None:
            points = ((outline * (1, squeeze)) @ turn.T * radius + centre) * OVERSAMPLING
            draw.polygon([tuple(point) for point in points.tolist()], fill=value)
    return np.asarray(large.reduce(OVERSAMPLING), np.float32) / 255


def _contrasting_colour(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """A random RGB colour at least `MIN_CONTRAST` away from `behind`."""
    while True:  # at least five of six colours are far enough from any given one
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - behind) >= MIN_CONTRAST:
            return colour


def _texture(rng: np.random.Generator, size: int, colour: np.ndarray) -> np.ndarray:
    """``[size, size, 3]`` float32 around `colour`: plain, gradient, stripes, checks or blotches."""
    pattern_name = rng.choice(["plain", "gradient", "stripes", "checks", "blotches"])
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.04, 0.15) * size
    amplitude = rng.uniform(-15, 15, 3)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if pattern_name == "plain":
        pattern = np.zeros_like(x)
    elif pattern_name == "gradient":
        pattern = 2 * (along - along.min()) / np.ptp(along) - 1
    elif pattern_name == "stripes":
        pattern = np.sin(2 * np.pi * along / period)
    elif pattern_name == "checks":
        pattern = np.sign(np.sin(np.pi * along / period) * np.sin(np.pi * across / period))
    else:
        cells = int(rng.integers(3, 12))
        coarse = Image.fromarray(rng.uniform(-1.5, 1.5, (cells, cells)).astype(np.float32))
        pattern = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return (colour + pattern[..., None] * amplitude).astype(np.float32)


# Writing


def scene(split: str, index: int, size: int, seed: int) -> Scene:
    """Scene number `index` of a split ("train" or "val"); it depends on these arguments only."""
    return draw_scene(np.random.default_rng([seed, ["train", "val"].index(split), index]), size)


def _write_scene(folder: Path, layouts: Sequence[str], split: str, size: int, seed: int, index: int) -> list[dict]:
    """Write the files of one scene; returns its segments for the JSON files, the background (if any) last."""
    drawn = scene(split, index, size, seed)
    labels = np.full((size, size), len(CLASSES), np.uint8)
    for label, mask in drawn.instances:
        labels[mask] = label
    masks = [*drawn.instances, (len(CLASSES), labels == len(CLASSES))]
    segments = [_segment(label, mask) for label, mask in masks if mask.any()]

    image = Image.fromarray(drawn.image)
    for path, expected in _files(folder, layouts, split, index).items():
        if expected is None:
            # JPEG for COCO and ADE20K, PNG for Cityscapes
            options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
            image.save(path, **options)
        elif expected == "coco-panoptic":
            numbers = np.zeros((size, size, 3), np.uint8)
            for number, (_, mask) in enumerate(masks, 1):
                numbers[mask] = (number, 0, 0)  # red + 256 green + 65536 blue is the segment's id
            Image.fromarray(numbers).save(path)
        else:
            Image.fromarray(labels + (expected == "ade20k")).save(path)
    return segments


def _segment(label: int, mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    area, bbox = int(coco_mask.area(encoded)), coco_mask.toBbox(encoded).tolist()
    rle = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return dict(category_id=label + 1, iscrowd=0, bbox=bbox, area=area, segmentation=rle)


def _files(folder: Path, layouts: Sequence[str], split: str, index: int) -> dict[Path, str | None]:
    """The files of one scene: an image (None) or the annotations of a layout."""
    name = f"{index:06d}"
    files: dict[Path, str | None] = {}
    if "coco" in layouts or "coco-panoptic" in layouts:
        files[folder / split / f"{name}.jpg"] = None
    if "coco-panoptic" in layouts:
        files[folder / "annotations" / f"panoptic_{split}" / f"{name}.png"] = "coco-panoptic"
    if "ade20k" in layouts:
        part = {"train": "training", "val": "validation"}[split]
        files[folder / "images" / part / f"{name}.jpg"] = None
        files[folder / "annotations" / part / f"{name}.png"] = "ade20k"
    if "cityscapes" in layouts:
        stem = f"shapes_{name}_000000"  # city, sequence, frame
        files[folder / "leftImg8bit" / split / "shapes" / f"{stem}_leftImg8bit.png"] = None
        files[folder / "gtFine" / split / "shapes" / f"{stem}_gtFine_labelTrainIds.png"] = "cityscapes"
    return files


def write_layouts(
    folder: Path,
    layouts: Sequence[str],
    counts: dict[str, int],
    size: int,
    seed: int,
    progress: Callable[[str], None],
) -> None:
    """Write the scenes of all splits into the existing `folder`."""
    workers = min(8, os.cpu_count() or 1)
    for split, count in counts.items():
        for path in _files(folder, layouts, split, 0):
            path.parent.mkdir(parents=True, exist_ok=True)
        write = partial(_write_scene, folder, layouts, split, size, seed)
        scenes = parallel_map(write, range(count), f"drawing {split}", workers, progress)
        images = [dict(id=i + 1, file_name=f"{i:06d}.jpg", width=size, height=size) for i in range(count)]
        if "coco" in layouts:
            _write_json(folder, f"instances_{split}", images, _instances(scenes), _categories()[:-1])
        if "coco-panoptic" in layouts:
            things = [category | dict(isthing=int(category["name"] != BACKGROUND)) for category in _categories()]
            _write_json(folder, f"panoptic_{split}", images, _panoptic(scenes), things)


def _categories() -> list[dict]:
    return [dict(id=i, name=name, supercategory="shape") for i, name in enumerate((*CLASSES, BACKGROUND), 1)]


def _instances(scenes: list[list[dict]]) -> list[dict]:
    things = [
        dict(image_id=image_id, **segment)
        for image_id, segments in enumerate(scenes, 1)
        for segment in segments
        if segment["category_id"] <= len(CLASSES)
    ]
    return [dict(id=i, **thing) for i, thing in enumerate(things, 1)]


def _panoptic(scenes: list[list[dict]]) -> list[dict]:
    annotations = []
    for image_id, segments in enumerate(scenes, 1):
        infos = [{"id": i} | segment for i, segment in enumerate(segments, 1)]
        for info in infos:
            del info["segmentation"]  # it is in the PNG
        annotations.append(dict(image_id=image_id, file_name=f"{image_id - 1:06d}.png", segments_info=infos))
    return annotations


def _write_json(folder: Path, name: str, images: list, annotations: list, categories: list) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))


def make_shapes(
    out: str | Path,
    train: int = 2000,
    val: int = 200,
    size: int = 160,
    seed: int = 0,
    *,
    layouts: Sequence[str] = ("coco",),
    replace: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> bool:
    """Write the dataset into the folder `out`, completely or not at all.

    Args:
        out: the folder to make, with its parents.
        train, val: number of images.
        size: height and width of the images, in pixels.
        seed: of the random numbers.
        layouts: any of `LAYOUTS`.
        replace: replace a dataset made with other arguments instead of raising an error.
        progress: called with a line of text about 20 times per split.

    Returns:
        Whether anything was written; False if `out` already holds this dataset (possibly in further layouts, too).

    Raises:
        ValueError: an argument out of its range.
        FileExistsError: `out` holds something else, or shapes made with other arguments and not `replace`.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, 32), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: expected an integer of at least {least}")
    if not layouts or not set(layouts) <= set(LAYOUTS):
        raise ValueError(f"layouts={list(layouts)}: expected some of {', '.join(LAYOUTS)}")
    layouts = [name for name in LAYOUTS if name in layouts]
    out = Path(out)
    wanted = dict(train=train, val=val, size=size, seed=seed, format=FORMAT)
    stamp = out / "shapes.json"
    if stamp.is_file():
        present = json.loads(stamp.read_text())
        there = present.pop("layouts", ["coco"])
        if present == wanted and set(layouts) <= set(there):
            return False
        if not replace:
            raise FileExistsError(
                f"{out} holds shapes made with {present} as {', '.join(there)}, not {wanted} as {', '.join(layouts)}; "
                "name another folder or add --replace"
            )
    elif out.exists():
        raise FileExistsError(f"{out} exists and does not hold shapes; name another folder")

    partial_folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # of a run that was killed outright
    partial_folder.mkdir(parents=True)
    try:
        write_layouts(partial_folder, layouts, dict(train=train, val=val), size, seed, progress)
        (partial_folder / stamp.name).write_text(json.dumps(wanted | dict(layouts=layouts)))
        shutil.rmtree(out, ignore_errors=True)
        partial_folder.rename(out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=2000, help="number of training images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="number of validation images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=160, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")
    parser.add_argument(
        "--layout", dest="layouts", nargs="+", choices=LAYOUTS, default=["coco"], help="one or more (default: coco)"
    )
    parser.add_argument("--replace", action="store_true", help="replace a dataset made with other arguments")
    args = parser.parse_args(arguments)
    try:
        written = make_shapes(**vars(args), progress=print_progress)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    counts = f"{args.train} training and {args.val} validation images of {args.size}x{args.size}"
    print(f"{args.out}: {counts}, {'written' if written else 'already there'}")
