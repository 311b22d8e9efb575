#!/usr/bin/env python
"""Train, evaluate and draw a small Mask R-CNN with DiNAT on generated shapes: `python tools/demo.py [--restart]`.

Everything lands in work_dirs/demo. An interrupted run goes on from its last checkpoint, a finished one is only drawn
anew. It is an error if the mask AP50 on the validation images stays below `REQUIRED_AP50`.
"""

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from make_shapes import FORMAT, make_shapes, print_progress
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/demo/mask_rcnn_dinat_shapes.py")
FOLDER = Path("work_dirs/demo")
TRAINING = FOLDER / "training"
DATA = FOLDER / "shapes"  # CONFIG reads it there
SHAPES = dict(train=2000, val=200, size=160, seed=0)
REQUIRED_AP50 = 0.60
SHOWN_IMAGES = 8
SHOWN_SCORE = 0.5


def main() -> None:
    """Do what is still to be done of: data, training, evaluation, picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restart", action="store_true", help="throw the last training away and start afresh")
    restart = parser.parse_args().restart
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # lets `_run` stop its command
    os.chdir(ROOT)
    FOLDER.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        with _sole_run() as lock:
            metrics = _demo(restart, lock)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last checkpoint")
    print(f"\n       {'AP':>6} {'AP50':>6}   on {SHAPES['val']} unseen images")
    for name, key in (("boxes", "bbox"), ("masks", "segm")):
        print(f"{name:6} {metrics[f'coco/{key}_mAP']:6.3f} {metrics[f'coco/{key}_mAP_50']:6.3f}")
    print(f"picture: {FOLDER / 'demo.png'}\ntime of this run: {time.monotonic() - start:.0f} s")
    if metrics["coco/segm_mAP_50"] < REQUIRED_AP50:
        reached = metrics["coco/segm_mAP_50"]
        sys.exit(f"mask AP50 is {reached:.3f}, below the {REQUIRED_AP50:.2f} that this demo must reach")


def _demo(restart: bool, lock: int) -> dict[str, float]:
    written = make_shapes(DATA, **SHAPES, replace=True, progress=print_progress)
    counts = f"{SHAPES['train']} training and {SHAPES['val']} validation images"
    print(f"data: {counts} in {DATA}{'' if written else ' (already there)'}")

    recipe = hashlib.sha256(CONFIG.read_bytes() + repr((SHAPES, FORMAT)).encode()).hexdigest()
    mark = TRAINING / "recipe.txt"
    if TRAINING.exists() and (restart or not mark.is_file() or mark.read_text() != recipe):
        print("starting afresh" + ("" if restart else ": the recipe has changed since the last run"))
        shutil.rmtree(TRAINING)
    TRAINING.mkdir(exist_ok=True)
    mark.write_text(recipe)

    metrics_file = TRAINING / "metrics.json"
    predictions_file = TRAINING / "predictions.pkl"
    if metrics_file.is_file():
        print("training and evaluation are finished; only drawing again (--restart trains afresh)")
    else:
        if not (TRAINING / "trained").is_file():
            resumed = _last_checkpoint()
            print(f"training, resumed from {resumed}" if resumed else "training")
            # evaluated just once, by the command after this one, which also keeps the predictions
            options = ["--resume", "--cfg-options", "train_cfg.val_interval=1000"]
            _run(lock, "tools/train.py", CONFIG, "--work-dir", TRAINING, *options)
            (TRAINING / "trained").touch()
        print("evaluation")
        results = TRAINING / "evaluation"
        shutil.rmtree(results, ignore_errors=True)
        _run(lock, "tools/test.py", CONFIG, _last_checkpoint(), "--work-dir", results, "--out", predictions_file)
        (found,) = results.glob("*/*.json")
        shutil.copy(found, metrics_file.with_suffix(".partial"))
        metrics_file.with_suffix(".partial").rename(metrics_file)
    metrics = json.loads(metrics_file.read_text())
    # written by the command above; a pickle of someone else's should not be opened like this
    predictions = pickle.loads(predictions_file.read_bytes())
    draw(predictions, FOLDER / "demo.png", metrics)
    return metrics


def _last_checkpoint() -> Path | None:
    pointer = TRAINING / "last_checkpoint"  # mmengine writes it after each checkpoint
    return TRAINING / Path(pointer.read_text().strip()).name if pointer.is_file() else None


@contextlib.contextmanager
def _sole_run() -> Iterator[int]:
    """Hold a lock that started commands inherit, so that it also outlives a demo that is killed outright."""
    with open(FOLDER / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another demo, or the training it started, is still at work in {FOLDER}; wait for it or stop it")
        yield lock.fileno()


def _run(lock: int, *command: Any) -> None:
    """Run a Python command, showing what tells its progress; mmengine keeps the full log in its work folder."""
    words = [sys.executable, "-u", *map(str, command)]
    tail: collections.deque[str] = collections.deque(maxlen=30)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=[lock])
    try:
        for line in process.stdout:
            tail.append(line)
            if " Epoch(" in line or "Average Precision" in line:
                print(f"  {' '.join(line.rpartition(' INFO - ')[2].split())}", flush=True)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if status:
        print("".join(tail))
        sys.exit(f"`{' '.join(words)}` failed with status {status}; its last lines are above")


def draw(predictions: list[dict], path: Path, metrics: dict[str, float]) -> None:
    """Draw the first validation images to `path` (PNG): ground truth to the left, predictions to the right of it.

    Args:
        predictions: what mmdet's test script writes with `--out`.
        path: the picture.
        metrics: of mmdet's CocoMetric, for the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    truth = json.loads((DATA / "annotations" / "instances_val.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    colours = dict(zip(names, plt.get_cmap("Dark2").colors, strict=False))
    ids = list(names)
    annotations = collections.defaultdict(list)
    for annotation in truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        box = (x, y, x + width, y + height)
        annotations[annotation["image_id"]].append((annotation["category_id"], box, annotation["segmentation"], None))
    predicted = {sample["img_id"]: sample["pred_instances"] for sample in predictions}

    rows = SHOWN_IMAGES // 2
    figure, axes = plt.subplots(rows, 4, figsize=(14, 3.5 * rows + 1.2), layout="constrained", squeeze=False)
    for axis, heading in zip(axes[0], ("ground truth", "prediction") * 2, strict=True):
        axis.set_title(heading, fontsize=14)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, image in enumerate(truth["images"][:SHOWN_IMAGES]):
        left, right = axes[index // 2, index % 2 * 2 :][:2]
        pixels = plt.imread(DATA / "val" / image["file_name"])
        found = predicted[image["id"]]
        shown = [
            (ids[int(label)], box.tolist(), mask, float(score))
            for label, box, mask, score in zip(
                found["labels"], found["bboxes"], found["masks"], found["scores"], strict=True
            )
            if score >= SHOWN_SCORE
        ]
        for axis, instances in ((left, annotations[image["id"]]), (right, shown)):
            _draw_instances(axis, pixels, instances, names, colours)
    legend = [Patch(color=colours[i], label=names[i]) for i in names]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(names), fontsize=13, frameon=False)
    figure.suptitle(
        "Mask R-CNN with DiNAT, trained from scratch, on images it has not seen\n"
        f"mask AP {metrics['coco/segm_mAP']:.2f}, AP50 {metrics['coco/segm_mAP_50']:.2f}; "
        f"box AP {metrics['coco/bbox_mAP']:.2f}, AP50 {metrics['coco/bbox_mAP_50']:.2f}; "
        f"predictions with a score of at least {SHOWN_SCORE}",
        fontsize=15,
    )
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=100)
    plt.close(figure)
    partial.rename(path)


def _draw_instances(axis, pixels: np.ndarray, instances: list, names: dict, colours: dict) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(pixels, interpolation="bilinear")
    for category, (x1, y1, x2, y2), rle, score in instances:
        mask, colour = coco_mask.decode(rle), colours[category]
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask > 0] = (*colour, 0.4)
        axis.imshow(overlay, interpolation="nearest")
        bounds = (-1, mask.shape[1], -1, mask.shape[0])  # closes the outline of a mask that touches the border
        axis.contour(np.pad(mask, 1), [0.5], colors=["white"], linewidths=1, extent=bounds)
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        label = names[category] if score is None else f"{names[category]} {score:.2f}"
        plate = dict(facecolor=colour, edgecolor="none", pad=1, alpha=0.85)
        # labels grow inwards at the right border
        x, side = (x1, "left") if x1 < 0.7 * mask.shape[1] else (x2, "right")
        axis.text(x, max(y1 - 1.5, 6), label, fontsize=9, color="white", ha=side, va="bottom", clip_on=True, bbox=plate)
    axis.set(xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))


if __name__ == "__main__":
    main()
