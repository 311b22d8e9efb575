#!/usr/bin/env python
"""`dinat predict` from a checkout; see dinat_backbones/cli/predict.py for the options."""

from command import run

if __name__ == "__main__":
    run("predict")
