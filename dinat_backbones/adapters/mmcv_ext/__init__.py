"""mmcv's operators from torchvision and PyTorch, for an mmcv that was installed without its compiled `mmcv._ext`.

`install()` makes `import mmcv._ext` find them; a compiled module is found first. The arguments are those of mmcv's compiled
functions, which write most results into tensors that the caller gives. Operators that mmdet and mmseg do not reach raise
NotImplementedError when called.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import dinat_mmcv_finder

COMPILE_COMMAND = "pip install --no-build-isolation --no-binary onedl-mmcv --force-reinstall --no-deps onedl-mmcv"
MMCV_MAJOR = "2"


def install() -> None:
    """Lets `import mmcv._ext` find the operators where mmcv has no compiled ones."""
    dinat_mmcv_finder.install()


def fill_module(module: ModuleType) -> None:
    """Puts the operators into `module`, the new and empty `mmcv._ext`.

    Raises ImportError for an mmcv whose operators have other arguments.
    """
    import mmcv

    version = getattr(mmcv, "__version__", "unknown")
    if version.split(".")[0] != MMCV_MAJOR:
        raise ImportError(
            f"mmcv {version} has no compiled operators, and dinat_backbones replaces those of mmcv {MMCV_MAJOR}.x only: "
            'pip install "onedl-mmcv>=2.3"',
            name=module.__name__,
        )
    from . import boxes, deformable, focal_loss, roi

    module.__doc__ = (
        "mmcv's operators from torchvision and PyTorch (dinat_backbones.adapters.mmcv_ext), nothing compiled."
    )
    module.STAND_IN = True  # type: ignore[attr-defined]
    for source in (boxes, deformable, focal_loss, roi):
        for name in source.OPERATORS:
            setattr(module, name, getattr(source, name))
    module.__getattr__ = missing_operator  # type: ignore[method-assign]


def missing_operator(name: str) -> Callable[..., Any]:
    """A function in place of operator `name`, which raises NotImplementedError when called."""
    if name.startswith("_"):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def operator(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"mmcv's operator {name} needs mmcv's compiled operators: {COMPILE_COMMAND}")

    operator.__name__ = operator.__qualname__ = name
    return operator
