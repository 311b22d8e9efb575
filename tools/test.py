#!/usr/bin/env python
"""`dinat test` from a checkout; see dinat_backbones/cli/test.py for the options."""

from command import run

if __name__ == "__main__":
    run("test")
