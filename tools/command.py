"""Starts a command of the installed package for the scripts in this folder."""

import sys


def run(name: str) -> None:
    """Run `dinat NAME` with the arguments of this process."""
    try:
        from dinat_backbones import cli
    except ModuleNotFoundError as error:
        if error.name != "dinat_backbones":
            raise
        sys.exit(f"{sys.argv[0]}: the package is not installed; in the checkout, run: pip install -e .")
    cli.run(name)
