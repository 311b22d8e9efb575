"""Neighborhood attention in plain PyTorch wherever it runs: tiles of queries attend densely to the keys they span.

Along each axis the queries of one residue class are cut into tiles of consecutive positions. A tile and all the keys
its windows touch form a small dense problem with a mask, that is, matrix products of a fixed size. Tiles are processed
in chunks of bounded size, and each chunk is recomputed for the backward pass instead of being kept.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TILE = 8  # most queries per tile along an axis; wider ones see more keys in vain, narrower ones multiply slowly
CHUNK_ELEMENTS = 1 << 21  # logits in flight: 8 MiB in float32, and about three times that with what softmax needs


def unsupported(query, key, value, rpb, kernel_size, dilation, scale) -> list[str]:
    """Reasons, in words, why this call cannot run here: none."""
    return []


class _Axis(NamedTuple):
    """How one axis of `length` positions is cut; int64 tensors."""

    queries: torch.Tensor  # [tiles, size] index on the axis; slots past the end of a class repeat its last position
    keys: torch.Tensor  # [tiles, reach] index on the axis; slots past the end repeat likewise
    kind: torch.Tensor  # [tiles] tiles of one kind have the same windows; most are far from any border and of kind 0
    bias: torch.Tensor  # [kinds, size, reach] bias index 0..2K-2, or 2K-1 where the key is not in the window
    tile: torch.Tensor  # [length] the tile each position is in
    place: torch.Tensor  # [length] and where in it


def _cut(length: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    longest = -(-length // dilation)
    per_class = -(-longest // TILE)
    size = -(-longest // per_class)  # of equal tiles
    reach = min(size + kernel_size - 1, longest)
    kinds: list[tuple[int, int]] = []
    first, class_length, kind = [], [], []
    for r in range(dilation):
        for at in range(0, per_class * size, size):
            here = -(-(length - r) // dilation)
            inner = at >= kernel_size // 2 and at + size + kernel_size // 2 <= here
            name = (0, 0) if inner else (at, here)
            if name not in kinds:
                kinds.append(name)
            kind.append(kinds.index(name))
            first.append(min(at, here - 1))
            class_length.append(here)
    ends = torch.tensor(class_length, device=device)[:, None]
    start_of_tile = torch.tensor(first, device=device)[:, None]

    def window(position):
        return torch.minimum((position - kernel_size // 2).clamp(min=0), ends - kernel_size)

    position = torch.minimum(start_of_tile + torch.arange(size, device=device), ends - 1)
    key = window(start_of_tile) + torch.arange(reach, device=device)
    start = window(position)[:, :, None]
    inside = (key[:, None, :] >= start) & (key[:, None, :] < start + kernel_size)
    bias = torch.where(inside, key[:, None, :] - position[:, :, None] + kernel_size - 1, 2 * kernel_size - 1)
    example = torch.tensor([kind.index(k) for k in range(len(kinds))], device=device)
    residue = (torch.arange(dilation, device=device).repeat_interleave(per_class))[:, None]
    index = torch.arange(length, device=device)
    return _Axis(
        queries=position * dilation + residue,
        keys=torch.minimum(key, ends - 1) * dilation + residue,
        kind=torch.tensor(kind, device=device),
        bias=bias[example],
        tile=index % dilation * per_class + index // dilation // size,
        place=index // dilation % size,
    )


def _chunk(query, key, value, bias, rows: _Axis, columns: _Axis, width: int):
    """One chunk of row tiles: ``[B, heads, row tiles * column tiles * queries of a tile, head_dim]``.

    `query`, `key`, `value` are ``[B, heads, H * W, head_dim]``, `bias` is ``[heads, row kinds, column kinds, queries of
    a tile, keys of a tile]``.
    """
    batch, heads, _, dim = query.shape
    tiles = len(rows.kind) * len(columns.kind)

    def gather(source, row_index, column_index):
        index = row_index[:, None, :, None] * width + column_index[None, :, None, :]
        return source.index_select(2, index.flatten()).view(batch, heads, tiles, index[0, 0].numel(), dim)

    kinds = (rows.kind[:, None] * bias.shape[2] + columns.kind).flatten()
    bias = bias.flatten(1, 2).index_select(1, kinds)
    logits = gather(query, rows.queries, columns.queries) @ gather(key, rows.keys, columns.keys).transpose(-1, -2)
    weights = (logits.to(bias.dtype) + bias).softmax(-1).to(value.dtype)
    return (weights @ gather(value, rows.keys, columns.keys)).flatten(2, 3)


def attention(query, key, value, rpb, kernel_size, dilation, scale) -> torch.Tensor:
    """See `neighborhood_attention_2d`."""
    batch, height, width, heads, dim = query.shape
    rows = _cut(height, kernel_size, dilation, query.device)
    columns = _cut(width, kernel_size, dilation, query.device)
    span = 2 * kernel_size - 1
    accumulate = torch.promote_types(query.dtype, torch.float32)
    table = query.new_zeros(heads, span, span, dtype=accumulate) if rpb is None else rpb.to(accumulate)
    table = F.pad(table, (0, 1, 0, 1), value=-math.inf)  # index 2K-1: not in the window
    # [heads, row kinds, column kinds, query rows, query columns, key rows, key columns]
    bias = table[:, rows.bias[:, None, :, None, :, None], columns.bias[None, :, None, :, None, :]]
    bias = bias.flatten(3, 4).flatten(4, 5)

    query, key, value = ((t.permute(0, 3, 1, 2, 4).flatten(2, 3)).contiguous() for t in (query * scale, key, value))
    per_row_tile = batch * heads * len(columns.kind) * bias[0, 0, 0].numel()
    step = max(1, CHUNK_ELEMENTS // max(1, per_row_tile))
    parts = []
    for at in range(0, len(rows.kind), step):
        stop = at + step
        part = _Axis(rows.queries[at:stop], rows.keys[at:stop], rows.kind[at:stop], *rows[3:])
        arguments = (query, key, value, bias, part, columns, width)
        if torch.is_grad_enabled() and len(rows.kind) > step:
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk(*arguments))
    tile = rows.tile[:, None] * len(columns.kind) + columns.tile
    slot = (tile * rows.queries.shape[1] + rows.place[:, None]) * columns.queries.shape[1] + columns.place
    out = torch.cat(parts, 2).index_select(2, slot.flatten())
    return out.view(batch, heads, height, width, dim).permute(0, 2, 3, 1, 4).contiguous()
