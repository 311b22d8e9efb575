"""Neighborhood attention in plain PyTorch, for any device: tiles of queries attend densely to the keys they span.

Along each axis the queries of one dilation group are split into tiles of consecutive positions. A tile and all the keys
its windows touch form a small dense problem with a mask, that is, matrix products of a fixed size. Tiles are processed
in chunks of bounded size; the backward pass recomputes each chunk's weights and adds up its gradients in place.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .. import transforms
from .base import Backend

TILE = 8  # most queries per tile along an axis; larger tiles mask more logits, smaller ones multiply small matrices
CHUNK_ELEMENTS = 1 << 21  # logits in flight: 8 MiB in float32, and about three times that with what softmax needs


class _Axis(NamedTuple):
    """How one axis of `length` positions is split into tiles; int64 tensors.

    Tiles of one pattern have the same windows relative to their first query; most are far from any border and have
    pattern 0.
    """

    queries: torch.Tensor  # [tiles, size] index on the axis; slots past the end of a group repeat its last position
    keys: torch.Tensor  # [tiles, reach] index on the axis; slots past the end repeat likewise
    pattern: torch.Tensor  # [tiles] index into `bias`
    bias: torch.Tensor  # [patterns, size, reach] bias index 0..2K-2, or 2K-1 where the key is not in the window
    tile: torch.Tensor  # [length] the tile each position is in
    slot: torch.Tensor  # [length] and its place in that tile


def _split_axis(length: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    longest = -(-length // dilation)
    per_group = -(-longest // TILE)
    size = -(-longest // per_group)  # of equal tiles
    reach = min(size + kernel_size - 1, longest)
    patterns: list[tuple[int, int]] = []
    first, group_lengths, pattern = [], [], []
    for group in range(dilation):
        group_length = -(-(length - group) // dilation)
        for start in range(0, per_group * size, size):
            inner = start >= kernel_size // 2 and start + size + kernel_size // 2 <= group_length
            key = (0, 0) if inner else (start, group_length)
            if key not in patterns:
                patterns.append(key)
            pattern.append(patterns.index(key))
            first.append(min(start, group_length - 1))
            group_lengths.append(group_length)
    ends = torch.tensor(group_lengths, device=device)[:, None]
    start_of_tile = torch.tensor(first, device=device)[:, None]

    def window_start(position: torch.Tensor) -> torch.Tensor:
        return torch.minimum((position - kernel_size // 2).clamp(min=0), ends - kernel_size)

    position = torch.minimum(start_of_tile + torch.arange(size, device=device), ends - 1)
    keys = window_start(start_of_tile) + torch.arange(reach, device=device)
    window = window_start(position)[:, :, None]
    inside = (keys[:, None, :] >= window) & (keys[:, None, :] < window + kernel_size)
    bias = torch.where(inside, keys[:, None, :] - position[:, :, None] + kernel_size - 1, 2 * kernel_size - 1)
    example = torch.tensor([pattern.index(number) for number in range(len(patterns))], device=device)
    group_of_tile = (torch.arange(dilation, device=device).repeat_interleave(per_group))[:, None]
    index = torch.arange(length, device=device)
    return _Axis(
        queries=position * dilation + group_of_tile,
        keys=torch.minimum(keys, ends - 1) * dilation + group_of_tile,
        pattern=torch.tensor(pattern, device=device),
        bias=bias[example],
        tile=index % dilation * per_group + index // dilation // size,
        slot=index // dilation % size,
    )


class _Chunk(NamedTuple):
    """Some of the tiles; indices into the flattened map."""

    queries: torch.Tensor  # [tiles * queries of a tile]
    keys: torch.Tensor  # [tiles * keys of a tile]
    patterns: torch.Tensor  # [tiles] index into the bias


class _Tiling(NamedTuple):
    """How a map is split: the queries, keys and patterns of both axes (see `_Axis`), and three numbers."""

    row_queries: torch.Tensor
    row_keys: torch.Tensor
    row_patterns: torch.Tensor
    column_queries: torch.Tensor
    column_keys: torch.Tensor
    column_patterns: torch.Tensor
    width: int
    patterns_of_columns: int  # how many there are
    logits_per_tile: int


def _chunks(tiling: _Tiling) -> Iterator[_Chunk]:
    """All pairs of a row tile and a column tile, several rows of tiles at a time."""
    step = max(1, CHUNK_ELEMENTS // max(1, tiling.logits_per_tile * len(tiling.column_patterns)))
    for start in range(0, len(tiling.row_patterns), step):
        part = slice(start, start + step)
        patterns = tiling.row_patterns[part, None] * tiling.patterns_of_columns + tiling.column_patterns
        yield _Chunk(
            _pixels(tiling.row_queries[part], tiling.column_queries, tiling.width),
            _pixels(tiling.row_keys[part], tiling.column_keys, tiling.width),
            patterns.flatten(),
        )


def _pixels(rows: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """Indices into the map: [row tiles, column tiles, rows of a tile, columns of a tile], flattened."""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten()


def _gather_tiles(source: torch.Tensor, index: torch.Tensor, tiles: int) -> torch.Tensor:
    """Pixels of ``[B, heads, H * W, head_dim]`` by tile: ``[B, heads, tiles, pixels of a tile, head_dim]``."""
    tiled: torch.Tensor = source.index_select(2, index).unflatten(2, (tiles, len(index) // tiles))
    return tiled


def _tile_weights(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, chunk: _Chunk
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys of a chunk by tile, and their attention weights in the dtype of `bias`."""
    tiles = len(chunk.patterns)
    query, key = _gather_tiles(query, chunk.queries, tiles), _gather_tiles(key, chunk.keys, tiles)
    logits = (query @ key.transpose(-1, -2)).to(bias.dtype) + bias.index_select(1, chunk.patterns)
    return query, key, logits.softmax(-1)


