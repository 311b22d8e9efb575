"""Neighborhood attention for export: standard tensor operations only, no loops, no branches on sizes.

The same tiles as `tiled`, all at once: along each axis the queries of a residue class are cut into tiles, and a tile
attends densely to the keys its windows touch. Every gather runs along one axis with a small index, which is arithmetic
on the map's height and width: a constant where these are fixed, part of the graph where they are not. The logits of the
whole map, about four times ``K * K`` per query, are in memory at once.

Sizes that are open at export time never decide anything here, and each one that is more than a sum gets a name of its
own (`opened`): torch would spend minutes on simplifying ceilings of ceilings. Quotients are of positive numbers, since
those of ONNX round towards zero and Python's down.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .tiled import TILE


def unsupported(query, key, value, rpb, kernel_size, dilation, scale) -> list[str]:
    """Reasons, in words, why this call cannot run here: none."""
    return []


def exporting() -> bool:
    """Whether torch.export is at work (alone or for ONNX), whose graphs should hold standard operations only."""
    compiler = torch.compiler
    # torch.compile, too, takes is_exporting() for true
    return hasattr(compiler, "is_exporting") and compiler.is_exporting() and not compiler.is_dynamo_compiling()


def opened(size: int, least: int) -> int:
    """A number known only when the graph runs, as a new unknown of at least `least`; any other as it is."""
    if not isinstance(size, torch.SymInt):
        return size
    unknown = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(unknown >= least)
    return unknown


def padding(length: int, reach: int) -> int:
    """Positions to add to one axis for a window of `reach`, without a branch on an open length."""
    if not isinstance(length, torch.SymInt):
        return max(0, reach - length)
    padded = opened(torch.sym_max(length, reach), reach)
    torch._check(padded >= length)
    return padded - length


def crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The upper left corner of ``[B, H, W, ...]``, in exactly this size."""
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


class _Axis(NamedTuple):
    """How one axis is cut into `tiles` of `size` queries and `reach` keys; int64 tensors, flattened."""

    tiles: int
    size: int
    reach: int
    queries: torch.Tensor  # [tiles * size] index on the axis
    keys: torch.Tensor  # [tiles * reach]
    bias: torch.Tensor  # [tiles * size * reach] bias index, or 2K-1 where the key is not in the window
    slots: torch.Tensor  # [length] where each position is among the queries


def _cut(length: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    longest = opened((length + dilation - 1) // dilation, kernel_size)
    per_class = opened((longest + TILE - 1) // TILE, 1)
    size = opened((longest + per_class - 1) // per_class, 2)
    reach = opened(torch.sym_min(size + kernel_size - 1, longest), kernel_size)
    residue = torch.arange(dilation, device=device)[:, None, None]
    ends = (length - residue + dilation - 1) // dilation  # length of each class
    first = torch.arange(per_class, device=device)[:, None] * size  # [per class, 1]

    def window(position):
        return torch.minimum((position - kernel_size // 2).clamp(min=0), ends - kernel_size)

    # [dilation, per class, size or reach]; slots past the end of a class repeat its last position
    position = torch.minimum(first + torch.arange(size, device=device), ends - 1)
    key = window(torch.minimum(first, ends - 1)) + torch.arange(reach, device=device)
    start, key_slot = window(position)[..., None], key[:, :, None, :]
    inside = (key_slot >= start) & (key_slot < start + kernel_size)
    bias = torch.where(inside, key_slot - position[..., None] + kernel_size - 1, 2 * kernel_size - 1)
    index = torch.arange(length, device=device)
    return _Axis(
        tiles=dilation * per_class,
        size=size,
        reach=reach,
        queries=(position * dilation + residue).flatten(),
        keys=(torch.minimum(key, ends - 1) * dilation + residue).flatten(),
        bias=bias.flatten(),
        # within a class the tiles follow each other, so that a position's slot is its position
        slots=index % dilation * (per_class * size) + index // dilation,
    )


def attention(query, key, value, rpb, kernel_size, dilation, scale) -> torch.Tensor:
    """See `neighborhood_attention_2d`."""
    batch, height, width, heads, dim = query.shape
    rows = _cut(height, kernel_size, dilation, query.device)
    columns = _cut(width, kernel_size, dilation, query.device)
    accumulate = torch.promote_types(query.dtype, torch.float32)

    def tiles(tensor, of_rows, of_columns, *counts):
        """``[B, H, W, heads, head_dim]`` to ``[B, row tiles, column tiles, heads, pixels of a tile, head_dim]``."""
        picked = tensor.index_select(1, of_rows).index_select(2, of_columns)
        picked = picked.reshape(batch, rows.tiles, counts[0], columns.tiles, counts[1], heads, dim)
        return picked.permute(0, 1, 3, 5, 2, 4, 6).reshape(
            batch, rows.tiles, columns.tiles, heads, counts[0] * counts[1], dim
        )

    query = tiles(query * scale, rows.queries, columns.queries, rows.size, columns.size)
    key = tiles(key, rows.keys, columns.keys, rows.reach, columns.reach)
    value = tiles(value, rows.keys, columns.keys, rows.reach, columns.reach)
    logits = (query @ key.transpose(-1, -2)).to(accumulate) + _bias(rpb, rows, columns, kernel_size, heads, accumulate)
    out = logits.softmax(-1).to(value.dtype) @ value
    out = out.reshape(batch, rows.tiles, columns.tiles, heads, rows.size, columns.size, dim).permute(
        0, 1, 4, 2, 5, 3, 6
    )
    out = out.reshape(batch, rows.tiles * rows.size, columns.tiles * columns.size, heads, dim)
    return out.index_select(1, rows.slots).index_select(2, columns.slots)


def _bias(rpb, rows: _Axis, columns: _Axis, kernel_size: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """``[row tiles, column tiles, heads or 1, queries of a tile, keys of a tile]``, -inf outside the windows."""
    span = 2 * kernel_size - 1
    if rpb is None:
        heads = 1
        table = torch.zeros(1, span, span, dtype=dtype, device=rows.bias.device)
    else:
        table = rpb.to(dtype)
    table = F.pad(table, (0, 1, 0, 1), value=-math.inf)
    table = table.index_select(1, rows.bias).index_select(2, columns.bias)
    table = table.reshape(heads, rows.tiles, rows.size, rows.reach, columns.tiles, columns.size, columns.reach)
    return table.permute(1, 4, 0, 2, 5, 3, 6).reshape(
        rows.tiles, columns.tiles, heads, rows.size * columns.size, rows.reach * columns.reach
    )
