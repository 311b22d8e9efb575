"""mmcv's operators from torchvision and PyTorch, for an mmcv that was installed without its compiled `mmcv._ext`.

`install()` lets `import mmcv._ext` find them; a compiled module is found first and used instead. Arguments, results and
gradients are those of mmcv's compiled functions, which write most results into tensors that the caller passes. All
operators that the models of mmdet and mmseg need are provided; the others raise NotImplementedError when called.
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import autocast

import dinat_mmcv_finder

DESCRIPTION = "torchvision and PyTorch (dinat_backbones.adapters.mmcv_ext)"
_logged: set[str] = set()


def install() -> None:
    """Lets `import mmcv._ext` find the operators where mmcv has no compiled ones, and logs once which are in use."""
    dinat_mmcv_finder.install()
    operators = operators_in_use()
    if operators is None:
        return
    if operators != DESCRIPTION:
        _log(f"mmcv's operators: {operators}")
    elif "mmcv.ops" not in sys.modules:
        # the first modules of each that import operators; without operators they define functions that fail when called
        imported = [name.split(".")[0] for name in ("mmdet.structures", "mmseg.models") if name in sys.modules]
        if imported:
            _log(
                f"{' and '.join(imported)} had been imported before dinat_backbones and lack mmcv's operators: import "
                "dinat_backbones.adapters.openmmlab first, or install dinat_backbones with pip, where any order works",
                logging.WARNING,
            )


def operators_in_use() -> str | None:
    """What computes mmcv's operators: the path of the compiled module or `DESCRIPTION`; None without mmcv.

    Imports neither mmcv nor torchvision.
    """
    package = find_spec("mmcv")
    if package is None:
        return None
    compiled = PathFinder.find_spec("mmcv._ext", package.submodule_search_locations)
    return DESCRIPTION if compiled is None else str(compiled.origin)


def check_version() -> None:
    """Raises ImportError if mmcv is not mmcv 2, with which mmengine and this package work."""
    import mmcv

    if mmcv.__version__.split(".")[0] != "2":
        others = " ".join(name for name in ("mmcv", "mmcv-full", "mmcv-lite") if _is_installed(name))
        raise ImportError(
            f"mmcv {mmcv.__version__} is installed and mmcv 2 is needed: "
            f'{f"pip uninstall {others} && " if others else ""}pip install "onedl-mmcv>=2.3"',
            name="mmcv",
        )


def check_installation() -> None:
    """Raises ImportError if mmcv is another version than 2, or has compiled operators that do not load; its message is
    one sentence that says what to run. ModuleNotFoundError without mmcv."""
    check_version()
    try:
        import_module("mmcv._ext")
    except ModuleNotFoundError:  # torchvision; says it
        raise
    except ImportError as error:  # built for another torch, Python or CUDA
        raise ImportError(
            f"mmcv's compiled operators do not load ({str(error).splitlines()[0]}), build them for the installed "
            f"torch: {_compile_command()}",
            name="mmcv._ext",
        ) from error


def fill_module(module: ModuleType) -> None:
    """Puts the operators into `module`, the new and empty `mmcv._ext`.

    Raises ImportError if mmcv's operators have other arguments than those of mmcv 2.
    """
    check_version()
    from . import boxes, deformable, focal_loss, resampling, roi, sync_bn

    module.__doc__ = f"mmcv's operators from {DESCRIPTION}. Nothing is compiled."
    module.STAND_IN = True  # type: ignore[attr-defined]  # a compiled module has no such attribute
    for source in (boxes, deformable, focal_loss, resampling, roi, sync_bn):
        for name in source.OPERATORS:
            setattr(module, name, _without_autocast(getattr(source, name)))
    for name in ("get_compiler_version", "get_compiling_cuda_version"):  # in mmcv's report of the environment
        setattr(module, name, lambda: f"not compiled, operators from {DESCRIPTION}")
    module.__getattr__ = missing_operator  # type: ignore[method-assign]
    _log(f"mmcv's operators: {DESCRIPTION}, because mmcv was installed without compiled ones")


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """`operator` with autocast off, as a compiled one runs: mmcv casts the inputs itself."""

    @wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        with autocast(first.device.type, enabled=False):
            return operator(*args, **kwargs)

    return call


def missing_operator(name: str) -> Callable[..., Any]:
    """A function in place of the operator `name`, which raises NotImplementedError when called."""
    if name.startswith("_"):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def operator(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"dinat_backbones does not implement mmcv's operator {name}; compile mmcv: {_compile_command()}"
        )

    operator.__name__ = operator.__qualname__ = name
    return operator


def _compile_command() -> str:
    for name in ("onedl-mmcv", "mmcv"):
        if _is_installed(name):
            # without isolation the build finds torch; without the cache pip does not install the same wheel again
            options = "--no-build-isolation --no-cache-dir --force-reinstall --no-deps"
            return f"pip install {options} {name}=={version(name)}"
    return "pip install --no-build-isolation --no-cache-dir onedl-mmcv"


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _log(message: str, level: int = logging.INFO) -> None:
    from mmengine.logging import print_log

    if message not in _logged and os.environ.get("RANK", "0") == "0":
        _logged.add(message)
        print_log(message, logger="current", level=level)
