#!/usr/bin/env python
"""Evaluate a checkpoint of a detector or a segmentor:

    python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--out FILE] [--show] [--show-dir DIR] [--wait-time SECONDS]
                         [--tta] [--cfg-options KEY=VALUE ...] [--launcher none|pytorch|slurm|mpi]

Hands over to the test script of the framework that the config belongs to, as train.py does. `--out` is a .pkl file for
mmdet and a folder for mmseg.
"""

from train import main

if __name__ == "__main__":
    main("test.py")
