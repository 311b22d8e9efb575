#!/usr/bin/env python
"""`dinat validate` from a checkout; see dinat_backbones/cli/validate.py for the options."""

from command import run

if __name__ == "__main__":
    run("validate")
