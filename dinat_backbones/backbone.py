"""NAT, DiNAT and DiNAT_s as feature pyramids: the only backbone code of the package.

NAT and DiNAT (arXiv 2204.07143, 2209.15001) use overlapping 3x3 convolutions to tokenize and downsample; DiNAT_s keeps
Swin's frame (4x4 patches, 2x2 merging) around the same attention. The layers are in `layers`, the architectures and
dilations in `zoo`. Module names are those of the published checkpoints.
"""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from . import zoo
from .attention import NeighborhoodAttention2D
from .layers import (
    Block,
    ConvDownsampler,
    ConvTokenizer,
    NormLayer,
    PatchEmbed,
    PatchMerging,
    Stage,
    drop_path_rates,
    init_linear,
    normed,
)

_OUTPUT_NORM = re.compile(r"norm(\d+)\.")
_STAGE = re.compile(r"(levels|layers)\.(\d+)\.(downsample\.)?")

_Backbone = TypeVar("_Backbone", bound="BackboneBase")


def layer_depth(name: str, depths: Sequence[int]) -> int:
    """The depth of a parameter of a backbone, by its name there: 0 for the tokenizer, then one per block, and one more
    for what is none of its parts. `depths` are those of the built stages."""
    block = re.match(r"(?:levels|layers)\.(\d+)\.(?:blocks\.(\d+)\.|downsample\.)", name)
    norm = re.match(r"norm(\d*)\.", name)
    if name.startswith("patch_embed."):
        return 0
    if block and block[2]:
        return sum(depths[: int(block[1])]) + int(block[2]) + 1
    if block or norm:
        stage = block[1] if block else norm[1] if norm else ""
        return sum(depths[: int(stage) + 1] if stage else depths)
    return sum(depths) + 1


