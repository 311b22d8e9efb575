"""Top-1 and top-5 of classifiers on ImageNet-1k's validation images:

    dinat validate FOLDER MODEL [MODEL ...] [--table] [--batch-size 64] [--workers N] [--device cuda|cpu|...]
                                [--amp] [--state FOLDER] [--force]
    dinat validate FOLDER --table                     # all 22 published models
    dinat validate FOLDER MODEL --checkpoint FILE     # your own weights, for the classes of your own folder

FOLDER has one folder of images per class, named by its WordNet id (n01440764, ...), as torchvision's ImageFolder
reads them, or is the folder above such a "val". MODEL is one of `dinat_backbones.list_models()`. Images are resized
bicubically and cropped as published: for 224 pixels the middle of 256, for 384 the middle of 384.

The counts are kept in --state (work_dirs/validate), so that an interrupted run continues where it stopped and a
finished one is not repeated without --force. `--table` compares with the published top-1; the exit status is then 1 if
a model is further than 0.1 from it or could not be measured.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from .. import create_classifier, list_models, zoo
from ..checkpoint import load_classifier
from ..classifier import ROWS
from ..files import atomic_write
from .common import device_name, stop

TOLERANCE = 0.1  # percent; published figures have one decimal
REPORT_SECONDS = 10.0
WORDNET_ID = re.compile(r"n\d{8}")


class ValidationError(Exception):
    """What is wrong with the folder, the images or the state, for the user."""


@dataclasses.dataclass
class Tally:
    """Images seen so far, and how many had their class first, or among the first five."""

    done: int = 0
    top1: int = 0
    top5: int = 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch: logits ``[B, classes]``, targets ``[B]``. Top-5 of fewer than five classes is all of them."""
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        self.done += len(targets)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())

    def __str__(self) -> str:
        return f"top-1 {100 * self.top1 / self.done:.2f}, top-5 {100 * self.top5 / self.done:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="ImageNet's folder or the val folder in it")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"published models: {', '.join(list_models())}")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of one model, instead of the published ones")
    parser.add_argument("--table", action="store_true", help="compare with the published top-1")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help="processes that read (default: %(default)s)")
    parser.add_argument("--device", type=device_name, help="default: cuda if there is one, else cpu")
    parser.add_argument("--amp", action="store_true", help="half precision: float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--state", type=Path, default=Path("work_dirs/validate"), metavar="FOLDER", help="see above")
    parser.add_argument("--force", action="store_true", help="count anew what is in the state folder")
    args = parser.parse_args(arguments)
    if not args.models and not args.table:
        parser.error("give models, or --table for all of them")
    if args.checkpoint and len(args.models) != 1:
        parser.error(f"--checkpoint has the weights of one model, and {len(args.models)} were named")
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size must be at least 1, --workers at least 0")
    names = args.models or list(zoo.CLASSIFICATION)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"{unknown[0]!r} is not a published model; choose from: {', '.join(ROWS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: dict[str, Tally | str] = {}
    for name in names:
        try:
            results[name] = validate(name, args)
        except (ValidationError, OSError, ValueError) as error:
            if not args.table or len(names) == 1:
                stop(f"{name}: {error}")
            results[name] = str(error)
        print(f"{name}: {results[name]}", flush=True)
    if args.table:
        lines, status = table(results)
        print("", *lines, sep="\n")
        sys.exit(status)


def table(results: dict[str, Tally | str]) -> tuple[list[str], int]:
    """Lines that compare results (or the reasons why there are none) with the published top-1, and the exit status."""
    lines, status = [f"{'model':24} {'size':>4} {'top-1':>6} {'publ.':>6} {'diff.':>6} {'top-5':>6}"], 0
    for name, tally in results.items():
        published = getattr(ROWS[name], "top1", None)
        start = f"{name:24} {ROWS[name].resolution:4}"
        if isinstance(tally, str):
            lines.append(f"{start} not measured: {tally}")
            status = 1
            continue
        top1, top5 = 100 * tally.top1 / tally.done, 100 * tally.top5 / tally.done
        compared = f"{'-':>6} {'-':>6}" if published is None else f"{published:6.1f} {top1 - published:+6.2f}"
        lines.append(f"{start} {top1:6.2f} {compared} {top5:6.2f}")
        if published is not None and abs(top1 - published) > TOLERANCE + 1e-9:
            status = 1
    return lines, status


def validate(name: str, args: argparse.Namespace) -> Tally:
    """Measure one model, continuing where an earlier run stopped.

    Raises:
        ValidationError: the folder, its classes or an image are not what they should be.
        OSError, ValueError: the checkpoint is not there, cannot be downloaded or does not fit.
    """
    row = ROWS[name]
    dataset = find_images(args.folder, row, args.checkpoint is not None)
    state = args.state / f"{name}-{_fingerprint(name, args, dataset)}.json"
    tally = Tally() if args.force else read_state(state)
    if tally.done == len(dataset):
        print(f"{name}: counted before ({state}; --force counts anew)", flush=True)
        return tally
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load(name, args.checkpoint, dataset).to(device).eval()
    if args.force:  # not before: weights that cannot be loaded cost no count
        state.unlink(missing_ok=True)
    if tally.done:
        print(f"{name}: continuing after {tally.done} of {len(dataset)} images", flush=True)
    loader = DataLoader(
        Subset(dataset, range(tally.done, len(dataset))),
        args.batch_size,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_interrupts,
    )
    try:
        _count(name, model, loader, tally, state, device, args.amp)
    except KeyboardInterrupt:  # between counting a batch and writing it, too: what the file has is what continues
        command = "the same command without --force" if args.force else "the same command"
        sys.exit(
            f"\n{name}: stopped after {read_state(state).done} of {len(dataset)} images; {command} continues from there"
        )
    return tally


