"""The layers of the backbones, from the patch embedding to a stage. Maps between layers are ``[B, H, W, C]``.

Module names are those of the published checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .mlp import Mlp, hooked, plain, watched

NormLayer = Callable[[int], nn.Module]  # called with a width
Module = TypeVar("Module", bound=type[nn.Module])

_PER_SAMPLE: set[type[nn.Module]] = {nn.LayerNorm, nn.Linear, nn.Dropout, nn.Identity}


def per_sample(module: Module) -> Module:
    """Marks a class of modules, not its subclasses: what it computes for a sample does not depend on the others."""
    _PER_SAMPLE.add(module)
    return module


per_sample(Mlp)


def check_images(x: torch.Tensor, channels: int | None) -> None:
    """ValueError unless these are images ``[B, channels, H, W]`` of floating point; None for any number of channels."""
    if x.dim() != 4:
        hint = "; one image without a batch dimension is given as images[None]" if x.dim() == 3 else ""
        raise ValueError(f"images of shape {list(x.shape)}: expected [B, {channels or 'C'}, H, W]{hint}")
    if channels is not None and x.shape[1] != channels:
        last = x.shape[3] == channels
        hint = (
            "images.permute(0, 3, 1, 2) moves the channels"
            if last
            else f"in_chans={x.shape[1]} builds a model for them"
        )
        raise ValueError(f"images of shape {list(x.shape)}: expected [B, {channels}, H, W]; {hint}")
    if not x.is_floating_point() and not x.is_quantized:
        raise ValueError(
            f"images of dtype {x.dtype}: expected floating point, normalized with the mean and standard deviation that "
            "the weights were trained with (zoo.IMAGENET_MEAN and IMAGENET_STD, of pixels from 0 to 255)"
        )


torch.fx.wrap("check_images")  # a call in traced graphs: they have no sizes to decide by


def normed(norm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``norm(x)`` of a map ``[B, H, W, C]``.

    Inductor takes any four-dimensional tensor on the way to a convolution for ``[B, C, H, W]`` that should be
    channels_last, and would store a map with large strides between channels. In graphs of torch.compile, layer norms
    and sums are therefore computed on ``[B, H * W, C]``.
    """
    if torch.compiler.is_dynamo_compiling() and type(norm) is nn.LayerNorm and _is_of_channels(norm):
        out: torch.Tensor = norm(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return out
    return norm(x)


def _is_of_channels(norm: nn.LayerNorm) -> bool:
    """Whether nobody can tell that the norm is called on ``[B, H * W, C]``."""
    return len(norm.normalized_shape) == 1 and not hooked(norm)


class ConvTokenizer(nn.Module):
    """Two 3x3 stride-2 convolutions and a norm: ``[B, in_chans, H, W]`` to ``[B, ceil(H/4), ceil(W/4), embed_dim]``."""

    def __init__(self, in_chans: int, embed_dim: int, norm_layer: NormLayer | None):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1),
        )
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, getattr(self.proj[0], "in_channels", None))
        # channels_last makes the permutation below a view of contiguous memory
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        x = normed(self.norm, x.permute(0, 2, 3, 1))
        return x


class ConvDownsampler(nn.Module):
    """A 3x3 stride-2 convolution and a norm: ``[B, H, W, C]`` to ``[B, ceil(H/2), ceil(W/2), 2C]``."""

    def __init__(self, dim: int, norm_layer: NormLayer):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = norm_layer(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            # Inductor saves the convolution's input for the backward pass, and fails to order the strides of a saved
            # view if they are open. A product is no view, and costs nothing: it is fused into what computes `x`.
            # `clone` would not do, since Inductor removes it. For the three dimensions in between see `normed`.
            x = x.flatten(1, 2).mT.unflatten(2, x.shape[1:3]) * 1
        else:
            x = x.permute(0, 3, 1, 2)
        x = normed(self.norm, self.reduction(x).permute(0, 2, 3, 1))
        return x


class PatchEmbed(nn.Module):
    """Patches of side P: ``[B, in_chans, H, W]``, zero-padded to multiples of P, to ``[B, H/P, W/P, embed_dim]``."""

    def __init__(self, in_chans: int, embed_dim: int, norm_layer: NormLayer | None, patch_size: int = 4):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, getattr(self.proj, "in_channels", None))
        x = F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        x = normed(self.norm, x.permute(0, 2, 3, 1))
        return x


