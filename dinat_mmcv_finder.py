"""Finds `mmcv._ext` where mmcv was installed without compiled operators. Standard library only.

Where the package is installed, dinat_mmcv_finder.pth imports this module at every start of Python, so it does next to
nothing: torch and the operators are imported when something asks for `mmcv._ext` and no compiled one is found.
"""

import sys


class StandInFinder:
    """Last entry of `sys.meta_path`, so that a compiled `mmcv._ext` always wins."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != "mmcv._ext":
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, StandInFinder, origin="dinat_backbones.adapters.mmcv_ext")

    @staticmethod
    def create_module(spec):
        return None  # an ordinary module

    @staticmethod
    def exec_module(module):
        from dinat_backbones.adapters.mmcv_ext import fill_module

        fill_module(module)


def install():
    """Appends the finder to `sys.meta_path`, once."""
    if StandInFinder not in sys.meta_path:
        sys.meta_path.append(StandInFinder)


install()
