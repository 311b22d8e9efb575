"""Maps smaller than kernel size times dilation count as zero-padded before qkv, and the op's result is cropped.

No other file pads or crops for the op. An axis shorter than ``kernel_size * dilation`` is padded at its end (bottom,
right) to exactly that; NATTEN 0.14 does the same, and published detection checkpoints depend on it.
"""

from typing import Any

import torch
from torch.nn import functional as F

from . import symbolic


def pad_to_reach(x: torch.Tensor, reach: int) -> torch.Tensor:
    """Zero-pad a map ``[B, H, W, dim]`` to at least `reach` x `reach`.

    Args:
        x: the input of qkv.
        reach: ``kernel_size * dilation``, the least height and width that the op takes.

    Returns:
        ``[B, max(H, reach), max(W, reach), dim]``; `x` itself if it is large enough.
    """
    _, height, width, _ = x.shape
    if symbolic.known(height >= reach) and symbolic.known(width >= reach):
        return x
    return F.pad(x, (0, 0, 0, positions_missing(width, reach), 0, positions_missing(height, reach)))


def pad_projected(x: torch.Tensor, bias: torch.Tensor | None, reach: int) -> torch.Tensor:
    """``linear(pad_to_reach(map, reach))`` from ``x = linear(map)``: instead of projected zeros it has the bias.

    Args:
        x: ``[B, H, W, C]``; its sizes are fixed, not open.
        bias: of the linear layer, ``[C]``, or None.
        reach: see `pad_to_reach`.

    Returns:
        ``[B, max(H, reach), max(W, reach), C]``; `x` itself if it is large enough.
    """
    _, height, width, channels = x.shape
    if height >= reach and width >= reach:
        return x
    outside = x.new_zeros(channels) if bias is None else bias.to(x.dtype)
    out: torch.Tensor = _Pad.apply(x, outside, max(height, reach), max(width, reach))  # type: ignore[no-untyped-call]
    return out


class _Pad(torch.autograd.Function):
    """``[B, H, W, C]`` to ``[B, height, width, C]`` with the vector `outside` at the bottom and at the right.

    `torch.cat` would copy twice.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, outside: torch.Tensor, height: int, width: int) -> torch.Tensor:
        batch, ctx.height, ctx.width, channels = x.shape
        out = x.new_empty(batch, height, width, channels)
        out[:, : ctx.height, : ctx.width] = x
        out[:, : ctx.height, ctx.width :] = outside
        out[:, ctx.height :] = outside
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        right, bottom = grad[:, : ctx.height, ctx.width :], grad[:, ctx.height :]
        of_outside = _sum(right, 2) + _sum(bottom, 1) if ctx.needs_input_grad[1] else None
        return grad[:, : ctx.height, : ctx.width], of_outside, None, None


def _sum(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The sum over all axes of ``[B, H, W, C]`` but the last; over `axis` first, because torch sums up strided maps of
    float32 20 times as slowly at once (torch 2.11)."""
    return x.sum(axis).sum((0, 1))


def crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The upper left `height` x `width` of ``[B, H, W, ...]``; `x` itself if it has that size."""
    return _first(_first(x, 1, height), 2, width)


def _first(x: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    if symbolic.known(x.shape[axis] == length):
        return x
    if symbolic.known(x.shape[axis] > length):
        return x.narrow(axis, 0, length)
    # A slice would need to know which of two open sizes is larger, and whether its result is contiguous.
    return x.index_select(axis, torch.arange(length, device=x.device))


def positions_missing(length: int, reach: int) -> int:
    """How many positions an axis of `length` lacks; no branch on an open length."""
    padded = symbolic.larger(length, reach)
    if symbolic.exporting():
        padded = symbolic.new_size(padded, reach)
        torch._check(padded >= length)
    return padded - length