def _attend_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, tiling: _Tiling
) -> torch.Tensor:
    """On ``[B, heads, H * W, head_dim]``, the query scaled; `bias` is ``[heads, patterns, queries, keys]`` of a tile.

    Returns ``[B, heads, tiles * queries of a tile, head_dim]``.
    """
    parts = []
    for chunk in _chunks(tiling):
        weights = _tile_weights(query, key, bias, chunk)[2].to(value.dtype)
        parts.append((weights @ _gather_tiles(value, chunk.keys, len(chunk.patterns))).flatten(2, 3))
    return torch.cat(parts, 2)


class _Attention(torch.autograd.Function):
    """`_attend_tiles` with a backward pass that holds one chunk of weights at a time."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, *tiling: Any
    ) -> torch.Tensor:
        *indices, width, patterns_of_columns, logits_per_tile = tiling
        ctx.save_for_backward(query, key, value, bias, *indices)
        ctx.sizes = width, patterns_of_columns, logits_per_tile
        return _attend_tiles(query, key, value, bias, _Tiling(*tiling))

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bias, *indices = ctx.saved_tensors  # read once: checkpointing recomputes them at each access
        tiling = _Tiling(*indices, *ctx.sizes)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _differentiable_gradients(grad_out, query, key, value, bias, tiling)
        else:
            grads = _gradients(grad_out, query, key, value, bias, tiling)
        return *grads, *[None] * len(tiling)


def _gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    tiling: _Tiling,
) -> list[torch.Tensor | None]:
    grads = [torch.zeros_like(t, dtype=bias.dtype) for t in (query, key, value, bias)]
    grad_query, grad_key, grad_value, grad_bias = grads
    start = 0
    for chunk in _chunks(tiling):
        tiles = len(chunk.patterns)
        q, k, weights = _tile_weights(query, key, bias, chunk)
        v = _gather_tiles(value, chunk.keys, tiles)
        g = grad_out[:, :, start : start + len(chunk.queries)].unflatten(2, (tiles, len(chunk.queries) // tiles))
        start += len(chunk.queries)

        _add_tiles(grad_value, chunk.keys, weights.to(v.dtype).transpose(-1, -2) @ g)
        grad_logits = (g @ v.transpose(-1, -2)).to(weights.dtype)
        grad_logits = weights * (grad_logits - (weights * grad_logits).sum(-1, keepdim=True))
        grad_bias.index_add_(1, chunk.patterns, grad_logits.sum(0))
        grad_logits = grad_logits.to(q.dtype)
        _add_tiles(grad_query, chunk.queries, grad_logits @ k)
        _add_tiles(grad_key, chunk.keys, grad_logits.transpose(-1, -2) @ q)
    return [grad.to(t.dtype) for grad, t in zip(grads, (query, key, value, bias), strict=True)]


def _add_tiles(grad: torch.Tensor, index: torch.Tensor, tiles: torch.Tensor) -> None:
    """The transpose of `_gather_tiles`: add tiles to the pixels they came from."""
    grad.index_add_(2, index, tiles.flatten(2, 3).to(grad.dtype))


def _differentiable_gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    tiling: _Tiling,
) -> list[torch.Tensor | None]:
    """As `_gradients`, by autograd, so that they can be differentiated again."""
    inputs = (query, key, value, bias)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(_attend_tiles(*inputs, tiling), wanted, grad_out, create_graph=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def plain_attention(
    qkv: Sequence[torch.Tensor],
    rpb: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
) -> torch.Tensor:
    """As `TiledBackend.attention`, through operations of PyTorch only: for second derivatives and `torch.func`.

    What autograd keeps is as large as all attention weights of the map.
    """
    return _attention(qkv, rpb, kernel_size, dilation, scale, plain=True)


def _attention(
    qkv: Sequence[torch.Tensor],
    rpb: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    plain: bool,
) -> torch.Tensor:
    query, key, value = qkv
    batch, height, width, heads, dim = query.shape
    rows = _split_axis(height, kernel_size, dilation, query.device)
    columns = _split_axis(width, kernel_size, dilation, query.device)
    span = 2 * kernel_size - 1
    accumulate = torch.promote_types(query.dtype, torch.float32)
    table = query.new_zeros(heads, span, span, dtype=accumulate) if rpb is None else rpb.to(accumulate)
    table = F.pad(table, (0, 1, 0, 1), value=-math.inf)  # index 2K-1: not in the window
    # [heads, row patterns, column patterns, query rows, query columns, key rows, key columns]
    bias = table[:, rows.bias[:, None, :, None, :, None], columns.bias[None, :, None, :, None, :]]
    bias = bias.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    logits_per_tile = batch * heads * bias.shape[2] * bias.shape[3]
    tiling = _Tiling(*rows[:3], *columns[:3], width, len(columns.bias), logits_per_tile)

    query, key, value = (t.permute(0, 3, 1, 2, 4).flatten(2, 3) for t in (query * scale, key, value))
    if plain:
        out = _attend_tiles(query, key, value, bias, tiling)
    else:
        out = _Attention.apply(query, key, value, bias, *tiling)  # type: ignore[no-untyped-call]
    # Every position is taken from one slot; slots that repeat a position get no gradient.
    tile = rows.tile[:, None] * len(columns.pattern) + columns.tile
    slot = (tile * rows.queries.shape[1] + rows.slot[:, None]) * columns.queries.shape[1] + columns.slot
    out = out.index_select(2, slot.flatten())
    return out.view(batch, heads, height, width, dim).permute(0, 2, 3, 1, 4).contiguous()


class TiledBackend(Backend):
    """Any device and dtype, any derivative."""

    def attention(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> torch.Tensor:
        """See `Backend`."""
        return _attention(qkv, rpb, kernel_size, dilation, scale, plain=transforms.active())
