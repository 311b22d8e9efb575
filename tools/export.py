#!/usr/bin/env python
"""`dinat export` from a checkout; see dinat_backbones/cli/export.py for the options."""

from command import run

if __name__ == "__main__":
    run("export")
