"""The threads the kernel runs on: those of the OpenMP runtime that torch uses.

A second runtime would have a second pool of threads, which would compete for the cores with torch's idle, spinning
ones.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

_forked = False


def parallel() -> int | None:
    """Address of torch's GOMP_parallel; None lets the kernel start threads itself.

    The runtime's threads do not survive a fork, so the result is None in a child process as well.
    """
    return None if _forked else _torch_entry("GOMP_parallel")


@cache
def _torch_entry(symbol: str) -> int | None:
    """Address of a function in the libraries that libtorch_cpu is linked with; other loaded libraries do not matter."""
    library = _torch_library()
    # The lookup goes through that library and its dependencies, in the order the linker resolved them.
    entry = getattr(library, symbol, None)
    return None if entry is None else ctypes.cast(entry, ctypes.c_void_p).value


def _torch_library() -> ctypes.CDLL | None:
    """libtorch_cpu, which is loaded already; None if it is not found."""
    if os.name == "nt":
        return None  # GetProcAddress does not look into dependencies, and Windows has no GOMP_parallel
    folder = Path(torch.__file__).parent / "lib"
    # By path for wheels; by name where torch is linked with a library of the system.
    names = [str(folder / "libtorch_cpu.so"), "libtorch_cpu.so", str(folder / "libtorch_cpu.dylib")]
    for name in names:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue
    return None


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork either
    os.register_at_fork(after_in_child=_after_fork)
