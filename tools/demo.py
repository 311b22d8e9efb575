#!/usr/bin/env python
"""Train, evaluate and draw a small model with DiNAT on generated shapes:

    python tools/demo.py [mask-rcnn|cascade-mask-rcnn|upernet|mask2former|panoptic] [--restart]

All but `panoptic`, which is Mask2Former in Detectron2, are models of OpenMMLab. The image,
work_dirs/demo/MODEL.png, has annotations beside predictions. An interrupted run continues from its last checkpoint, a
finished one is only drawn again. The exit status is 1 if the metric stays below the bar in `DEMOS`.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from demo_frameworks import Detectron2, Framework, OpenMMLab, Segment
from pycocotools import mask as coco_mask

from dinat_backbones.cli.common import print_progress
from dinat_backbones.cli.shapes import CLASSES, FORMAT, make_shapes
from dinat_backbones.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("work_dirs/demo")
SHAPES = dict(val=200, seed=0)
SHOWN_IMAGES = 8


@dataclass(frozen=True)
class Demo:
    """One of the models.

    Attributes:
        title: for the image.
        metrics: what is printed, by its name in the framework's metrics; the first one has to reach `required`.
        required: in the units of the framework: AP is a fraction in OpenMMLab, all else is in percent.
        size, images: the size of the images in pixels, and the number to train on.
        framework: what trains it.
    """

    title: str
    metrics: dict[str, str]
    required: float
    size: int
    images: int
    framework: Framework = field(default_factory=OpenMMLab)

    @property
    def data(self) -> Path:
        """The shapes, where the config reads them, too."""
        return FOLDER / self.framework.data.format(size=self.size)


BOXES_AND_MASKS = {
    "coco/segm_mAP_50": "mask AP50",
    "coco/segm_mAP": "mask AP",
    "coco/bbox_mAP_50": "box AP50",
    "coco/bbox_mAP": "box AP",
}
DEMOS = {
    "mask-rcnn": Demo("Mask R-CNN with DiNAT", BOXES_AND_MASKS, 0.70, 160, 1000),
    "cascade-mask-rcnn": Demo("Cascade Mask R-CNN with DiNAT", BOXES_AND_MASKS, 0.60, 160, 1000),
    "upernet": Demo(
        "UPerNet with DiNAT",
        {name: name for name in ("mIoU", "mAcc", "aAcc")},
        70.0,
        96,
        2000,
        OpenMMLab("predictions"),
    ),
    "mask2former": Demo(
        "Mask2Former with DiNAT",
        {f"coco_panoptic/{name}": name for name in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")},
        45.0,
        96,
        2000,
    ),
    "panoptic": Demo(
        "Mask2Former with DiNAT in Detectron2",
        {
            "panoptic_seg/PQ": "PQ",
            "panoptic_seg/PQ_th": "PQ_th",
            "segm/AP": "mask AP",
            "segm/AP50": "mask AP50",
            "sem_seg/mIoU": "mIoU",
        },
        35.0,  # background alone would give 25
        96,
        2000,
        Detectron2(),
    ),
}


def main() -> None:
    """Make the data, train, evaluate and draw, skipping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=DEMOS, default="mask-rcnn", help="default: %(default)s")
    parser.add_argument("--restart", action="store_true", help="delete the last training and start again")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # lets `_run` stop its command
    os.chdir(ROOT)
    FOLDER.mkdir(parents=True, exist_ok=True)
    demo, image = DEMOS[args.model], FOLDER / f"{args.model}.png"
    start = time.monotonic()
    try:
        with _exclusive_run() as lock:
            training = FOLDER / args.model
            config = Path(demo.framework.config.format(model=args.model))
            metrics = _train_and_evaluate(demo, config, training, args.restart, lock)
            draw(demo.framework.predictions(config, training, demo.data, SHOWN_IMAGES), image, demo, metrics)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command continues from the last checkpoint")
    print(f"\non {SHAPES['val']} unseen images:")
    for key, name in demo.metrics.items():
        print(f"{name:>10} {metrics[key]:6.3f}")
    print(f"image: {image}\ntime of this run: {time.monotonic() - start:.0f} s")
    key, name = next(iter(demo.metrics.items()))
    if metrics[key] < demo.required:
        sys.exit(f"{name} is {metrics[key]:.3f}, below the {demo.required:.2f} that this demo must reach")


# One folder per model holds what the framework writes (checkpoints, logs), the predictions and these.
METRICS = "metrics.json"
TRAINED = "trained"
RECIPE = "recipe.txt"


