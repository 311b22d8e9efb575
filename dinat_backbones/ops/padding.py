"""Maps smaller than kernel size times dilation count as zero-padded before qkv, and the op's result is cropped.

No other Python file pads or crops for the op; the kernel for CPUs does it without copies. An axis shorter than
``kernel_size * dilation`` is padded at its end (bottom, right) to exactly that; NATTEN 0.14 does the same, and
published detection checkpoints depend on it.
"""

from collections.abc import Sequence

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
    if not is_padded(x, reach):
        return x
    _, height, width, _ = x.shape
    return F.pad(x, (0, 0, 0, positions_missing(width, reach), 0, positions_missing(height, reach)))


def is_padded(x: torch.Tensor, reach: int) -> bool:
    """Whether a map ``[B, H, W, ...]`` is, or with open sizes may be, smaller than `reach` x `reach`."""
    return not (symbolic.known(x.shape[1] >= reach) and symbolic.known(x.shape[2] >= reach))


def pad_qkv(qkv: Sequence[torch.Tensor], padding: torch.Tensor | None, reach: int) -> Sequence[torch.Tensor]:
    """Query, key and value, or one packed tensor, with `padding` outside of the map; for backends that do not pad.

    Args:
        qkv: ``[B, H, W, heads, head_dim]`` each, or ``[B, H, W, 3, heads, head_dim]``.
        padding: ``[3, heads, head_dim]``; None for maps that are large enough.
        reach: see `pad_to_reach`.

    Returns:
        As many tensors of at least `reach` x `reach`; `qkv` itself if the map is large enough.
    """
    if padding is None or not is_padded(qkv[0], reach):
        return qkv
    outside = [padding] if len(qkv) == 1 else padding.unbind()
    return [_pad_with(x, pixel, reach) for x, pixel in zip(qkv, outside, strict=True)]


def _pad_with(x: torch.Tensor, pixel: torch.Tensor, reach: int) -> torch.Tensor:
    """Pad ``[B, H, W, ...]`` with `pixel` ``[...]``."""
    _, height, width, *rest = x.shape
    padded = pad_to_reach(x.flatten(3), reach).unflatten(-1, rest)
    rows, columns = (torch.arange(size, device=x.device) for size in padded.shape[1:3])
    inside = ((rows < height)[:, None] & (columns < width)).view(*padded.shape[1:3], *[1] * len(rest))
    return torch.where(inside, padded, pixel)


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
