"""The attention modules: neighborhood attention (project to qkv, attend, project), and global attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .layers import per_sample
from .mlp import is_ordinary, is_ordinary_in_graph, linear
from .ops import (
    neighborhood_attention_2d,
    neighborhood_attention_2d_qkvpacked,
    neighborhood_attention_2d_with_weights,
)
from .ops.checks import check_window
from .ops.padding import crop, is_padded, pad_to_reach

# torch.fx, with which torchvision extracts features, records calls of what decides by sizes instead of tracing them.
for _function in (
    "crop",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_qkvpacked",
    "neighborhood_attention_2d_with_weights",
    "pad_to_reach",
):
    torch.fx.wrap(_function)


def _can_pad_later(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer on a CPU makes its bias of the zeros around `x`, and nobody can tell that it misses them."""
    if type(layer) is not nn.Linear:
        return False
    return is_ordinary_in_graph(layer, x) if torch.compiler.is_dynamo_compiling() else is_ordinary(layer, x)


class _Attention2D(nn.Module):
    """Layers of both attention modules, under the published names; `span` is the side of a bias table."""

    rpb: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        span: int,
        *,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
        rel_pos_bias: bool,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} is not a multiple of num_heads={num_heads}; every head needs the same number of channels"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, span, span))
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)


@per_sample
class NeighborhoodAttention2D(_Attention2D):
    """Multi-head neighborhood self-attention over a map ``[B, H, W, dim]`` of any height and width.

    A map smaller than ``kernel_size * dilation`` counts as zero-padded at the bottom and the right *before* `qkv`: the
    padded keys and values equal the bias of `qkv` and take part in the attention, and the result is cropped before
    `proj`; published detection checkpoints depend on it (NATTEN 0.14, ``NeighborhoodAttention2D``). See
    `ops/padding.py`.

    Args:
        dim: channels; a multiple of `num_heads`.
        num_heads: number of heads.
        kernel_size: side of the window, odd, at least 3.
        dilation: step between neighbors, at least 1.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: multiplies the query; None stands for ``head_dim ** -0.5``.
        attn_drop, proj_drop: dropout on the attention weights and on the output. With ``attn_drop > 0`` training
            runs in plain PyTorch and holds the weights in memory.
        rel_pos_bias: whether there is a learned table `rpb` ``[heads, 2K-1, 2K-1]``.
        backend: of the op, see `neighborhood_attention_2d`.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rel_pos_bias: bool = True,
        backend: str | None = None,
    ):
        check_window(kernel_size, dilation)
        super().__init__(
            dim,
            num_heads,
            2 * kernel_size - 1,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            rel_pos_bias=rel_pos_bias,
        )
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.backend = backend

    def forward(
        self, x: torch.Tensor, return_attention: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``[B, H, W, dim]`` to the same shape and dtype.

        With `return_attention` also the weights before dropout, ``[B, H, W, heads, K, K]`` (window rows, then columns)
        in float32, computed in plain PyTorch.
        """
        height, width = x.shape[1], x.shape[2]
        with_weights = return_attention or (self.training and self.attn_drop.p > 0)
        qkv, padding = self._project(x, pad_later=not with_weights)
        settings: dict[str, Any] = dict(kernel_size=self.kernel_size, dilation=self.dilation, scale=self.scale)
        if with_weights:
            query, key, value = qkv if len(qkv) == 3 else qkv[0].unbind(3)
            x, attention = neighborhood_attention_2d_with_weights(
                query, key, value, self.rpb, dropout=self.attn_drop, **settings
            )
        elif len(qkv) == 3:
            query, key, value = qkv
            x = neighborhood_attention_2d(
                query, key, value, self.rpb, padding=padding, backend=self.backend, **settings
            )
        else:
            x = neighborhood_attention_2d_qkvpacked(qkv[0], self.rpb, padding=padding, backend=self.backend, **settings)
        # contiguous, because F.linear would multiply each row of a cropped map by a copy of the weight
        x = self.proj_drop(linear(self.proj, crop(x, height, width).contiguous().flatten(-2)))
        return (x, crop(attention, height, width)) if return_attention else x

    def _projections(self) -> tuple[nn.Linear, ...]:
        """One layer for packed qkv, or three for query, key and value."""
        return (self.qkv,)

    def _project(self, x: torch.Tensor, *, pad_later: bool) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """The projections of a map and, if one may `pad_later`, what the op is to pad them with.

        Otherwise that is None, and the map is zero-padded before.
        """
        layers, reach = self._projections(), self.kernel_size * self.dilation
        pad_later = pad_later and all(_can_pad_later(layer, x) for layer in layers) and is_padded(x, reach)
        if not pad_later:
            x = pad_to_reach(x, reach)
        heads = self.num_heads, self.head_dim
        qkv = [linear(layer, x).unflatten(-1, heads if len(layers) == 3 else (3, *heads)) for layer in layers]
        if not pad_later:
            return qkv, None
        biases: list[torch.Tensor] = [
            x.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias for layer in layers
        ]
        return qkv, torch.cat(biases).view(3, *heads).to(qkv[0].dtype)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, rel_pos_bias={self.rpb is not None}"
        )


@per_sample
class GlobalAttention2D(_Attention2D):
    """Multi-head self-attention over a whole map ``[B, size, size, dim]`` with a learned relative positional bias.

    It is neighborhood attention with a window that covers the map, ``kernel_size=size``, odd or even: the bias of a
    pair is ``rpb[:, key_row - query_row + size - 1, key_column - query_column + size - 1]``. It is the attention of
    ViT-rpb, with which the DiNAT paper (arXiv 2209.15001) compares its isotropic models.

    Args:
        size: side of the map, at least 1.
        dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, rel_pos_bias: see `NeighborhoodAttention2D`.

    Raises:
        ValueError: arguments that do not fit together; in the forward pass, a map of another size.

    As in the published files, the buffer `relative_position_index` ``[size**2, size**2]`` (query, key), int64, holds
    the index of every pair's bias in a flattened table.
    """

    relative_position_index: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: int,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rel_pos_bias: bool = True,
    ):
        if size < 1:
            raise ValueError(f"size={size}: expected at least 1")
        super().__init__(
            dim,
            num_heads,
            2 * size - 1,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            rel_pos_bias=rel_pos_bias,
        )
        self.size = size
        if rel_pos_bias:
            # With pixels numbered in rows of 2 * size - 1, differences are offsets in a flattened table of that width.
            pixels = torch.arange(size)
            number = ((2 * size - 1) * pixels[:, None] + pixels).flatten()
            self.register_buffer("relative_position_index", number - number[:, None] + number[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, size, size, dim]`` to the same shape and dtype."""
        batch, height, width, dim = x.shape
        if height != self.size or width != self.size:
            raise ValueError(
                f"got a map of {height}x{width}; expected {self.size}x{self.size}, the only size that this attention "
                f"has a bias for: build the model for that image size (img_size=...)"
            )
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = None if self.rpb is None else self.rpb.flatten(1)[:, self.relative_position_index].to(query.dtype)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=drop, scale=self.scale)
        out: torch.Tensor = self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, height, width, dim)))
        return out

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, size={self.size}, "
            f"rel_pos_bias={self.rpb is not None}"
        )
