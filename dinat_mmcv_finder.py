"""Finds `mmcv._ext` where mmcv was installed without compiled operators, and `panopticapi` where it is not installed.
Standard library only.

Where the package is installed, dinat_mmcv_finder.pth imports this module at every start of Python, so it does next to
nothing: torch and the operators are imported when something asks for one of `STAND_INS` that is not installed.
"""

import sys

# a name to find, and which module fills it
STAND_INS = {
    "mmcv._ext": "dinat_backbones.adapters.mmcv_ext",
    "panopticapi": "dinat_backbones.adapters.panoptic",
    "panopticapi.evaluation": "dinat_backbones.adapters.panoptic",
    "panopticapi.utils": "dinat_backbones.adapters.panoptic",
}


class StandInFinder:
    """Last entry of `sys.meta_path`, so that what is installed always wins."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname not in STAND_INS:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, StandInFinder, origin=STAND_INS[fullname], is_package=fullname == "panopticapi")

    @staticmethod
    def create_module(spec):
        return None  # an ordinary module

    @staticmethod
    def exec_module(module):
        from importlib import import_module

        import_module(STAND_INS[module.__name__]).fill_module(module)


def install():
    """Appends the finder to `sys.meta_path`, once."""
    if StandInFinder not in sys.meta_path:
        sys.meta_path.append(StandInFinder)


install()
