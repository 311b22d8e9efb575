"""A small Mask2Former in Detectron2 for several test files; skips those that import it where it cannot run."""

import subprocess
import sys

import pytest
import torch

from helpers import ROOT, environment

try:
    from dinat_backbones.adapters.detectron2.maskformer_compat import get_config
except ModuleNotFoundError as error:  # says whether Detectron2 or Mask2Former is missing
    pytest.skip(f"{error}; the classic stack has both (make test-classic)", allow_module_level=True)
from detectron2.modeling import build_model

DEMO = ROOT / "mask2former" / "configs" / "demo" / "panoptic_dinat_shapes.yaml"
# The demo's model, smaller still
TINY = ["MODEL.DINAT.DEPTHS", [1, 1, 1, 1], "MODEL.DINAT.DILATIONS", None, "MODEL.DINAT.KERNEL_SIZE", 3]
TINY += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32, "MODEL.MASK_FORMER.HIDDEN_DIM", 32]
TINY += ["MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 50, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 10]
TINY += ["MODEL.DINAT.DROP_PATH_RATE", 0.3, "SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TEST", 64]
TINY += ["INPUT.MIN_SIZE_TRAIN", [48, 64], "SOLVER.CHECKPOINT_PERIOD", 2]


def tiny(*options, seed=0):
    """Config and model."""
    cfg = get_config(str(DEMO), [*TINY, *options])
    torch.manual_seed(seed)
    return cfg, build_model(cfg)


def run_python(*words, code=0, path=(), **variables):
    """Standard output and error of a Python process on the CPU, which has to exit with `code`."""
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(*path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **variables),
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout + result.stderr