class BackboneBase(nn.Module):
    """What the three families share; see `NAT` for the arguments."""

    family: str
    stages_name: str  # attribute, hence state-dict prefix, of the stages
    tokenizer: type[ConvTokenizer] | type[PatchEmbed]
    downsampler: type[ConvDownsampler] | type[PatchMerging]

    def __init__(
        self,
        arch: str | None = None,
        *,
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        kernel_size: int | None = None,
        dilations: str | Sequence[Sequence[int]] | None = None,
        mlp_ratio: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        layer_scale: float | None = None,
        rel_pos_bias: bool = True,
        patch_norm: bool = True,
        norm_layer: NormLayer = nn.LayerNorm,
        in_chans: int = 3,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise TypeError(self._unknown_arguments(unknown))
        published = self._published(arch)
        embed_dim = self._given_or_published("embed_dim", embed_dim, published)
        depths = self._given_or_published("depths", depths, published)
        num_heads = self._given_or_published("num_heads", num_heads, published)
        mlp_ratio = self._given_or_published("mlp_ratio", mlp_ratio, published)
        if layer_scale is None and published:
            layer_scale = published.layer_scale
        dilations, kernel_size = self._dilations_and_kernel_size(published, dilations, kernel_size, depths)
        self.check_arguments(depths, num_heads, dilations, frozen_stages)

        self.depths, self.num_heads, self.kernel_size = tuple(depths), tuple(num_heads), kernel_size
        self.dilations = tuple(map(tuple, dilations))
        self.out_indices, self.frozen_stages = self._stage_numbers(out_indices, len(depths)), frozen_stages
        self.built_stages = max(self.out_indices, default=len(depths) - 1) + 1
        self.stage_channels = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.stage_strides = tuple(4 * 2**i for i in range(len(depths)))
        self.out_channels = tuple(self.stage_channels[i] for i in self.out_indices)
        self.out_strides = tuple(self.stage_strides[i] for i in self.out_indices)

        self.patch_embed = self.tokenizer(in_chans, embed_dim, norm_layer if patch_norm else None)
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = nn.ModuleList()
        for i, width in enumerate(self.stage_channels[: self.built_stages]):
            blocks = []
            for dilation in self.dilations[i]:
                attention = NeighborhoodAttention2D(
                    width,
                    num_heads[i],
                    kernel_size,
                    dilation,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    attn_drop=attn_drop_rate,
                    proj_drop=drop_rate,
                    rel_pos_bias=rel_pos_bias,
                    backend=backend,
                )
                blocks.append(Block(width, mlp_ratio, drop_rate, next(drop_path), norm_layer, layer_scale, attention))
            downsample = self.downsampler(width, norm_layer) if i + 1 < self.built_stages else None
            stages.append(Stage(blocks, downsample, with_cp))
        self.add_module(self.stages_name, stages)
        for i, width in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(f"norm{i}", norm_layer(width))
        self.apply(init_linear)
        for module in self._frozen():
            module.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images ``[B, in_chans, H, W]`` of any size to one contiguous map ``[B, C_i, ceil(H/s_i), ceil(W/s_i)]`` per
        entry of `out_indices`, with ``C_i`` from `out_channels` and ``s_i`` from `out_strides`."""
        outs = {}
        for i, features in enumerate(self.stage_maps(x)):
            if i in self.out_indices:
                outs[i] = normed(getattr(self, f"norm{i}"), features).permute(0, 3, 1, 2).contiguous()
        return tuple(outs[i] for i in self.out_indices)

    def stage_maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """What every built stage makes of images, before its norm: ``[B, H_i, W_i, C_i]``, one stage at a time."""
        x = self.pos_drop(self.patch_embed(x))
        for stage in getattr(self, self.stages_name):
            features, x = stage(x)
            yield features

    def train(self: _Backbone, mode: bool = True) -> _Backbone:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor of that state-dict name belongs to the architecture, but to a part that `out_indices` leaves
        out: the stages after the last used one, the way there, and the norms of outputs that nobody asked for."""
        norm, stage = _OUTPUT_NORM.match(name), _STAGE.match(name)
        if norm:
            return int(norm[1]) < len(self.depths) and int(norm[1]) not in self.out_indices
        if not stage or stage[1] != self.stages_name or int(stage[2]) >= len(self.depths):
            return False
        number = int(stage[2])
        return number >= self.built_stages or (
            number == self.built_stages - 1 < len(self.depths) - 1 and bool(stage[3])
        )

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The depth of a parameter and the number of depths, as mmpretrain's layer-wise learning rates ask for them.

        0 for the tokenizer, then one per block, which its stage's downsampler and norm share if it is the last; the
        largest depth is that of whatever is not the backbone.

        Args:
            param_name: its name in the whole model.
            prefix: what stands before the backbone's names there, such as "backbone.".
        """
        depths = self.depths[: self.built_stages]
        top = sum(depths) + 1
        inside = param_name.startswith(prefix)
        return (layer_depth(param_name.removeprefix(prefix), depths) if inside else top), top + 1

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script, for a model with this backbone in it, too."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace under torch.no_grad() (in "
            "Detectron2 with its TracingAdapter), torch.export or `dinat export`"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # tensors of parts that this model leaves out are none that it does not expect
        for key in [key for key in state_dict if key.startswith(prefix) and self.is_left_out(key[len(prefix) :])]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages = getattr(self, self.stages_name)[: self.frozen_stages]
        norms = [getattr(self, f"norm{i}") for i in self.out_indices if i < self.frozen_stages]
        return [self.patch_embed, self.pos_drop, *stages, *norms]

    # ---- arguments

    @classmethod
    def _published(cls, arch: str | None) -> zoo.Arch | None:
        if arch is None:
            return None
        published = zoo.arch(arch)
        if published.family != cls.family:
            raise ValueError(
                f"arch={arch!r} belongs to {published.family}, not to {cls.family}; use {published.family}(arch=...)"
            )
        return published

    @classmethod
    def _given_or_published(cls, name: str, given: Any, published: zoo.Arch | None) -> Any:
        if given is not None:
            return given
        if published is None:
            names = [arch.name for arch in zoo.ARCHS.values() if arch.family == cls.family]
            raise ValueError(f"{cls.family} needs {name}=... or arch=..., one of {names}")
        return getattr(published, name)

    @classmethod
    def _dilations_and_kernel_size(
        cls,
        published: zoo.Arch | None,
        dilations: str | Sequence[Sequence[int]] | None,
        kernel_size: int | None,
        depths: Sequence[int],
    ) -> tuple[Sequence[Sequence[int]], int]:
        """One dilation per block of each stage. A setting brings its kernel size, and an `arch` of a family with
        dilations needs a setting or a list: with dilation 1 everywhere it would load a published file and be wrong."""
        if isinstance(dilations, str):
            if published is None:
                raise ValueError(
                    f"dilations={dilations!r} is a setting of published models and needs arch=... beside it"
                )
            setting = zoo.dilation_setting(published.name, dilations)
            if kernel_size not in (None, setting.kernel_size):
                raise ValueError(
                    f"kernel_size={kernel_size} contradicts dilations={dilations!r}, whose kernel size is "
                    f"{setting.kernel_size}: leave kernel_size out, or give the dilations as lists"
                )
            return setting.per_block(depths), setting.kernel_size
        if kernel_size is None:
            kernel_size = published.kernel_size if published else zoo.Arch.kernel_size
        settings = zoo.settings_of(cls.family)
        if dilations is None:
            if published and settings:
                raise ValueError(
                    f"{cls.family}(arch={published.name!r}) needs dilations=..., which belong to a task and a "
                    f"resolution: one of {', '.join(map(str, settings))}, or for each stage a list with one dilation "
                    "per block"
                )
            dilations = [[1] * depth for depth in depths]
        if not settings and any(dilation != 1 for stage in dilations for dilation in stage):
            raise ValueError(f"dilations={dilations}: {cls.family} has dilation 1 everywhere; use DiNAT")
        return dilations, kernel_size

    @classmethod
    def _unknown_arguments(cls, unknown: Iterable[str]) -> str:
        """A sentence on arguments that no backbone has, with the nearest that they have."""
        known = list(inspect.signature(BackboneBase.__init__).parameters)[1:-1]
        words = []
        for name in unknown:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            words.append(f"{name} (it has {near[0]})" if near else name)
        return (
            f"{cls.family} has no argument {', '.join(words)}; in a config, _delete_=True drops what was there for "
            f"another backbone. It has {', '.join(known)}"
        )

    @staticmethod
    def _stage_numbers(out_indices: Sequence[int] | None, stages: int) -> tuple[int, ...]:
        """`out_indices` as numbers from 0, in the order given."""
        if out_indices is None:
            return tuple(range(stages))
        given = [] if isinstance(out_indices, (int, str)) else list(out_indices)
        numbers = [i % stages for i in given if isinstance(i, int) and -stages <= i < stages]
        if isinstance(out_indices, (int, str)) or len(numbers) < len(given):
            raise ValueError(
                f"out_indices={out_indices!r}: expected stages 0 to {stages - 1} in a list, or -1 to -{stages} from the"
                " end"
            )
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"out_indices={list(out_indices)} names a stage twice: leave one of the two out")
        return tuple(numbers)

    @staticmethod
    def check_arguments(
        depths: Sequence[int],
        num_heads: Sequence[int],
        dilations: Sequence[Sequence[int]],
        frozen_stages: int,
    ) -> None:
        """ValueError where arguments do not fit together."""
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads={list(num_heads)} and depths={list(depths)} must have one entry per stage")
        lengths = [len(stage) for stage in dilations]
        if lengths != list(depths):
            raise ValueError(
                f"dilations has {lengths} entries per stage; expected one per block, depths={list(depths)}: {dilations}"
            )
        if frozen_stages not in range(-1, len(depths) + 1):
            raise ValueError(
                f"frozen_stages={frozen_stages}: expected -1 (nothing), 0 (the tokenizer) or up to {len(depths)} stages"
            )


class NAT(BackboneBase):
    """Neighborhood Attention Transformer (arXiv 2204.07143), a pyramid of feature maps.

    Args:
        arch: a name of `zoo.ARCHS` of this family; arguments given beside it win over its values.
        embed_dim, depths, num_heads, mlp_ratio, kernel_size: the architecture, where no `arch` names it.
        dilations: for DiNAT and DiNAT_s, with `arch` a setting of `zoo.DILATION_SETTINGS`, which brings its kernel
            size: "coco", "ade20k-512", "ade20k-640", "mask2former", "imagenet-224", ...; or one list per stage with one
            dilation per block. None stands for 1 everywhere: in NAT, and where no `arch` is given.
        qkv_bias, qk_scale: see `NeighborhoodAttention2D`.
        drop_rate, attn_drop_rate: dropout after the tokenizer, projections and MLPs; on the attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over all blocks.
        layer_scale: initial value of `gamma1` and `gamma2`; None stands for that of `arch`, or for no such parameters.
        rel_pos_bias: learned relative positional bias `rpb`, as in all published models.
        patch_norm: norm after the tokenizer.
        norm_layer: called with a width.
        in_chans: channels of the image.
        out_indices: stages whose normed features are returned, in this order, negative ones counted from the end; None
            for all. Stages after the last of them are neither built nor computed.
        frozen_stages: -1 for none, 0 for the tokenizer, n for the tokenizer and the first n stages with their norms.
        with_cp: activation checkpointing, block by block.
        backend: insist on one backend of the op.

    Raises:
        ValueError: an unknown `arch` or setting, an `arch` of another family, a DiNAT or DiNAT_s `arch` without
            `dilations`, arguments that do not fit together.
        TypeError: an unknown argument.

    `out_channels` and `out_strides` describe the returned maps.
    """

    family = "NAT"
    stages_name = "levels"
    tokenizer = ConvTokenizer
    downsampler = ConvDownsampler


class DiNAT(NAT):
    """Dilated Neighborhood Attention Transformer (arXiv 2209.15001); arguments as for `NAT`."""

    family = "DiNAT"


class DiNAT_s(BackboneBase):
    """DiNAT in Swin's frame (arXiv 2209.15001, section 3.4); arguments as for `NAT`."""

    family = "DiNAT_s"
    stages_name = "layers"
    tokenizer = PatchEmbed
    downsampler = PatchMerging
