#!/usr/bin/env python
"""`dinat flops` from a checkout; see dinat_backbones/cli/flops.py for the options."""

from command import run

if __name__ == "__main__":
    run("flops")
