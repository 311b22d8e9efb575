#!/usr/bin/env python
"""`dinat convert` from a checkout; see dinat_backbones/cli/convert.py for the options."""

from command import run

if __name__ == "__main__":
    run("convert")
