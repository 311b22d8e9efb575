"""NAT, DiNAT and DiNAT_s as feature pyramids: the only backbone code of the package.

NAT and DiNAT (arXiv 2204.07143, 2209.15001) use overlapping 3x3 convolutions to tokenize and downsample; DiNAT_s keeps
Swin's frame (4x4 patches, 2x2 merging) around the same attention. Module names are those of the published checkpoints.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import zoo
from .attention import NeighborhoodAttention2D

# Of a hidden layer, when a CPU infers: from which size on it is worth cutting, and the size of the pieces. Smaller ones
# pay for it: every matrix product rearranges the weights anew.
LARGE_BYTES, PIECE_BYTES = 16 << 20, 2 << 20


class ConvTokenizer(nn.Module):
    """Two 3x3 stride-2 convolutions and a norm: ``[B, in_chans, H, W]`` to ``[B, ceil(H/4), ceil(W/4), embed_dim]``."""

    def __init__(self, in_chans: int, embed_dim: int, norm_layer: type[nn.Module] | None):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1),
        )
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # channels_last makes the permutation below a view of contiguous memory
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """A 3x3 stride-2 convolution and a norm: ``[B, H, W, C]`` to ``[B, ceil(H/2), ceil(W/2), 2C]``."""

    def __init__(self, dim: int, norm_layer: type[nn.Module]):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = norm_layer(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """Patches of side P: ``[B, in_chans, H, W]``, zero-padded to multiples of P, to ``[B, H/P, W/P, embed_dim]``."""

    def __init__(self, in_chans: int, embed_dim: int, norm_layer: type[nn.Module] | None, patch_size: int = 4):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2x2 pixels become one: ``[B, H, W, C]``, zero-padded to even sizes, to ``[B, H/2, W/2, 2C]`` rounded up."""

    def __init__(self, dim: int, norm_layer: type[nn.Module]):
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # published channel order, as (row, column): (0,0) (1,0) (0,1) (1,1)
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


