"""The frameworks of tools/demo.py: train a config, evaluate it, return the predictions to draw."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from dinat_backbones.cli.common import load_config, stop
from dinat_backbones.cli.shapes import CLASSES

SHOWN_SCORE = 0.5


@dataclass(frozen=True)
class Segment:
    """What is drawn: an index into `CLASSES`, a mask ``[H, W]``, and for an instance its box (x1, y1, x2, y2)."""

    label: int
    mask: np.ndarray
    box: tuple[float, float, float, float] | None = None
    score: float | None = None


class Framework:
    """Both frameworks write a folder `training` with a file "last_checkpoint" that names the last one.

    Attributes:
        config: path of a demo's config, with {model}.
        data: where configs look for the shapes below work_dirs/demo, with {size}.
        layouts: of make_shapes.
    """

    config: ClassVar[str]
    data: ClassVar[str]
    layouts: ClassVar[Sequence[str]]

    def settings(self, config: Path) -> Any:
        """The whole config, base files included; its `repr` changes if and only if a setting does."""
        raise NotImplementedError

    def train(self, config: Path, training: Path, data: Path, lock: int) -> None:
        """Train, from the last checkpoint if there is one. Processes inherit the file descriptor `lock`."""
        raise NotImplementedError

    def evaluate(self, config: Path, training: Path, data: Path, lock: int) -> dict[str, float]:
        """Metrics of the last checkpoint by name, with a slash after a task's."""
        raise NotImplementedError

    def predictions(self, config: Path, training: Path, data: Path, number: int) -> list[list[Segment]]:
        """What is found in the first `number` validation images."""
        raise NotImplementedError

    def last_checkpoint(self, training: Path) -> Path | None:
        pointer = training / "last_checkpoint"
        return training / Path(pointer.read_text().strip()).name if pointer.is_file() else None


@dataclass(frozen=True)
class OpenMMLab(Framework):
    """`file` is the name for the test script's `--out`: a folder of label maps for a segmentor."""

    file: str = "predictions.pkl"

    config = "configs/demo/{model}_dinat_shapes.py"
    data = "shapes-{size}"
    layouts = ("coco", "coco-panoptic", "ade20k")

    def settings(self, config: Path) -> Any:
        return load_config(str(config), import_custom_modules=False).to_dict()

    def train(self, config: Path, training: Path, data: Path, lock: int) -> None:
        # evaluated just once, by `evaluate`, which also keeps the predictions
        options = ["--resume", "--cfg-options", "train_cfg.val_begin=1000"]
        _run(lock, _mmengine_progress, "tools/train.py", config, "--work-dir", training, *options)

    def evaluate(self, config: Path, training: Path, data: Path, lock: int) -> dict[str, float]:
        results = training / "evaluation"
        shutil.rmtree(results, ignore_errors=True)
        options = ["--work-dir", results, "--out", training / self.file]
        _run(lock, _mmengine_progress, "tools/test.py", config, self.last_checkpoint(training), *options)
        (found,) = results.glob("*/*.json")
        return json.loads(found.read_text())

    def predictions(self, config: Path, training: Path, data: Path, number: int) -> list[list[Segment]]:
        written = training / self.file
        if written.is_dir():  # label maps, where 0 is unlabelled
            maps = [np.asarray(Image.open(file)) for file in sorted(written.glob("*.png"))[:number]]
            return [[Segment(label, found == label + 1) for label in range(len(CLASSES))] for found in maps]
        # written by our own test command; other pickles are not safe to read
        samples = sorted(pickle.loads(written.read_bytes()), key=lambda sample: sample["img_id"])
        return [_found(sample) for sample in samples[:number]]


def _mmengine_progress(line: str) -> str | None:
    return line.rpartition(" INFO - ")[2] if " Epoch(" in line or "Average Precision" in line else None


def _found(sample: dict) -> list[Segment]:
    if "pred_panoptic_seg" in sample:
        panoptic = np.asarray(sample["pred_panoptic_seg"]["sem_seg"]).squeeze()
        numbers = np.unique(panoptic)
        # of a thing: its class and 1000 times its number
        return [Segment(int(n % 1000), panoptic == n) for n in numbers if n % 1000 < len(CLASSES)]
    found = sample["pred_instances"]
    columns = (found["labels"].tolist(), found["masks"], found["bboxes"].tolist(), found["scores"].tolist())
    return [
        Segment(label, coco_mask.decode(mask), tuple(box), score)
        for label, mask, box, score in zip(*columns, strict=True)
        if score >= SHOWN_SCORE
    ]


class Detectron2(Framework):
    """The trainer in mask2former/; on the CPU."""

    config = "mask2former/configs/demo/{model}_dinat_shapes.yaml"
    data = "detectron2/shapes"  # where its registration expects them below $DETECTRON2_DATASETS
    layouts = ("coco", "coco-panoptic", "cityscapes")

    def settings(self, config: Path) -> Any:
        try:
            from dinat_backbones.adapters.detectron2.maskformer_compat import get_config
        except ModuleNotFoundError as error:
            stop(str(error))
        return get_config(str(config)).dump()

    def train(self, config: Path, training: Path, data: Path, lock: int) -> None:
        os.environ["DETECTRON2_DATASETS"] = str(data.parent)
        options = ["--num-gpus", 0, "--resume", "--config-file", config, "OUTPUT_DIR", training]
        _run(lock, _detectron2_progress, "mask2former/train_net.py", *options)

    def evaluate(self, config: Path, training: Path, data: Path, lock: int) -> dict[str, float]:
        results = json.loads((training / "inference" / "results.json").read_text())  # training ends with it
        return {f"{task}/{name}": value for task, values in results.items() for name, value in values.items()}

    def predictions(self, config: Path, training: Path, data: Path, number: int) -> list[list[Segment]]:
        from dinat_backbones.cli.predict_detectron2 import load_model

        _, infer = load_model(str(config), str(self.last_checkpoint(training)), "cpu", "panoptic")
        found = []
        for file in sorted((data / "val").glob("*.jpg"))[:number]:
            segments, infos = infer(np.asarray(Image.open(file))[..., ::-1])["panoptic_seg"]
            things = [info for info in infos if info["isthing"]]
            found.append([Segment(info["category_id"], segments.numpy() == info["id"]) for info in things])
        return found


def _detectron2_progress(line: str) -> str | None:
    match = re.search(r"iter: (\d+)  total_loss: (\S+)", line)
    return (
        f"step {int(match[1]) + 1}, loss {match[2]}, left: {line.partition('eta: ')[2].split()[0]}" if match else None
    )


def _run(lock: int, progress: Any, *command: Any) -> None:
    """Run a Python command and print the lines that `progress` returns; the frameworks log everything to a file."""
    words = [sys.executable, "-u", *map(str, command)]
    tail: deque[str] = deque(maxlen=30)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=[lock])
    try:
        for line in process.stdout:
            tail.append(line)
            if summary := progress(line):
                print(f"  {' '.join(summary.split())}", flush=True)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if status:
        print("".join(tail))
        sys.exit(f"`{' '.join(words)}` failed with status {status}; its last lines are above")
