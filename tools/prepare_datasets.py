#!/usr/bin/env python
"""`dinat prepare` from a checkout; see dinat_backbones/cli/prepare.py for the options."""

from command import run

if __name__ == "__main__":
    run("prepare")