def _count(
    name: str, model: nn.Module, loader: DataLoader, tally: Tally, state: Path, device: torch.device, amp: bool
) -> None:
    total = tally.done + len(loader.dataset)  # type: ignore[arg-type]
    first, begin = tally.done, time.monotonic()
    reported = begin
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    with torch.inference_mode(), torch.autocast(device.type, half, enabled=amp):
        for images, targets in loader:
            logits = model(images.to(device, non_blocking=True)).float().cpu()
            if not logits.isfinite().all():
                raise ValidationError(f"logits are not finite after {tally.done} images" + " (without --amp?)" * amp)
            tally.add(logits, targets)
            write_state(state, tally)
            now = time.monotonic()
            if now - reported >= REPORT_SECONDS:
                reported = now
                rate = (tally.done - first) / (now - begin)
                left = (total - tally.done) / rate / 60
                print(f"{name}: {tally.done}/{total}  {tally}, {rate:.1f} images/s, {left:.0f} min left", flush=True)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Errors of reading are raised in the main process. What is left is the worker's queue thread, which would print a
    # traceback when the main process has closed the queue.
    sys.excepthook = lambda *_: None


def load(name: str, checkpoint: str | None, dataset: Any) -> nn.Module:
    """The model with the published weights, or with those of a file for the classes of the folder."""
    if checkpoint is None:
        return create_classifier(name, pretrained=True)
    classes = len(dataset.classes)
    model = create_classifier(name, num_classes=classes)
    if "head.weight" not in load_classifier(model, checkpoint).loaded:
        raise ValidationError(f"{checkpoint} is for another number of classes than the {classes} folders of images")
    return model


# ----------------------------------------------------------------------------------------------------------------- data


def find_images(folder: Path, row: Any, any_classes: bool) -> Any:
    """The images of an ImageNet validation folder, or with `any_classes` of any folder of classes, in sorted order.

    Raises:
        ValidationError: another folder; says what was expected and what is there.
    """
    if not folder.is_dir():
        raise ValidationError(f"{folder} is {'no folder' if folder.exists() else 'not there'}")
    if (folder / "val").is_dir():
        folder = folder / "val"
    wrong = f"{folder} is not an ImageNet validation folder: "
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        loose = sum(entry.is_file() for entry in os.scandir(folder))
        raise ValidationError(
            f"{wrong}expected one folder per class, such as n01440764, with its images inside; found "
            + (f"{loose} files and no folder: sort them into folders of their classes" if loose else "nothing")
        )
    if not any_classes:
        if row.num_classes != 1000:
            raise ValidationError(
                f"a classifier of {row.num_classes} classes, which ImageNet's 1000 cannot measure; fine-tune it first"
            )
        if len(classes) != 1000 or not all(map(WORDNET_ID.fullmatch, classes)):
            raise ValidationError(
                f"{wrong}expected its 1000 folders named by WordNet ids such as n01440764, found {len(classes)}: "
                f"{', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''} (with --checkpoint any classes will do)"
            )
    size = row.resolution
    steps = [
        transforms.Resize(math.floor(size / row.crop_fraction), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize([v / 255 for v in zoo.IMAGENET_MEAN], [v / 255 for v in zoo.IMAGENET_STD]),
    ]
    try:
        return datasets.ImageFolder(str(folder), transforms.Compose(steps), loader=_load_image)
    except FileNotFoundError as error:  # a class without images
        raise ValidationError(f"{wrong}{str(error).splitlines()[0]}") from error


def _load_image(path: str) -> Any:
    try:
        return datasets.folder.pil_loader(path)
    except Exception as error:  # damaged images raise nearly anything
        raise OSError(f"{path} cannot be read as an image: {error}") from error


# ---------------------------------------------------------------------------------------------------------------- state


def _fingerprint(name: str, args: argparse.Namespace, dataset: Any) -> str:
    """Of everything that the result depends on: another model, file, folder or precision has another state."""
    weights: Any = ROWS[name].checkpoint
    if args.checkpoint:
        weights = args.checkpoint
        if os.path.exists(weights):
            status = os.stat(weights)
            weights = (str(Path(weights).resolve()), status.st_size, status.st_mtime_ns)
    images = [(os.path.relpath(path, dataset.root), target) for path, target in dataset.samples]
    key = json.dumps([name, weights, str(Path(dataset.root).resolve()), images, args.amp])
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def read_state(path: Path) -> Tally:
    """What `write_state` wrote, or nothing counted."""
    if not path.exists():
        return Tally()
    try:
        return Tally(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValidationError(f"{path} is not a state of this command ({error}); delete it") from error


def write_state(path: Path, tally: Tally) -> None:
    """Replace the file; an interruption leaves the old or the new one."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(tally)))
