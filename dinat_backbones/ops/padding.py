"""Maps smaller than kernel size times dilation: zero-padding of the input of qkv, and cropping of the op's result.

No other file pads or crops for the op. An axis shorter than ``kernel_size * dilation`` is padded at its end (bottom,
right) to exactly that; NATTEN 0.14 does the same, and published detection checkpoints depend on it.
"""

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
