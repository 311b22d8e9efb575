#!/usr/bin/env python
"""`dinat train` from a checkout; see dinat_backbones/cli/train.py for the options."""

from command import run

if __name__ == "__main__":
    run("train")
