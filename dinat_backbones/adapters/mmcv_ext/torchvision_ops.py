"""torchvision's operators, imported when first called: mmcv itself does not need torchvision."""

from typing import Any

import torch


def torchvision_ops() -> Any:
    """`torch.ops.torchvision`; raises ModuleNotFoundError without torchvision."""
    try:
        import torchvision.ops  # noqa: F401  # registers the operators
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ModuleNotFoundError(
            "mmcv was installed without compiled operators, and dinat_backbones computes them with torchvision: "
            "pip install torchvision",
            name="torchvision",
        ) from error
    return torch.ops.torchvision
