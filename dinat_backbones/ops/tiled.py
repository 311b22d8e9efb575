"""Neighborhood attention in plain PyTorch wherever it runs: tiles of queries attend densely to the keys they span.

Along each axis the queries of one residue class are cut into tiles of consecutive positions. A tile and all the keys
its windows touch form a small dense problem with a mask, that is, matrix products of a fixed size. Tiles are processed
in chunks of bounded size; the backward pass recomputes each chunk's weights and adds up its gradients in place.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

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


class _Chunk(NamedTuple):
    """Some of the tiles; indices into the flattened map."""

    queries: torch.Tensor  # [tiles * queries of a tile]
    keys: torch.Tensor  # [tiles * keys of a tile]
    kinds: torch.Tensor  # [tiles] index into the bias


def _chunks(cut: Sequence[torch.Tensor], width: int, column_kinds: int, logits_per_tile: int) -> Iterator[_Chunk]:
    """`cut`: the queries, keys and kinds of the rows, then those of the columns."""
    row_queries, row_keys, row_kinds, column_queries, column_keys, kinds = cut

    def over(row, column):  # every row tile with every column tile: [row tiles, column tiles, row slots, column slots]
        return row[:, None, :, None], column[None, :, None, :]

    step = max(1, CHUNK_ELEMENTS // max(1, logits_per_tile * len(kinds)))
    for at in range(0, len(row_kinds), step):
        part = slice(at, at + step)
        query_row, query_column = over(row_queries[part], column_queries)
        key_row, key_column = over(row_keys[part], column_keys)
        yield _Chunk(
            (query_row * width + query_column).flatten(),
            (key_row * width + key_column).flatten(),
            (row_kinds[part, None] * column_kinds + kinds).flatten(),
        )


def _pick(source: torch.Tensor, index: torch.Tensor, tiles: int) -> torch.Tensor:
    """Pixels of ``[B, heads, H * W, head_dim]`` by tile: ``[B, heads, tiles, pixels of a tile, head_dim]``."""
    picked = source.index_select(2, index)
    return picked.unflatten(2, (tiles, len(index) // tiles))


def _weights(query, key, bias, chunk: _Chunk):
    """Queries and keys of a chunk by tile, and their attention weights in the dtype of `bias`."""
    tiles = len(chunk.kinds)
    query, key = _pick(query, chunk.queries, tiles), _pick(key, chunk.keys, tiles)
    logits = (query @ key.transpose(-1, -2)).to(bias.dtype) + bias.index_select(1, chunk.kinds)
    return query, key, logits.softmax(-1)


class _Attention(torch.autograd.Function):
    """On ``[B, heads, H * W, head_dim]``, the query scaled; `bias` is ``[heads, kinds, queries, keys]`` of a tile.

    Returns ``[B, heads, tiles * queries of a tile, head_dim]``.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, width, column_kinds, *cut):
        ctx.save_for_backward(query, key, value, bias, *cut)
        ctx.sizes = width, column_kinds, query.shape[0] * bias[:, 0].numel()
        parts = []
        for chunk in _chunks(cut, *ctx.sizes):
            weights = _weights(query, key, bias, chunk)[2].to(value.dtype)
            parts.append((weights @ _pick(value, chunk.keys, len(chunk.kinds))).flatten(2, 3))
        return torch.cat(parts, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, bias, *cut = ctx.saved_tensors
        grads = [torch.zeros_like(t, dtype=bias.dtype) for t in (query, key, value, bias)]
        grad_query, grad_key, grad_value, grad_bias = grads
        at = 0
        for chunk in _chunks(cut, *ctx.sizes):
            tiles = len(chunk.kinds)
            q, k, weights = _weights(query, key, bias, chunk)
            v = _pick(value, chunk.keys, tiles)
            g = grad_out[:, :, at : at + len(chunk.queries)].unflatten(2, (tiles, len(chunk.queries) // tiles))
            at += len(chunk.queries)

            def add(grad, index, tiled):
                grad.index_add_(2, index, tiled.flatten(2, 3).to(grad.dtype))

            add(grad_value, chunk.keys, weights.to(v.dtype).transpose(-1, -2) @ g)
            grad_logits = (g @ v.transpose(-1, -2)).to(weights.dtype)
            grad_logits = weights * (grad_logits - (weights * grad_logits).sum(-1, keepdim=True))
            grad_bias.index_add_(1, chunk.kinds, grad_logits.sum(0))
            grad_logits = grad_logits.to(q.dtype)
            add(grad_query, chunk.queries, grad_logits @ k)
            add(grad_key, chunk.keys, grad_logits.transpose(-1, -2) @ q)
        # one None for width, for column_kinds and for each of cut
        return *(grad.to(t.dtype) for grad, t in zip(grads, (query, key, value, bias), strict=True)), *[None] * 8


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
    bias = bias.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    query, key, value = (t.permute(0, 3, 1, 2, 4).flatten(2, 3) for t in (query * scale, key, value))
    out = _Attention.apply(query, key, value, bias, width, len(columns.bias), *rows[:3], *columns[:3])
    # Every position is taken from one slot; slots that repeat a position get no gradient.
    tile = rows.tile[:, None] * len(columns.kind) + columns.tile
    slot = (tile * rows.queries.shape[1] + rows.place[:, None]) * columns.queries.shape[1] + columns.place
    out = out.index_select(2, slot.flatten())
    return out.view(batch, heads, height, width, dim).permute(0, 2, 3, 1, 4).contiguous()
