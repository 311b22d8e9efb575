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
    bottom, right = positions_missing(height, reach), positions_missing(width, reach)
    if _is_open(bottom) or _is_open(right) or bottom > 0 or right > 0:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


def crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The upper left `height` x `width` of ``[B, H, W, ...]``; `x` itself if it has that size."""
    if symbolic.exporting():
        # A slice needs to know which of two symbolic sizes is larger.
        if not (_is_open(height) or _is_open(width)) and x.shape[1] == height and x.shape[2] == width:
            return x
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        return x.index_select(1, rows).index_select(2, columns)
    if x.shape[1] == height and x.shape[2] == width:
        return x
    return x[:, :height, :width]


def positions_missing(length: int, reach: int) -> int:
    """How many positions an axis of `length` lacks; no branch on a symbolic length while exporting."""
    if not (symbolic.exporting() and _is_open(length)):
        return max(0, reach - length)
    padded = symbolic.new_size(torch.sym_max(length, reach), reach)
    torch._check(padded >= length)
    return padded - length


def _is_open(size: int) -> bool:
    return isinstance(size, torch.SymInt)
