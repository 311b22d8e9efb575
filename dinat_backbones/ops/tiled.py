"""Neighborhood attention in plain PyTorch wherever it runs: tiles of queries attend densely to the keys they span.

Along each axis the queries of one residue class are cut into tiles of consecutive positions. A tile and all the keys
its windows touch form a small dense problem with a mask, that is, matrix products of a fixed size. Tiles are processed
in chunks of bounded size, and each chunk is recomputed for the backward pass instead of being kept.
"""

import math
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

TILE = 8  # queries per tile along an axis; wider tiles attend to more keys in vain, narrower ones make small products
CHUNK_ELEMENTS = 1 << 21  # logits in flight: 8 MiB in float32, and about three times that with what softmax needs


def unsupported(query, key, value, rpb, kernel_size, dilation, scale) -> list[str]:
    """Reasons, in words, why this call cannot run here: none."""
    return []


class _Axis(NamedTuple):
    """How one axis of `length` positions is cut; all int64 tensors."""

    queries: torch.Tensor  # [tiles, TILE] index on the axis; slots past the end of a class repeat its last position
    keys: torch.Tensor  # [tiles, TILE + K - 1] index on the axis; slots past the end repeat likewise
    bias: torch.Tensor  # [tiles, TILE, TILE + K - 1] bias index 0..2K-2, or 2K-1 where the key is not in the window
    slot: torch.Tensor  # [length] where each position's result is, counted in slots of `queries`


def _cut(length: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    longest = (length + dilation - 1) // dilation
    per_class = (longest + TILE - 1) // TILE
    residue = torch.arange(dilation, device=device).repeat_interleave(per_class)[:, None]
    first = (torch.arange(per_class, device=device) * TILE).repeat(dilation)[:, None]
    class_length = (length - residue + dilation - 1) // dilation

    def start(position):
        return torch.minimum((position - kernel_size // 2).clamp(min=0), class_length - kernel_size)

    position = torch.minimum(first + torch.arange(TILE, device=device), class_length - 1)
    key = start(torch.minimum(first, class_length - 1)) + torch.arange(TILE + kernel_size - 1, device=device)
    window = start(position)[:, :, None]
    inside = (key[:, None, :] >= window) & (key[:, None, :] < window + kernel_size) & (key < class_length)[:, None, :]
    bias = key[:, None, :] - position[:, :, None] + kernel_size - 1
    index = torch.arange(length, device=device)
    slot = (index % dilation) * per_class * TILE + index // dilation
    return _Axis(
        position * dilation + residue,
        torch.minimum(key, class_length - 1) * dilation + residue,
        torch.where(inside, bias, 2 * kernel_size - 1),
        slot,
    )


def _chunk(query, key, value, bias_table, rows: _Axis, columns: _Axis):
    """One chunk of row tiles: ``[B, tiles, TILE, column tiles, TILE, heads, head_dim]``."""
    batch, heads, dim = query.shape[0], query.shape[3], query.shape[4]
    row_tiles, column_tiles = len(rows.queries), len(columns.queries)

    def tiles(source, row_index, column_index):  # -> [B, row tiles, column tiles, heads, pixels of a tile, head_dim]
        out = source.index_select(1, row_index.flatten()).index_select(2, column_index.flatten())
        out = out.view(batch, row_tiles, row_index.shape[1], column_tiles, column_index.shape[1], heads, dim)
        return out.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    accumulate = bias_table.dtype
    logits = tiles(query, rows.queries, columns.queries) @ tiles(key, rows.keys, columns.keys).transpose(-1, -2)
    # the table by rows, then by columns: [heads, row tiles, TILE, span, column tiles, TILE, span]
    bias = bias_table.index_select(1, rows.bias.flatten()).index_select(2, columns.bias.flatten())
    bias = bias.view(heads, row_tiles, TILE, -1, column_tiles, TILE, columns.bias.shape[2])
    bias = bias.permute(1, 4, 0, 2, 5, 3, 6).flatten(3, 4).flatten(4, 5)
    weights = (logits.to(accumulate) + bias).softmax(-1).to(value.dtype)
    out = weights @ tiles(value, rows.keys, columns.keys)
    out = out.view(batch, row_tiles, column_tiles, heads, TILE, TILE, dim)
    return out.permute(0, 1, 4, 2, 5, 3, 6)


def attention(query, key, value, rpb, kernel_size, dilation, scale) -> torch.Tensor:
    """See `neighborhood_attention_2d`."""
    batch, height, width, heads, _ = query.shape
    rows = _cut(height, kernel_size, dilation, query.device)
    columns = _cut(width, kernel_size, dilation, query.device)
    span = 2 * kernel_size - 1
    accumulate = torch.promote_types(query.dtype, torch.float32)
    table = query.new_zeros(heads, span, span, dtype=accumulate) if rpb is None else rpb.to(accumulate)
    table = torch.nn.functional.pad(table, (0, 1, 0, 1), value=-math.inf)  # index 2K-1: not in the window

    per_row_tile = batch * heads * columns.bias.numel() * rows.bias[0].numel()
    step = max(1, CHUNK_ELEMENTS // max(1, per_row_tile))
    parts = []
    query = query * scale
    for at in range(0, len(rows.queries), step):
        part = _Axis(*(index[at : at + step] for index in rows))
        arguments = (query, key, value, table, part, columns)
        if torch.is_grad_enabled() and len(rows.queries) > step:
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk(*arguments))
    out = torch.cat(parts, 1).flatten(1, 2).flatten(2, 3)
    return out.index_select(1, rows.slot).index_select(2, columns.slot)