def _train_and_evaluate(demo: Demo, config: Path, training: Path, restart: bool, lock: int) -> dict[str, float]:
    framework = demo.framework
    arguments = dict(SHAPES, size=demo.size, train=demo.images, layouts=framework.layouts)
    written = make_shapes(demo.data, **arguments, replace=True, progress=print_progress)
    counts = f"{demo.images} training and {SHAPES['val']} validation images"
    print(f"data: {counts} in {demo.data}{'' if written else ' (already there)'}")

    recipe = hashlib.sha256(repr((framework.settings(config), arguments, FORMAT)).encode()).hexdigest()
    recipe_file = training / RECIPE
    if training.exists() and (restart or not recipe_file.is_file() or recipe_file.read_text() != recipe):
        print("starting again" + ("" if restart else ": the recipe has changed since the last run"))
        shutil.rmtree(training)
    training.mkdir(exist_ok=True)
    recipe_file.write_text(recipe)

    if (training / METRICS).is_file():
        print("training and evaluation are finished; only drawing again (--restart trains again)")
    else:
        if not (training / TRAINED).is_file():
            resumed = framework.last_checkpoint(training)
            print(f"training, resumed from {resumed}" if resumed else "training")
            framework.train(config, training, demo.data, lock)
            (training / TRAINED).touch()
        print("evaluation")
        metrics = framework.evaluate(config, training, demo.data, lock)
        with atomic_write(training / METRICS) as partial:
            partial.write_text(json.dumps(metrics))
    return json.loads((training / METRICS).read_text())


@contextlib.contextmanager
def _exclusive_run() -> Iterator[int]:
    """Hold a lock that the started commands inherit, so that it is held as long as one of them runs, even if the demo
    was killed."""
    with open(FOLDER / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another demo, or the training it started, is running in {FOLDER}; wait for it or stop it")
        yield lock.fileno()


# The image


def draw(predictions: list[list[Segment]], path: Path, demo: Demo, metrics: dict[str, float]) -> None:
    """Draw the first validation images to `path` (PNG): annotations to the left, predictions to the right of it.

    Args:
        predictions: of the first validation images.
        path: the image.
        demo: which one it is.
        metrics: for the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    colours = plt.get_cmap("Dark2").colors
    rows = SHOWN_IMAGES // 2
    figure, axes = plt.subplots(rows, 4, figsize=(14, 3.5 * rows + 1.2), layout="constrained", squeeze=False)
    for axis, heading in zip(axes[0], ("annotations", "prediction") * 2, strict=True):
        axis.set_title(heading, fontsize=14)
    for axis in axes.flat:
        axis.set_axis_off()
    shown = zip(_annotated(demo.data), predictions, strict=True)
    for index, ((file, true), found) in enumerate(shown):
        pair, pixels = axes[index // 2, index % 2 * 2 :][:2], plt.imread(file)
        for axis, segments in zip(pair, (true, found), strict=True):
            _draw_segments(axis, pixels, segments, colours)
    legend = [Patch(color=colour, label=name) for colour, name in zip(colours, CLASSES, strict=False)]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=13, frameon=False)
    values = ", ".join(f"{name} {metrics[key]:.{2 if metrics[key] <= 1 else 1}f}" for key, name in demo.metrics.items())
    figure.suptitle(f"{demo.title}, trained from scratch, on images it has not seen\n{values}", fontsize=15)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)


def _annotated(data: Path) -> list[tuple[Path, list[Segment]]]:
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    shown = {image["id"]: (data / "val" / image["file_name"], []) for image in content["images"][:SHOWN_IMAGES]}
    for annotation in content["annotations"]:
        if annotation["image_id"] in shown:
            x, y, width, height = annotation["bbox"]
            mask, box = coco_mask.decode(annotation["segmentation"]), (x, y, x + width, y + height)
            shown[annotation["image_id"]][1].append(Segment(annotation["category_id"] - 1, mask, box))
    return list(shown.values())


def _draw_segments(axis, pixels: np.ndarray, segments: list[Segment], colours: tuple) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(pixels, interpolation="bilinear")
    for segment in segments:
        mask, colour, name = segment.mask, colours[segment.label], CLASSES[segment.label]
        if not mask.any():
            continue
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask > 0] = (*colour, 0.4)
        axis.imshow(overlay, interpolation="nearest")
        bounds = (-1, mask.shape[1], -1, mask.shape[0])  # closes the outline of a mask that touches the border
        axis.contour(np.pad(mask, 1), [0.5], colors=["white"], linewidths=1, extent=bounds)
        if segment.box is None:
            continue
        x1, y1, x2, y2 = segment.box
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        label = name if segment.score is None else f"{name} {segment.score:.2f}"
        plate = dict(facecolor=colour, edgecolor="none", pad=1, alpha=0.85)
        # labels grow inwards at the right border
        x, side = (x1, "left") if x1 < 0.7 * mask.shape[1] else (x2, "right")
        axis.text(x, max(y1 - 1.5, 6), label, fontsize=9, color="white", ha=side, va="bottom", clip_on=True, bbox=plate)
    axis.set(xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))


if __name__ == "__main__":
    main()
