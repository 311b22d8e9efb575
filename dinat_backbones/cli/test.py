"""Evaluate a checkpoint of a detector or a segmentor, or check that the data is complete:

    dinat test CONFIG CHECKPOINT [--work-dir DIR] [--out FILE] [--show] [--show-dir DIR] [--wait-time SECONDS]
                                 [--tta] [--cfg-options KEY=VALUE ...] [--launcher none|pytorch|slurm|mpi]
                                 [--backbone ARCH] [--dilations SETTING]
    dinat test CONFIG --check-data [--cfg-options KEY=VALUE ...]

Runs the test script of the framework that the config belongs to, as `dinat train` does. `--out` is a .pkl file for
mmdet and a folder for mmseg. The checkpoint is read without running code that it carries, and has to fit the whole
model; --backbone is that of `dinat train`. `--tta` (several scales and flips) is for segmentors and box detectors:
mmdet does not merge masks.
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

    def load(filename: str, map_location: Any = None) -> dict[str, Any]:
        try:
            return read(filename)
        except (OSError, ValueError) as error:
            sys.exit(f"{program}: {error}")

    # mmengine's own readers unpickle whatever a file asks for, and only warn if parts of the model are missing
    CheckpointLoader.register_scheme(("", "http://", "https://"), load, force=True)
    Runner.load_checkpoint = partialmethod(Runner.load_checkpoint, strict=True)
    if "--tta" in words and scope == "mmdet":
        for metric in evaluators(cfg, "test"):
            if metric.type.rpartition(".")[2] == "CocoPanopticMetric" or "segm" in metric.get("metric", ()):
                stop("--tta: mmdet merges the boxes of several views, not their masks; leave it out with this config")
    return words
