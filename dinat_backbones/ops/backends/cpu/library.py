"""The kernel's library: its C interface in ctypes, and loading it."""

import ctypes
import os
from pathlib import Path

import torch

INTERFACE = 3  # NA2D_INTERFACE of csrc/na2d.h
PATH = Path(__file__).with_name("_na2d.dll" if os.name == "nt" else "_na2d.so")
REBUILD = "rebuild it with `python setup.py build_ext --inplace` in a checkout, or reinstall dinat_backbones"


class View(ctypes.Structure):
    """Na2dView of csrc/na2d.h."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 5)]


def view(tensor: torch.Tensor, into: View) -> None:
    """Write address and strides of a five-dimensional tensor into a `View`."""
    into.data = tensor.data_ptr()
    into.stride[:] = tensor.stride()


def view_of_pixel(tensor: torch.Tensor, into: View) -> None:
    """The same for ``[heads, dim]``, which stands for all pixels of a map."""
    into.data = tensor.data_ptr()
    into.stride[:] = (0, 0, 0, *tensor.stride())


class Problem(ctypes.Structure):
    """Na2dProblem of csrc/na2d.h, field by field; `load` compares the sizes of both."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "map_height", "map_width", "heads", "dim")),
        *((name, ctypes.c_int32) for name in ("kernel", "dilation", "bf16", "threads")),
        ("scale", ctypes.c_float),
        ("rpb", ctypes.c_void_p),
        *((name, View) for name in ("query", "key", "value", "out")),
        *((name, View) for name in ("key_padding", "value_padding")),
        *((name, View) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
        ("grad_rpb", ctypes.c_void_p),
        ("grad_padding", ctypes.c_void_p),
        ("parallel", ctypes.c_void_p),
    ]


def load(path: Path = PATH) -> tuple[ctypes.CDLL | None, str]:
    """The kernel's library, or None and the reason why there is none."""
    if not path.exists():
        return None, (
            f"the C++ kernel was not built when the package was installed ({path.name} is missing): "
            "install a C++17 compiler and reinstall dinat_backbones"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the C++ kernel does not load on this machine: {error}"
    try:
        library.na2d_problem_size.restype = ctypes.c_int64
        found = library.na2d_interface(), library.na2d_problem_size()
    except AttributeError:
        found = "unknown", "unknown"
    expected = INTERFACE, ctypes.sizeof(Problem)
    if found != expected:
        return None, (
            f"{path} was built from other sources than this package's (interface {found[0]}, {found[1]} bytes; "
            f"expected {expected[0]}, {expected[1]} bytes): {REBUILD}"
        )
    library.na2d_instruction_set.restype = ctypes.c_char_p
    library.na2d_use_instruction_set.argtypes = [ctypes.c_char_p]
    return library, ""