class PatchMerging(nn.Module):
    """Merges 2x2 pixels into one: ``[B, H, W, C]``, zero-padded to even sizes, to ``[B, H/2, W/2, 2C]`` rounded up."""

    def __init__(self, dim: int, norm_layer: NormLayer):
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # published channel order, as (row, column): (0,0) (1,0) (0,1) (1,1)
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        x = self.reduction(self.norm(x))
        return x


@per_sample
class DropPath(nn.Module):
    """Stochastic depth of ``[B, H, W, C]``: in training, a sample's residual branch is dropped with probability `p`,
    else scaled up."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if not self.active else x * (self._draw(x) / (1 - self.p))

    @property
    def active(self) -> bool:
        """Whether it drops anything."""
        return self.training and self.p > 0

    def _draw(self, x: torch.Tensor) -> torch.Tensor:
        """1 for samples that keep their branch, 0 for those that drop it, ``[B, 1, 1, 1]``."""
        return x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.p)

    def add(self, x: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``x + self(branch(x))``, for which `branch` sees only the samples that keep it."""
        kept, scale = self._draw(x).flatten().nonzero().flatten(), 1 / (1 - self.p)
        if len(kept) == len(x):
            return torch.add(x, branch(x), alpha=scale)
        if not len(kept):
            # The first sample is computed, and multiplied by 0: optimizers and DDP expect gradients, even of zero.
            kept, scale = kept.new_zeros(1), 0.0
        out = branch(x.index_select(0, kept))
        dtype = torch.result_type(x, out)
        return x.to(dtype).index_add(0, kept, out.to(dtype), alpha=scale)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


class Block(nn.Module):
    """Pre-norm transformer block on ``[B, H, W, dim]``.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP, as a multiple of `dim`.
        drop: dropout in the MLP.
        drop_path: probability of stochastic depth.
        norm_layer: called with `dim`.
        layer_scale: initial value of the learned factors `gamma1`, `gamma2`; None for none.
        attention: ``[B, H, W, dim]`` to the same shape.
    """

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        norm_layer: NormLayer,
        layer_scale: float | None,
        attention: nn.Module,
    ):
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
        x = self._add(x, self.norm1, self.attn, self.gamma1)
        x = self._add(x, self.norm2, self.mlp, self.gamma2)
        return x

    def _add(
        self,
        x: torch.Tensor,
        norm: Callable[[torch.Tensor], torch.Tensor],
        layer: Callable[[torch.Tensor], torch.Tensor],
        gamma: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x` plus a residual branch."""

        def branch(x: torch.Tensor) -> torch.Tensor:
            return self._scaled(layer(normed(norm, x)), gamma)

        if torch.compiler.is_dynamo_compiling():  # see `normed`
            size, flat = x.shape[1:3], x.flatten(1, 2)
            flat = flat + self.drop_path(branch(flat.unflatten(1, size))).flatten(1, 2)
            out: torch.Tensor = flat.unflatten(1, size)
            return out
        return self.drop_path.add(x, branch) if self._can_skip(x) else x + self.drop_path(branch(x))

    @staticmethod
    def _scaled(x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
        return x if gamma is None else gamma * x

    def _can_skip(self, x: torch.Tensor) -> bool:
        """Whether branches need not be computed for the samples that drop them: where nobody can tell.

        A GPU would have to wait until the host knows which samples these are.
        """
        drop_path = self.drop_path
        if type(drop_path) is not DropPath or not drop_path.active or watched(x):
            return False
        inside = list(self.modules())[1:]
        return x.device.type == "cpu" and len(x) > 1 and plain(*inside, types=_PER_SAMPLE)


class Stage(nn.Module):
    """Blocks, then (except in the last stage) a downsampler; `with_cp`: activation checkpointing of each block."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module | None, with_cp: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the feature map of this stage and the input of the next one, both ``[B, H, W, C]``."""
        for block in self.blocks:
            x = run_block(block, x, self.with_cp)
        return x, x if self.downsample is None else self.downsample(x)


def run_block(block: nn.Module, x: torch.Tensor, with_cp: bool) -> torch.Tensor:
    """``block(x)``; if `with_cp` and gradients are on, the backward pass recomputes its activations."""
    recompute = with_cp and torch.is_grad_enabled() and not isinstance(x, torch.fx.Proxy)
    x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Stochastic depth of every block: from 0 in equal steps to `last`.

    Raises:
        ValueError: `last` is not in [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path_rate={last}: expected at least 0 and less than 1")
    return [last * i / max(1, blocks - 1) for i in range(blocks)]


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and zero biases, as in the original code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
