"""The baselines: natten, FlexAttention with the same mask and bias, Swin and ConvNeXt."""

from collections.abc import Callable
from unittest import mock

import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

import dinat_backbones.attention

try:
    from natten.functional import natten2dav, natten2dqkrpb
except ImportError:
    natten2dav = natten2dqkrpb = None

NATTEN = "natten 0.14.6"
NEEDS_NATTEN = f"needs {NATTEN}: make bench-classic"


def natten_op(kernel_size: int, dilation: int) -> Callable:
    """Natten's three steps, on tensors in its own layout; the query is scaled beforehand."""

    def call(query, key, value, rpb):
        return natten2dav(
            natten2dqkrpb(query, key, rpb, kernel_size, dilation).softmax(-1), value, kernel_size, dilation
        )

    return call


def natten_attention(qkv, rpb, *, kernel_size, dilation, scale, padding, backend) -> torch.Tensor:
    """Stands in for `neighborhood_attention_2d_qkvpacked`, with the steps and layouts of the original module."""
    query, key, value = (t.permute(0, 3, 1, 2, 4) for t in qkv.unbind(3))
    return natten_op(kernel_size, dilation)(query * scale, key, value, rpb).permute(0, 2, 3, 1, 4)


def on_natten():
    """Our models on natten's kernels; maps are padded before the projection, as in the original module."""
    replaced = dict(neighborhood_attention_2d_qkvpacked=natten_attention, _can_pad_later=lambda layer, x: False)
    return mock.patch.multiple(dinat_backbones.attention, **replaced)


class Flex:
    """FlexAttention with our windows as its mask and our bias as its score modification.

    Tokens are sorted beforehand, outside of every timing: by residue class, then by squares of 8 x 8, so that its block
    mask is as sparse as it can be. Calls take ``[B, heads, tokens, head_dim]`` as `sort` returns it.
    """

    def __init__(self, size: tuple[int, int], kernel_size: int, dilation: int, device: str):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        height, width = size
        y = torch.arange(height, device=device).repeat_interleave(width)
        x = torch.arange(width, device=device).repeat(height)
        self.order = torch.arange(height * width, device=device)
        # stable sorts, the least important key first
        for key in (
            x // dilation % 8,
            y // dilation % 8,
            x // dilation // 8,
            y // dilation // 8,
            x % dilation,
            y % dilation,
        ):
            self.order = self.order[key[self.order].argsort(stable=True)]
        y, x = y[self.order], x[self.order]
        length_y, length_x = ((n - i % dilation + dilation - 1) // dilation for n, i in ((height, y), (width, x)))
        start_y, start_x = (
            torch.minimum((i // dilation - kernel_size // 2).clamp(min=0), length - kernel_size)
            for i, length in ((y, length_y), (x, length_x))
        )
        residue = y % dilation * dilation + x % dilation
        y, x = y // dilation, x // dilation

        def inside(batch, head, query, key):
            row, column = y[key] - start_y[query], x[key] - start_x[query]
            same = residue[query] == residue[key]
            return same & (row >= 0) & (row < kernel_size) & (column >= 0) & (column < kernel_size)

        tokens = height * width
        torch.compiler.reset()  # torch stops compiling a function after a few shapes
        # compiled, the mask of all pairs is never held
        mask = torch.compile(create_block_mask) if device == "cuda" else create_block_mask
        self.mask = mask(inside, None, None, tokens, tokens, device=device)
        self.attend = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
        last = 2 * kernel_size - 2

        def biased(rpb):
            def modify(score, batch, head, query, key):
                row = (y[key] - y[query] + kernel_size - 1).clamp(0, last)
                column = (x[key] - x[query] + kernel_size - 1).clamp(0, last)
                return score + rpb[head, row, column]

            return modify

        self.biased, self.table, self.modify = biased, None, None

    def sort(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, heads, head_dim]`` to ``[B, heads, tokens, head_dim]``."""
        return tensor.flatten(1, 2)[:, self.order].transpose(1, 2).contiguous()

    def __call__(self, query, key, value, rpb) -> torch.Tensor:
        if self.table is not rpb:  # a new function for every call would be compiled anew
            self.table, self.modify = rpb, self.biased(rpb)
        return self.attend(query, key, value, score_mod=self.modify, block_mask=self.mask)


class SwinPyramid(nn.Module):
    """Torchvision's Swin without its head, returning what a detector needs: four normed maps, as our backbones do."""

    def __init__(self, embed_dim: int = 96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate: float = 0.2):
        super().__init__()
        swin = SwinTransformer(
            [4, 4], embed_dim, list(depths), list(num_heads), [7, 7], stochastic_depth_prob=drop_path_rate
        )
        self.features = swin.features
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim * 2**i) for i in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                outs.append(self.norms[i // 2](x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)


def swin_large(**changes) -> SwinPyramid:
    return SwinPyramid(**dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)) | changes)


class ConvNeXtPyramid(nn.Module):
    """Torchvision's ConvNeXt-T without its head; its four maps."""

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.convnext_tiny(weights=None).features

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                outs.append(x)
        return tuple(outs)
