#!/usr/bin/env python
"""`dinat shapes` from a checkout; see dinat_backbones/cli/shapes.py for the options."""

from command import run

if __name__ == "__main__":
    run("shapes")