class DropPath(nn.Module):
    """Stochastic depth: while training, drop a sample's residual branch with probability `p`, scale the others up."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        return x * (x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


class Mlp(nn.Module):
    """Linear, GELU, linear, each followed by dropout; ``[..., dim]`` to the same shape."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block on ``[B, H, W, dim]``; `layer_scale` adds learned factors `gamma1`, `gamma2`."""

    def __init__(self, dim, mlp_ratio, drop, drop_path, norm_layer, layer_scale, attention: nn.Module):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, self.hidden, drop)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._branch(self.attn(self.norm1(x)), self.gamma1)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.training or torch.is_grad_enabled() or x.device.type != "cpu" or traced:
            return x + self._branch(self.mlp(self.norm2(x)), self.gamma2)
        # In place, and some pixels of a large map at a time, whose hidden layer then stays in the cache.
        x = x.contiguous()
        pixels = x.flatten(0, 2)
        width = self.hidden * x.element_size()
        large = len(pixels) * width >= LARGE_BYTES
        for part in pixels.split(max(1, PIECE_BYTES // width) if large else len(pixels)):
            part += self._branch(self.mlp(self.norm2(part)), self.gamma2)
        return x

    def _branch(self, x, gamma):
        return self.drop_path(x if gamma is None else gamma * x)


class Stage(nn.Module):
    """A run of blocks, then (but for the last stage) a downsampler."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module | None, with_cp: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the feature map of this stage and the input of the next one, both ``[B, H, W, C]``."""
        for block in self.blocks:
            recompute = self.with_cp and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x, x if self.downsample is None else self.downsample(x)


class _Backbone(nn.Module):
    """What the three families share; see `NAT` for the arguments."""

    family: str
    stages_name: str  # attribute, hence state-dict prefix, of the stages
    tokenizer: type[nn.Module]
    downsampler: type[nn.Module]

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
        norm_layer: type[nn.Module] = nn.LayerNorm,
        in_chans: int = 3,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        named = self._named(arch)
        embed_dim, depths, num_heads, mlp_ratio = (
            self._given_or_named(name, given, named)
            for name, given in dict(
                embed_dim=embed_dim, depths=depths, num_heads=num_heads, mlp_ratio=mlp_ratio
            ).items()
        )
        if kernel_size is None:
            kernel_size = named.kernel_size if named else 7
        if layer_scale is None and named:
            layer_scale = named.layer_scale
        if isinstance(dilations, str):
            if arch is None:
                raise ValueError(f"dilations={dilations!r} names a row of the table, which needs arch=... beside it")
            dilations = zoo.dilations(arch, dilations)
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if out_indices is None:
            out_indices = range(len(depths))
        self._check(depths, num_heads, dilations, out_indices, frozen_stages)

        self.depths, self.num_heads, self.kernel_size = tuple(depths), tuple(num_heads), kernel_size
        self.dilations = tuple(map(tuple, dilations))
        self.out_indices, self.frozen_stages = tuple(out_indices), frozen_stages
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.stage_channels = tuple(widths)
        self.stage_strides = tuple(4 * 2**i for i in range(len(depths)))
        self.out_channels = tuple(self.stage_channels[i] for i in self.out_indices)
        self.out_strides = tuple(self.stage_strides[i] for i in self.out_indices)

        self.patch_embed = self.tokenizer(in_chans, embed_dim, norm_layer if patch_norm else None)
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path = rising(drop_path_rate, sum(depths))
        stages = nn.ModuleList()
        for i, width in enumerate(widths):
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
            downsample = self.downsampler(width, norm_layer) if i + 1 < len(widths) else None
            stages.append(Stage(blocks, downsample, with_cp))
        self.add_module(self.stages_name, stages)
        for i, width in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(f"norm{i}", norm_layer(width))
        self.apply(init_linear)
        self._freeze()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images ``[B, in_chans, H, W]`` of any size to one contiguous map ``[B, C_i, ceil(H/s_i), ceil(W/s_i)]`` per
        entry of `out_indices`, with ``C_i`` from `out_channels` and ``s_i`` from `out_strides`."""
        outs = []
        for i, features in enumerate(self.stage_maps(x)):
            if i in self.out_indices:
                outs.append(getattr(self, f"norm{i}")(features).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def stage_maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """What every stage makes of images, before its norm: ``[B, H_i, W_i, C_i]``, one stage at a time."""
        x = self.pos_drop(self.patch_embed(x))
        for stage in getattr(self, self.stages_name):
            features, x = stage(x)
            yield features

    def train(self, mode: bool = True):
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages = getattr(self, self.stages_name)[: self.frozen_stages]
        norms = [getattr(self, f"norm{i}") for i in self.out_indices if i < self.frozen_stages]
        return [self.patch_embed, self.pos_drop, *stages, *norms]

    def _freeze(self) -> None:
        for module in self._frozen():
            module.eval().requires_grad_(False)

    @classmethod
    def _named(cls, arch: str | None) -> zoo.Arch | None:
        if arch is None:
            return None
        named = zoo.arch(arch)
        if named.family != cls.family:
            raise ValueError(
                f"arch={arch!r} belongs to {named.family}, not to {cls.family}; use {named.family}(arch={arch!r})"
            )
        return named

    @classmethod
    def _given_or_named(cls, name: str, given, named: zoo.Arch | None):
        if given is not None:
            return given
        if named is None:
            names = [known for known, row in zoo.ARCHS.items() if row.family == cls.family]
            raise ValueError(f"{cls.family} needs {name}=... or arch=..., one of {names}")
        return getattr(named, name)

    @staticmethod
    def _check(depths, num_heads, dilations, out_indices, frozen_stages) -> None:
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads={list(num_heads)} and depths={list(depths)} must have one entry per stage")
        lengths = [len(stage) for stage in dilations]
        if lengths != list(depths):
            raise ValueError(
                f"dilations has {lengths} entries per stage; expected one per block, depths={list(depths)}: {dilations}"
            )
        wrong = [i for i in out_indices if i not in range(len(depths))]
        if wrong:
            raise ValueError(f"out_indices={list(out_indices)}: expected stages 0 to {len(depths) - 1}")
        if frozen_stages not in range(-1, len(depths) + 1):
            raise ValueError(
                f"frozen_stages={frozen_stages}: expected -1 (nothing), 0 (the tokenizer) or up to {len(depths)} stages"
            )


class NAT(_Backbone):
    """Neighborhood Attention Transformer (arXiv 2204.07143), a pyramid of feature maps.

    Args:
        arch: a name of `zoo.ARCHS` of this family; arguments given beside it win over its values.
        embed_dim, depths, num_heads, mlp_ratio, kernel_size: the architecture, where no `arch` names it.
        dilations: None (all 1), one list per stage with one dilation per block, or with `arch` a setting of the table:
            "coco", "ade20k-512", "ade20k-640", "imagenet-224", ... (`zoo.DILATION_SETTINGS`).
        qkv_bias, qk_scale: see `NeighborhoodAttention2D`.
        drop_rate, attn_drop_rate: dropout after the tokenizer, projections and MLPs; on the attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 over all blocks.
        layer_scale: initial value of `gamma1` and `gamma2`; None stands for that of `arch`, or for no such parameters.
        rel_pos_bias: learned relative positional bias `rpb`, as in all published models.
        patch_norm: norm after the tokenizer.
        norm_layer: called with a width.
        in_chans: channels of the image.
        out_indices: stages whose normed features are returned; None for all.
        frozen_stages: -1 for none, 0 for the tokenizer, n for the tokenizer and the first n stages with their norms.
        with_cp: activation checkpointing, block by block.
        backend: insist on one backend of the op.

    Raises:
        ValueError: an unknown `arch` or setting, an `arch` of another family, arguments that do not fit together.

    `out_channels` and `out_strides` describe the returned maps.
    """

    family = "NAT"
    stages_name = "levels"
    tokenizer = ConvTokenizer
    downsampler = ConvDownsampler


class DiNAT(NAT):
    """Dilated Neighborhood Attention Transformer (arXiv 2209.15001); arguments as for `NAT`."""

    family = "DiNAT"


class DiNAT_s(_Backbone):
    """DiNAT in Swin's frame (arXiv 2209.15001, section 3.4); arguments as for `NAT`."""

    family = "DiNAT_s"
    stages_name = "layers"
    tokenizer = PatchEmbed
    downsampler = PatchMerging


def rising(rate: float, blocks: int) -> Iterator[float]:
    """Stochastic depth of every block, from 0 up to `rate` in equal steps."""
    return (rate * i / max(1, blocks - 1) for i in range(blocks))


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and zero biases, as the published models began."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
