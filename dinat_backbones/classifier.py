"""Image classifiers: backbones with the ImageNet head, and all published ones by name.

model = create_classifier("dinat_mini", pretrained=True)
logits = model(images)                              # [B, 1000]
maps = model.forward_intermediates(images, intermediates_only=True)
"""

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import zoo
from .backbone import NAT, DiNAT, DiNAT_s
from .checkpoint import load_classifier
from .isotropic import Isotropic
from .layers import NormLayer, init_linear, normed


class Classifier(nn.Module):
    """Norm, mean over the map and a linear layer: a mixin, to be put before a backbone with `stage_maps`.

    Args, besides those of the backbone:
        num_classes: 0 for none; the model then returns its pooled features.
        global_pool: "avg", or "" to keep the map: `head` is then applied to each of its pixels.

    Attributes:
        num_classes, global_pool: as given.
        num_features: channels of the last map.
        stage_channels, stage_strides: of every stage; of an isotropic model, of every block.
    """

    norm: nn.Module
    head: nn.Module
    global_pool: str
    # of the backbone
    stage_channels: tuple[int, ...]
    stage_strides: tuple[int, ...]
    stages_name: str
    stage_maps: Callable[[torch.Tensor], Iterator[torch.Tensor]]

    def __init__(
        self,
        arch: str | None = None,
        *,
        num_classes: int = 1000,
        global_pool: str = "avg",
        norm_layer: NormLayer = nn.LayerNorm,
        **kwargs: Any,
    ):
        super().__init__(arch, norm_layer=norm_layer, **kwargs)  # type: ignore[call-arg]  # the backbone
        self.num_features = self.stage_channels[-1]
        self.norm = norm_layer(self.num_features)
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with random weights; `global_pool` None keeps the pooling.

        Raises:
            ValueError: negative `num_classes`, another `global_pool`.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected at least 0 (0 for a model without head)")
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"global_pool={global_pool!r}: expected 'avg', or '' to keep the map")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = next(self.parameters())  # the new head has the device and dtype of the model
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        init_linear(self.head.train(self.training))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]`` (what `forward_head` returns)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last map after the norm, ``[B, num_features, H / stride, W / stride]`` rounded up."""
        for features in self.stage_maps(x):
            x = features
        return normed(self.norm, x).permute(0, 3, 1, 2)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """What `forward_features` returned to logits ``[B, num_classes]``, or with `pre_logits` (or without a head) to
        pooled features ``[B, num_features]``. With ``global_pool=""`` both keep the map: ``[B, ..., H, W]``."""
        if self.global_pool:
            features = features.mean((2, 3))
            return features if pre_logits else self.head(features)
        return features if pre_logits else self.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of several stages (of an isotropic model: blocks), with timm's arguments.

        Args:
            x: images ``[B, in_chans, H, W]``.
            indices: which stages, negative ones from the end; a number n for the last n; None for all.
            norm: apply the model's norm to the maps that have as many channels as the last one.
            stop_early: compute no stage after the last one in `indices`.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list of maps alone.

        Returns:
            The last computed map after the norm, and the list of maps; ``[B, C, H, W]`` or ``[B, H, W, C]`` each.

        Raises:
            ValueError: a stage that the model does not have, another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NHWC'")
        wanted = self.stage_indices(indices)
        maps = []
        for stage, features in enumerate(self.stage_maps(x)):
            x = features
            if stage in wanted:
                last_width = features.shape[-1] == self.num_features
                features = self.norm(features) if norm and last_width else features
                maps.append(features.permute(0, 3, 1, 2) if output_fmt == "NCHW" else features)
            if stop_early and stage == max(wanted):
                break
        if intermediates_only:
            return maps
        x = self.norm(x) if x.shape[-1] == self.num_features else x
        return x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x, maps

    def stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """`indices` of `forward_intermediates` as a list of non-negative numbers; ValueError for others."""
        stages = len(self.stage_channels)
        if indices is None:
            return list(range(stages))
        chosen = [stages - indices + i for i in range(indices)] if isinstance(indices, int) else list(indices)
        if not chosen or not all(-stages <= i < stages for i in chosen):
            raise ValueError(f"indices={indices}: expected some of the {stages} stages, 0 to {stages - 1}")
        return [i % stages for i in chosen]


class StagedClassifier(Classifier):
    """A classifier with stages, which have no output norms."""

    def __init__(self, arch: str | None = None, **kwargs: Any):
        super().__init__(arch, out_indices=(), **kwargs)


class NATClassifier(StagedClassifier, NAT):  # type: ignore[misc]  # forward returns logits, not maps
    """`NAT` as an image classifier: its arguments except `out_indices`, and those of `Classifier`."""


class DiNATClassifier(StagedClassifier, DiNAT):  # type: ignore[misc]
    """`DiNAT` as an image classifier; arguments as for `NATClassifier`."""


class DiNAT_sClassifier(StagedClassifier, DiNAT_s):  # type: ignore[misc]
    """`DiNAT_s` as an image classifier; arguments as for `NATClassifier`."""


class IsotropicClassifier(Classifier, Isotropic):
    """NAT-iso, DiNAT-iso or ViT-rpb: the arguments of `Isotropic`, and those of `Classifier`."""


FAMILIES: dict[str, type[Classifier]] = {"NAT": NATClassifier, "DiNAT": DiNATClassifier, "DiNAT_s": DiNAT_sClassifier}
ROWS: dict[str, zoo.Classification | zoo.ImageNet22k] = {**zoo.CLASSIFICATION, **zoo.IMAGENET22K}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the published classifiers that match a shell pattern: 22 of ImageNet-1k, then 3 of ImageNet-22k."""
    return fnmatch.filter(ROWS, pattern)


def create_classifier(
    name: str, num_classes: int | None = None, pretrained: bool | str | os.PathLike = False, **overrides: Any
) -> Classifier:
    """A published classifier.

    Args:
        name: one of `list_models()`.
        num_classes: None for the number in the published file, 1000 or 21841.
        pretrained: True for the published weights, downloaded once (see `checkpoint.fetch`); or the path or address of
            a file, which must fit. A head for another number of classes keeps its random weights, which is logged, and
            rpb tables of another kernel size are resized (see `checkpoint.load_classifier`).
        overrides: arguments of the model that replace the published ones.

    Raises:
        ValueError: an unknown name, arguments that do not fit together, a file that does not fit.
        FileNotFoundError: no such file, or the download failed.
    """
    family, arguments = recipe(name)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    model = family(**{**arguments, **overrides})
    if pretrained:
        load_classifier(model, ROWS[name].checkpoint if pretrained is True else pretrained)
    return model


def recipe(name: str) -> tuple[type[Classifier], dict[str, Any]]:
    """The class and the arguments of a published classifier; ValueError with the known names otherwise."""
    row = zoo.find("classifier", name, ROWS)
    arguments = {"arch": row.arch, "num_classes": row.num_classes}
    if row.arch in zoo.ISOTROPIC:
        return IsotropicClassifier, arguments
    if row.dilations:
        arguments["dilations"] = row.dilations
    return FAMILIES[zoo.ARCHS[row.arch].family], arguments
