"""Evaluate a checkpoint of a detector or a segmentor, or check that the data is complete:

    dinat test CONFIG CHECKPOINT [--work-dir DIR] [--out FILE] [--show] [--show-dir DIR] [--wait-time SECONDS]
                                 [--tta] [--boxes-only] [--cfg-options KEY=VALUE ...]
                                 [--launcher none|pytorch|slurm|mpi] [--backbone ARCH] [--dilations SETTING]
    dinat test CONFIG --check-data [--cfg-options KEY=VALUE ...]

Runs the test script of the framework that the config belongs to, as `dinat train` does. `--out` is a .pkl file for
mmdet and a folder for mmseg. The checkpoint is read without running code that it carries, and has to fit the whole
model; --backbone is that of `dinat train`. `--tta` (several scales and flips) is for segmentors and boxes: mmdet does
not merge masks. `--boxes-only` evaluates the boxes of a Mask R-CNN or Cascade Mask R-CNN, which `--tta` then can.
`--check-data` prints which folders, annotation files and images are missing and where they come from.
"""

import sys
from collections.abc import Sequence
from functools import partialmethod
from typing import Any

from .check_data import check_data, evaluators
from .common import stop
from .framework_scripts import run_framework_script


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--help"], ["-h"]):  # with a config, the help of its framework's script
        print(__doc__)
        return
    if "--check-data" in words:
        sys.exit(check_data(words))
    run_framework_script("test.py", _arguments_for_testing, words)


def _arguments_for_testing(scope: str, cfg: Any, words: list[str]) -> list[str]:
    if cfg is None:
        return words
    from mmengine.runner import CheckpointLoader, Runner

    from ..checkpoint import read

    program = sys.argv[0]  # before it is the script's
    boxes_only = "--boxes-only" in words
    if boxes_only:
        words = [word for word in words if word != "--boxes-only"] + _without_masks(cfg)

    def load(filename: str, map_location: Any = None, **_: Any) -> dict[str, Any]:
        try:
            checkpoint = read(filename)
        except (OSError, ValueError) as error:
            sys.exit(f"{program}: {error}")
        if boxes_only:
            state = checkpoint.get("state_dict", checkpoint)
            for key in [key for key in state if str(key).startswith("roi_head.mask_")]:
                del state[key]
        return checkpoint

    # mmengine's own readers unpickle whatever a file asks for, and only warn if parts of the model are missing
    CheckpointLoader.register_scheme(("", "http://", "https://"), load, force=True)
    Runner.load_checkpoint = partialmethod(Runner.load_checkpoint, strict=True)
    if "--tta" in words and scope == "mmdet":
        for metric in evaluators(cfg, "test"):
            if metric.type.rpartition(".")[2] == "CocoPanopticMetric" or "segm" in metric.get("metric", ()):
                stop("--tta: mmdet merges the boxes of several views, not their masks; add --boxes-only")
    return words


def _without_masks(cfg: Any) -> list[str]:
    """Options that leave the mask head out, and its evaluation; they are put into `cfg`, too."""
    roi_head = (cfg.get("model") or {}).get("roi_head") or {}
    if not roi_head.get("mask_head"):
        stop("--boxes-only: the config's model has no roi_head.mask_head that could be left out")
    options: dict[str, Any] = {"model.roi_head.mask_head": None, "model.roi_head.mask_roi_extractor": None}
    evaluator = cfg.get("test_evaluator")
    places = (
        [f"test_evaluator.{i}" for i in range(len(evaluator))] if isinstance(evaluator, list) else ["test_evaluator"]
    )
    for place, metric in zip(places, evaluators(cfg, "test"), strict=True):
        if "metric" in metric:
            options[f"{place}.metric"] = "bbox"
    cfg.merge_from_dict(options)
    return ["--cfg-options", *(f"{key}={value}" for key, value in options.items())]
