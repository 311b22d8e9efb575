"""The published classifiers in timm's registry, for whatever builds on timm.

    import dinat_backbones.adapters.timm
    model = timm.create_model("dinat_mini", pretrained=True, num_classes=10)
    backbone = timm.create_model("dinat_mini", features_only=True)     # maps of strides 4, 8, 16 and 32

`pretrained_cfg_overlay=dict(file=...)` beside ``pretrained=True`` takes the weights from a file. These and published
ones are read by `checkpoint.read`; timm itself reads files of the Hugging Face hub and `create_model`'s
`checkpoint_path`.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        is_model,
        register_model,
        resolve_pretrained_cfg,
    )
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "timm":
        raise
    raise ModuleNotFoundError(
        'dinat_backbones.adapters.timm needs timm: pip install "dinat_backbones[timm]"', name="timm"
    ) from error

from .. import classifier, zoo
from ..checkpoint import read
from ..checkpoint.fitting import resize_rpb_to
from ..checkpoint.loading import bare_state


class TimmMixin:
    """What timm's optimizers, feature extractors and trainers ask of a model, besides what every classifier has."""

    @property
    def feature_info(self: Any) -> list[dict[str, Any]]:
        return [
            dict(num_chs=channels, reduction=stride, module=f"{self.stages_name}.{i}")
            for i, (channels, stride) in enumerate(zip(self.stage_channels, self.stage_strides, strict=True))
        ]

    @property
    def in_chans(self: Any) -> int:
        return next(module for module in self.modules() if isinstance(module, nn.Conv2d)).in_channels

    @property
    def head_hidden_size(self: Any) -> int:
        return self.num_features

    def get_classifier(self: Any) -> nn.Module:
        return self.head

    def no_weight_decay(self: Any) -> set[str]:
        """The bias tables; norms, biases and layer scale are left out by timm itself."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def group_matcher(self: Any, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise learning rates; 99999 joins the group before, in timm."""
        stage = rf"^{self.stages_name}\.(\d+)"
        if coarse or isinstance(self, classifier.IsotropicClassifier):
            return dict(stem=r"^patch_embed", blocks=[(stage, None), (r"^norm", (99999,))])
        blocks = [(stage + r"\.blocks\.(\d+)", None), (stage + r"\.downsample", (99999,)), (r"^norm", (99999,))]
        return dict(stem=r"^patch_embed", blocks=blocks)

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        for module in self.modules():
            if hasattr(module, "with_cp"):
                module.with_cp = enable

    def prune_intermediate_layers(
        self: Any, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these stages; returns their numbers from 0."""
        wanted = self.stage_indices(indices)
        stages = getattr(self, self.stages_name)[: max(wanted) + 1]
        if hasattr(stages[-1], "downsample"):
            stages[-1].downsample = None
        cut = len(stages) < len(self.stage_channels)
        setattr(self, self.stages_name, stages)
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.num_classes, self.head = 0, nn.Identity()
        return wanted


CLASSES = {base: type(base.__name__, (TimmMixin, base), {"__doc__": base.__doc__, "__module__": __name__})
           for base in (*classifier.FAMILIES.values(), classifier.IsotropicClassifier)}  # fmt: skip
globals().update({made.__name__: made for made in CLASSES.values()})  # where pickles look for them


def _pretrained_cfg(row: zoo.Classification | zoo.ImageNet22k) -> dict[str, Any]:
    staged = row.arch in zoo.ARCHS
    design = None if staged else zoo.isotropic(row.arch)
    side = row.resolution // (design.patch_size if design else 32)
    return dict(
        url=row.checkpoint,
        num_classes=row.num_classes,
        input_size=(3, row.resolution, row.resolution),
        pool_size=(side, side),
        crop_pct=row.crop_fraction,
        interpolation="bicubic",
        mean=tuple(value / 255 for value in zoo.IMAGENET_MEAN),
        std=tuple(value / 255 for value in zoo.IMAGENET_STD),
        first_conv="patch_embed.proj.0" if staged and zoo.ARCHS[row.arch].family != "DiNAT_s" else "patch_embed.proj",
        classifier="head",
        fixed_input_size=design is not None and design.kernel_size is None,
        paper_ids="arXiv:2204.07143" if row.arch.startswith("nat_") else "arXiv:2209.15001",
        license="mit",
    )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A file's tensors under the model's names, bias tables of another kernel size resized."""
    state = bare_state(state_dict)
    return state | resize_rpb_to(model.state_dict(), state)


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(row) for name, row in classifier.ROWS.items()})


def _overlay_with_weights(name: str, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """`overlay` with the tensors of the file or address that timm would unpickle itself."""
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, dict(overlay or {}))
    source = cfg.file or (None if cfg.hf_hub_id else cfg.url)
    left_to_timm = cfg.state_dict or cfg.source in ("hf-hub", "local-dir") or source is None
    return dict(overlay or {}, **({} if left_to_timm else {"state_dict": bare_state(read(str(source)))}))


def _entry(name: str) -> Any:
    """The function that timm calls to make the model of that name."""
    base, arguments = classifier.recipe(name)
    stages = len(zoo.ARCHS[arguments["arch"]].depths) if arguments["arch"] in zoo.ARCHS else None

    def build(
        img_size: int | Sequence[int] | None = None, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> nn.Module:
        """timm gives `img_size` as (height, width); only isotropic models have a size, and theirs is a square."""
        if img_size is not None and stages is None:
            sides = {img_size} if isinstance(img_size, int) else set(img_size)
            if len(sides) > 1:
                raise ValueError(f"img_size={img_size}: {name} takes squares")
            kwargs["img_size"] = sides.pop()
        with torch.device(device) if device is not None else contextlib.nullcontext():
            return CLASSES[base](**kwargs).to(dtype)

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            given = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
            kwargs["pretrained_cfg_overlay"] = _overlay_with_weights(name, *given)
        depths = kwargs.get("depths") or range(stages or 4)
        model = build_model_with_cfg(
            build,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=tuple(range(len(depths))) if stages else 4, feature_cls="getter"),
            **{**arguments, **kwargs},
        )
        holders: tuple[Any, ...] = model, getattr(model, "model", model)  # a feature extractor and what it has inside
        for holder in holders:
            holder.pretrained_cfg.pop("state_dict", None)  # a second copy of all weights
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name} as published; keyword arguments of `{base.__name__}`."
    return create


for _name in classifier.ROWS:
    if not is_model(_name):
        register_model(_entry(_name))
