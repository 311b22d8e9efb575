"""`dinat test CONFIG --check-data`: lists missing files of the data sets of an mmdet or mmseg config."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .common import load_config

# Where the official archives come from and what to unpack, by the name of the data set's class.
COCO = "COCO 2017 (https://cocodataset.org/#download): unpack train2017.zip, val2017.zip, {} there"
OFFICIAL = {
    "CocoDataset": COCO.format("annotations_trainval2017.zip"),
    "CocoPanopticDataset": COCO.format(
        "annotations_trainval2017.zip, panoptic_annotations_trainval2017.zip and the archives inside the latter"
    ),
    "ADE20KDataset": "ADE20K (https://sceneparsing.csail.mit.edu): unpack ADEChallengeData2016.zip beside it",
    "CityscapesDataset": "Cityscapes (https://www.cityscapes-dataset.com): unpack leftImg8bit_trainvaltest.zip and "
    "gtFine_trainvaltest.zip there, then make the *_labelTrainIds.png files as docs/data.md says",
}
# Settings of metrics that are paths.
METRIC_PATHS = (("file", "ann_file"), ("folder", "seg_prefix"))


def check_data(arguments: Sequence[str]) -> int:
    """Print which files of the config's data sets are missing, and where they come from.

    Args:
        arguments: of the command line, without the command's name.

    Returns:
        0 if nothing is missing, else 1.
    """
    parser = argparse.ArgumentParser(description="Check that the data sets of a config are complete.")
    parser.add_argument("config")
    parser.add_argument("checkpoint", nargs="?", help="not needed")
    parser.add_argument("--check-data", action="store_true")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE")
    args = parser.parse_args(arguments)
    cfg = load_config(args.config)
    if args.cfg_options:
        from mmengine.config import DictAction

        DictAction(["--cfg-options"], "options", nargs="+")(parser, args, args.cfg_options)
        cfg.merge_from_dict(args.options)
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope(cfg.get("default_scope", "mmdet"))
    status, seen = 0, set()
    for part in ("train", "val", "test"):
        for settings in _datasets((cfg.get(f"{part}_dataloader") or {}).get("dataset")):
            dataset = DATASETS.build(dict(settings, lazy_init=True, pipeline=[]))
            found = missing(dataset)
            found += [words for words in _missing_for_metrics(cfg, part) if words not in found]
            text = f"{type(dataset).__name__} in {dataset.data_root or os.curdir}"
            if (text, *found) in seen:  # "test" is usually the same as "val"
                continue
            seen.add((text, *found))
            print(f"{part}: {text}: {'incomplete' if found else 'complete'}", *found, sep="\n  missing: ")
            if found:
                status = 1
                hint = OFFICIAL.get(type(dataset).__name__)
                print(f"  {hint}" if hint else "  see docs/data.md for the layouts")
    return status


def evaluators(cfg: Any, part: str) -> Iterator[Any]:
    """The metrics of a config for "val" or "test"."""
    evaluator = cfg.get(f"{part}_evaluator") or []
    yield from evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]


def _datasets(settings: Any) -> Iterator[Any]:
    """The data sets inside RepeatDataset, ConcatDataset, MultiImageMixDataset and the like."""
    if settings is None:
        return
    inner = settings.get("dataset", settings.get("datasets"))
    if inner is None:
        yield settings
    for entry in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from _datasets(entry)


def _missing_for_metrics(cfg: Any, part: str) -> list[str]:
    paths = [(what, metric.get(key)) for metric in evaluators(cfg, part) for what, key in METRIC_PATHS]
    return [f"{what} {Path(path)}" for what, path in paths if path and not os.path.exists(path)]


def missing(dataset: Any) -> list[str]:
    """What is missing, in words, for a dataset of mmdet or mmseg that was built with `lazy_init=True`.

    Folders and annotation files; if those are complete, also the images that annotations name, and the label maps of
    images.
    """
    folders = {key: Path(value) for key, value in dataset.data_prefix.items() if value}
    words = [f"folder {folder}" for folder in folders.values() if not folder.is_dir()]
    if dataset.ann_file and not os.path.isfile(dataset.ann_file):
        words.append(f"file {Path(dataset.ann_file)}")
    if words:
        return words
    expected: dict[str, set[str]] = {}
    if str(dataset.ann_file).endswith(".json"):
        content = json.loads(Path(dataset.ann_file).read_text())
        expected["img"] = {image["file_name"] for image in content["images"]}
        if "seg" in folders:
            expected["seg"] = {annotation["file_name"] for annotation in content["annotations"]}
    elif "seg_map_path" in folders and "img_path" in folders:
        images = [name for name in _files(folders["img_path"]) if name.endswith(dataset.img_suffix)]
        if not images:
            words.append(f"images named *{dataset.img_suffix} in folder {folders['img_path']}")
        expected["seg_map_path"] = {n.removesuffix(dataset.img_suffix) + dataset.seg_map_suffix for n in images}
    for key, names in expected.items():
        absent = sorted(names - _files(folders[key]))
        if absent:
            words.append(f"{len(absent)} of {len(names)} files in folder {folders[key]}: {', '.join(absent[:3])} ...")
    return words


def _files(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    }
