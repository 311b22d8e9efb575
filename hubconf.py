"""Entry points of torch.hub: every published classifier by its name, and `backbone` for feature pyramids.

    model = torch.hub.load(REPOSITORY, "dinat_mini", pretrained=True)
    backbone = torch.hub.load(REPOSITORY, "backbone", "dinat_mini", dilations="coco", pretrained=True)

REPOSITORY is the address of the repository, or the path of a checkout with ``source="local"``.
"""

import os
from collections.abc import Callable
from typing import Any

from torch import nn

import dinat_backbones
from dinat_backbones import create_classifier, list_models, zoo
from dinat_backbones.checkpoint import load_backbone

dependencies = ["torch"]


def backbone(arch: str, pretrained: bool | str | os.PathLike = False, **kwargs: Any) -> nn.Module:
    """The backbone `NAT`, `DiNAT` or `DiNAT_s` that `arch` belongs to.

    Args:
        arch: a key of `dinat_backbones.zoo.ARCHS`, such as "dinat_mini".
        pretrained: True for the ImageNet weights that the published detectors and segmentors start from (ImageNet-22k
            where there are any, else ImageNet-1k), downloaded once; a path or an address for those of a file.
        kwargs: arguments of the backbone: `dilations`, `out_indices`, `frozen_stages`, ...

    Raises:
        ValueError: an unknown `arch`, arguments or a file that do not fit.
        FileNotFoundError: no such file, or the download failed.
    """
    model = getattr(dinat_backbones, zoo.arch(arch).family)(arch=arch, **kwargs)
    if pretrained:
        published = zoo.PRETRAINED.get(f"{arch}_21k") or zoo.PRETRAINED[arch]
        load_backbone(model, published if pretrained is True else pretrained)
    return model


def _classifier(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool | str | os.PathLike = False, **kwargs: Any) -> nn.Module:
        return create_classifier(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The classifier {name}; arguments as for `dinat_backbones.create_classifier`."
    return create


globals().update({name: _classifier(name) for name in list_models()})
