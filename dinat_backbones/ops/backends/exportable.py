"""Neighborhood attention for export: standard tensor operations only, no loops, no branches on sizes.

The same tiles as `tiled`, all at once: along each axis the queries of a dilation group are split into tiles, and a tile
attends densely to the keys its windows touch. Every gather runs along one axis with a small index that is computed from
the map's height and width: a constant where these are fixed, part of the graph where they are open. The logits of the
whole map, about four times ``K * K`` per query, are in memory at once.

There are no branches on sizes that are open at export time; see `symbolic.new_size`. Only non-negative numbers are
divided, because integer division rounds towards zero in ONNX and down in Python.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .. import symbolic
from .base import Backend
from .tiled import TILE


class _Axis(NamedTuple):
    """How one axis is split into `tiles` of `size` queries and `reach` keys; int64 tensors, flattened."""

    tiles: int
    size: int
    reach: int
    queries: torch.Tensor  # [tiles * size] index on the axis
    keys: torch.Tensor  # [tiles * reach]
    bias: torch.Tensor  # [tiles * size * reach] bias index, or 2K-1 where the key is not in the window
    slots: torch.Tensor  # [length] where each position is among the queries


def _split_axis(length: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    longest = symbolic.new_size((length + dilation - 1) // dilation, kernel_size)
    per_group = symbolic.new_size((longest + TILE - 1) // TILE, 1)
    size = symbolic.new_size((longest + per_group - 1) // per_group, 2)
    reach = symbolic.new_size(symbolic.smaller(size + kernel_size - 1, longest), kernel_size)
    group = torch.arange(dilation, device=device)[:, None, None]
    group_length = (length - group + dilation - 1) // dilation
    first = torch.arange(per_group, device=device)[:, None] * size  # [per group, 1]

    def window_start(position: torch.Tensor) -> torch.Tensor:
        return torch.minimum((position - kernel_size // 2).clamp(min=0), group_length - kernel_size)

    # [dilation, per group, size or reach]; slots past the end of a group repeat its last position
    position = torch.minimum(first + torch.arange(size, device=device), group_length - 1)
    key = window_start(torch.minimum(first, group_length - 1)) + torch.arange(reach, device=device)
    start, key_slot = window_start(position)[..., None], key[:, :, None, :]
    inside = (key_slot >= start) & (key_slot < start + kernel_size)
    bias = torch.where(inside, key_slot - position[..., None] + kernel_size - 1, 2 * kernel_size - 1)
    index = torch.arange(length, device=device)
    return _Axis(
        tiles=dilation * per_group,
        size=size,
        reach=reach,
        queries=(position * dilation + group).flatten(),
        keys=(torch.minimum(key, group_length - 1) * dilation + group).flatten(),
        bias=bias.flatten(),
        # within a group the tiles follow each other, so that a position's slot is its position
        slots=index % dilation * (per_group * size) + index // dilation,
    )


class ExportableBackend(Backend):
    """Any device and dtype; preferred while a model is exported, otherwise used only when named."""

    traceable = True

    def automatic(self, device: torch.device) -> bool:
        """See `Backend`."""
        return symbolic.exporting()

    def attention(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> torch.Tensor:
        """See `Backend`."""
        query, key, value = qkv
        batch, height, width, heads, dim = query.shape
        rows = _split_axis(height, kernel_size, dilation, query.device)
        columns = _split_axis(width, kernel_size, dilation, query.device)
        accumulate = torch.promote_types(query.dtype, torch.float32)

        def tiles(
            tensor: torch.Tensor, row_index: torch.Tensor, column_index: torch.Tensor, tile_rows: int, tile_columns: int
        ) -> torch.Tensor:
            """``[B, H, W, heads, head_dim]`` to ``[B, row tiles, column tiles, heads, pixels of a tile, head_dim]``."""
            picked = tensor.index_select(1, row_index).index_select(2, column_index)
            picked = picked.reshape(batch, rows.tiles, tile_rows, columns.tiles, tile_columns, heads, dim)
            return picked.permute(0, 1, 3, 5, 2, 4, 6).reshape(
                batch, rows.tiles, columns.tiles, heads, tile_rows * tile_columns, dim
            )

        query = tiles(query * scale, rows.queries, columns.queries, rows.size, columns.size)
        key = tiles(key, rows.keys, columns.keys, rows.reach, columns.reach)
        value = tiles(value, rows.keys, columns.keys, rows.reach, columns.reach)
        bias = _tile_bias(rpb, rows, columns, kernel_size, heads, accumulate)
        logits = (query @ key.transpose(-1, -2)).to(accumulate) + bias
        out = logits.softmax(-1).to(value.dtype) @ value
        out = out.reshape(batch, rows.tiles, columns.tiles, heads, rows.size, columns.size, dim)
        out = out.permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(batch, rows.tiles * rows.size, columns.tiles * columns.size, heads, dim)
        return out.index_select(1, rows.slots).index_select(2, columns.slots)


def _tile_bias(
    rpb: torch.Tensor | None, rows: _Axis, columns: _Axis, kernel_size: int, heads: int, dtype: torch.dtype
) -> torch.Tensor:
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
