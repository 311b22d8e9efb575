#!/usr/bin/env python
"""Draw what a detector or a segmentor finds over images:

    python tools/predict.py IMAGE|FOLDER --config CONFIG --checkpoint CHECKPOINT --out FOLDER
                            [--score 0.3] [--device cuda|cpu|...] [--force]

Instances with boxes and masks, panoptic or semantic maps, whatever the config's model gives. The images keep their
names (and their places below FOLDER). What is in the out folder already is skipped without --force, so that an
interrupted run goes on where it stopped. An image that cannot be read is reported, and the others are done.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import load_config, stop

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def main() -> None:
    """Command line."""
    args = argument_parser(__doc__.splitlines()[0], "of mmdet or mmseg").parse_args()
    draw_all(args, lambda: load_predictor(args.config, args.checkpoint, args.device, args.score))


def argument_parser(description: str, config: str) -> argparse.ArgumentParser:
    """The command line without what is particular to a framework; `config` says whose config it is."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", type=Path, metavar="IMAGE|FOLDER", help=f"folders are searched for {SUFFIXES}")
    parser.add_argument("--config", required=True, help=config)
    parser.add_argument("--checkpoint", required=True, help="file or http(s) address")
    parser.add_argument("--out", type=Path, required=True, help="folder for the drawn images")
    parser.add_argument("--score", type=float, default=0.3, help="least score of an instance (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--force", action="store_true", help="draw again what is in the out folder")
    return parser


def draw_all(args: argparse.Namespace, load: Callable[[], Callable[[Path, Path], str]]) -> None:
    """Do what the command line says; `load` returns what `load_predictor` here does, and raises what that raises."""
    root = args.images if args.images.is_dir() else args.images.parent
    images = find_images(args.images)
    if not images:
        stop(f"{args.images}: {'no images there' if args.images.is_dir() else 'not there'}")
    targets = {path: args.out / path.relative_to(root) for path in images}
    if any(target.resolve() == path.resolve() for path, target in targets.items()):
        stop(f"--out {args.out} is where the images are; name another folder")
    to_do = [path for path in images if args.force or not targets[path].exists()]
    if len(to_do) < len(images):
        print(f"{len(images) - len(to_do)} of {len(images)} images are there already (--force draws them again)")
    if not to_do:
        return
    try:
        predict = load()
    except (OSError, ValueError) as error:
        stop(str(error))
    failed = []
    for number, path in enumerate(to_do, 1):
        begin = time.perf_counter()
        try:
            found = predict(path, targets[path])
        except UnreadableError as error:
            failed.append(path)
            found = f"NOT READ: {error}"
        print(
            f"[{number}/{len(to_do)}] {path.relative_to(root)}: {found}, {time.perf_counter() - begin:.1f} s",
            flush=True,
        )
    if failed:
        sys.exit(f"{len(failed)} of {len(to_do)} images could not be read")


def find_images(path: Path) -> list[Path]:
    """The image itself, or all images anywhere below a folder, sorted."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


class UnreadableError(Exception):
    """A file is no image."""


def load_predictor(
    config: str, checkpoint: str, device: str | None = None, score: float = 0.3
) -> Callable[[Path, Path], str]:
    """Build a config's model with the weights of a checkpoint.

    Returns:
        A function of an image's path and the path to draw it to, which returns in words what was found. It raises
        `UnreadableError` if the file is no image.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is not there or does not fit the model.
    """
    cfg = load_config(config)
    import mmcv
    import torch
    from mmcv.transforms import Compose
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope

    from dinat_backbones.checkpoint import load_model

    init_default_scope(cfg.get("default_scope", "mmdet"))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    load_model(model, checkpoint)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    dataset = cfg.test_dataloader.dataset
    steps = [step for step in dataset.pipeline if not step.type.rpartition(".")[2].startswith("Load")]
    pipeline = Compose(steps)
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None, save_dir=None))
    metainfo = DATASETS.build(dict(dataset, lazy_init=True, pipeline=[])).metainfo
    visualizer.dataset_meta = {"palette": "random"} | {key: value for key, value in metainfo.items() if value}

    def predict(path: Path, target: Path) -> str:
        try:
            image = mmcv.imread(str(path))
        except OSError as error:
            raise UnreadableError(error) from error
        if image is None:
            raise UnreadableError("no image, or damaged")
        size = image.shape[:2]
        data = pipeline(dict(img=image, img_path=str(path), img_id=0, img_shape=size, ori_shape=size))
        with torch.no_grad():
            (result,) = model.test_step({key: [value] for key, value in data.items()})
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.stem}.partial{target.suffix}")
        scores = {"pred_score_thr": score} if "pred_instances" in result else {}
        try:
            visualizer.add_datasample(
                path.name, image[..., ::-1], result, draw_gt=False, out_file=str(partial), **scores
            )
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return describe(result, metainfo["classes"], score)

    return predict


def describe(result: Any, classes: Any, score: float) -> str:
    """The names of what was found, in words: instances with their number, segments and maps with their classes."""
    words = []
    classes = [name.strip() for name in classes]  # ADE20K has "bed "
    if "pred_instances" in result:
        labels = result.pred_instances.labels[result.pred_instances.scores > score].tolist()
        counts = {label: labels.count(label) for label in sorted(set(labels))}
        words.append(", ".join(f"{count} {classes[label]}" for label, count in counts.items()) or "no instance")
    for field in ("pred_panoptic_seg", "pred_sem_seg"):
        if field in result:
            (values,) = (tensor.unique().tolist() for tensor in getattr(result, field).values())
            # a panoptic id is the class and 1000 times the number of the instance; beyond the classes is void
            labels = sorted({value % 1000 if field == "pred_panoptic_seg" else value for value in values})
            words.append(", ".join(classes[label] for label in labels if label < len(classes)) or "nothing")
    return "; ".join(words)


if __name__ == "__main__":
    main()
