"""The Triton kernels of neighborhood attention: forward, gradient of the query and the bias, gradient of key and value.

The positions of one dilation group (row % dilation, column % dilation) form a small map of their own, on which
attention is not dilated; neighbors on it are `dilation` apart in memory, so nothing is copied. A program takes one head
and one TILE_ROWS x TILE_COLUMNS tile of such a map and walks over the block of positions that can interact with it,
ROWS x COLUMNS at a time: matrix products on the tensor cores, masked to every query's window. "Rows" and "columns" in
this file always count inside the dilation group.

This module needs Triton when it is imported; with TRITON_INTERPRET=1 in the environment the kernels run in NumPy.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Sizes change from image to image; specializing kernels for them (a multiple of 16 or not, 1 or not) gains nothing.
SIZES = ["height", "width", "heads", "dilation"]


@triton.jit
def _window_start(position, length, KERNEL: tl.constexpr):
    """First key of the window of a query; it shifts at borders."""
    return tl.maximum(tl.minimum(position - KERNEL // 2, length - KERNEL), 0)


@triton.jit
def _key_range(first, length, TILE: tl.constexpr, KERNEL: tl.constexpr):
    """The keys [low, high) that queries first .. first + TILE - 1 attend to; empty for a tile past the end."""
    last = tl.minimum(first + TILE, length) - 1
    low = _window_start(first, length, KERNEL)
    return low, tl.where(first < length, _window_start(last, length, KERNEL) + KERNEL, low)


@triton.jit
def _query_range(first, length, TILE: tl.constexpr, KERNEL: tl.constexpr):
    """The queries [low, high) that attend to any of keys first .. first + TILE - 1; empty for a tile past the end.

    A key within the first KERNEL of an axis is in the window of every query before it, one within the last KERNEL in
    the window of every query after it, because windows shift at borders.
    """
    last = tl.minimum(first + TILE, length) - 1
    low = tl.where(first < KERNEL, 0, first - KERNEL // 2)
    high = tl.where(last >= length - KERNEL, length, last + KERNEL // 2 + 1)
    return low, tl.where(first < length, high, low)


@triton.jit
def _steps(dilation, row, column, WIDE: tl.constexpr):
    """Strides between neighboring rows and columns of a dilation group, from those of the map."""
    if WIDE:  # offsets inside one image need 64 bit; those of images always have them
        return dilation.to(tl.int64) * row, dilation.to(tl.int64) * column
    return dilation * row, dilation * column


@triton.jit
def _tile(
    stride_batch, stride_row, stride_column, stride_head, height, width, heads, dilation,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile of this program: its head; rows and columns of the dilation group, and the first ones of the tile; and
    where the group begins in query, key and value, and in an array [B, H, W, heads], 64 bit.

    Heads run fastest, because they are neighbors in memory, then tiles of one group, which share keys.
    """
    row_tiles = tl.cdiv(tl.cdiv(height, dilation), TILE_ROWS)
    column_tiles = tl.cdiv(tl.cdiv(width, dilation), TILE_COLUMNS)
    rest = tl.program_id(0)  # the y and z axes of a grid end at 65535
    head = rest % heads
    rest = rest // heads
    first_column = rest % column_tiles * TILE_COLUMNS
    rest = rest // column_tiles
    first_row = rest % row_tiles * TILE_ROWS
    rest = rest // row_tiles
    group_column = rest % dilation
    rest = rest // dilation
    group_row = rest % dilation
    batch = (rest // dilation).to(tl.int64)
    rows = tl.cdiv(height - group_row, dilation)
    columns = tl.cdiv(width - group_column, dilation)
    start = batch * stride_batch + head.to(tl.int64) * stride_head
    start += group_row.to(tl.int64) * stride_row + group_column.to(tl.int64) * stride_column
    pixel = ((batch * height + group_row) * width + group_column) * heads + head
    return head, rows, columns, first_row, first_column, start, pixel


@triton.jit
def _positions(first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of each of ROWS x COLUMNS positions."""
    slot = tl.arange(0, ROWS * COLUMNS)
    return first_row + slot // COLUMNS, first_column + slot % COLUMNS


@triton.jit
def _load(pointer, offsets, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[positions, BLOCK_DIM] with zeros outside."""
    dims = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None]
    if DIM < BLOCK_DIM:
        mask = mask & (dims < DIM)[None, :]
    return tl.load(pointer + (offsets[:, None] + dims[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(pointer, offsets, inside, values, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dims = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None]
    if DIM < BLOCK_DIM:
        mask = mask & (dims < DIM)[None, :]
    tl.store(pointer + (offsets[:, None] + dims[None, :]), values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _outside(distance, KERNEL: tl.constexpr):
    """Mask of a logit whose key is `distance` after the start of the window: 0 inside, else -inf."""
    inside = distance.to(tl.uint32, bitcast=True) < KERNEL  # 0 <= distance < KERNEL in one comparison
    return tl.where(inside, 0.0, float("-inf"))


@triton.jit
def _table(rpb, head, HAS_RPB: tl.constexpr, KERNEL: tl.constexpr, BLOCK_TABLE: tl.constexpr):
    """The bias table of a head, in registers: [BLOCK_TABLE], flat, float32; zeros where there is no bias."""
    SIZE: tl.constexpr = (2 * KERNEL - 1) * (2 * KERNEL - 1)
    if HAS_RPB:
        entry = tl.arange(0, BLOCK_TABLE)
        return tl.load(rpb + head * SIZE + entry, mask=entry < SIZE, other=0.0).to(tl.float32)
    else:
        return tl.zeros([BLOCK_TABLE], tl.float32)


@triton.jit
def _logits(
    left, right, outside_columns, k_row, k_column, q_row, q_column, q_row_start, table, scale,
    HAS_RPB: tl.constexpr, KERNEL: tl.constexpr, BLOCK_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Biased logits of a tile against a block, -inf outside of the windows. Queries on the left have positions [n, 1]
    and keys on the right [1, m], or the other way round."""
    logits = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale + outside_columns
    logits += _outside(k_row - q_row_start, KERNEL)
    if HAS_RPB:
        SPAN: tl.constexpr = 2 * KERNEL - 1
        distance = (k_row * SPAN + k_column) - (q_row * SPAN + q_column)
        index = (distance + (KERNEL - 1) * 2 * KERNEL) & (BLOCK_TABLE - 1)  # arbitrary outside of the window
        logits += tl.reshape(tl.gather(table, tl.reshape(index, [index.numel]), 0), index.shape)
    return logits


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, rpb, out, lse,
    stride_batch, stride_row, stride_column, stride_head, height, width, heads, dilation, scale,
    KERNEL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HAS_RPB: tl.constexpr, BLOCK_TABLE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, heads, DIM] and lse [B, H, W, heads], the base-2 logarithm of the softmax's denominator.

    An online softmax: each block of keys rescales the sums of the blocks before it.
    """
    head, rows, columns, first_row, first_column, start, first_pixel = _tile(
        stride_batch, stride_row, stride_column, stride_head, height, width, heads, dilation, TILE_ROWS, TILE_COLUMNS
    )
    query, key, value = query + start, key + start, value + start
    row_step, column_step = _steps(dilation, stride_row, stride_column, WIDE)
    pixel_row_step, pixel_column_step = _steps(dilation, width * heads, heads, WIDE)

    q_row, q_column = _positions(first_row, first_column, TILE_ROWS, TILE_COLUMNS)
    q_inside = (q_row < rows) & (q_column < columns)
    q_row_start = _window_start(q_row, rows, KERNEL)
    q_column_start = _window_start(q_column, columns, KERNEL)
    q = _load(query, q_row * row_step + q_column * column_step, q_inside, DIM, BLOCK_DIM)

    table = _table(rpb, head, HAS_RPB, KERNEL, BLOCK_TABLE)
    block_row, block_column = _positions(0, 0, ROWS, COLUMNS)
    low_row, high_row = _key_range(first_row, rows, TILE_ROWS, KERNEL)
    low_column, high_column = _key_range(first_column, columns, TILE_COLUMNS, KERNEL)
    # Finite, so that a block without a key of some query's window leaves that query's sums at zero and not at NaN
    highest = tl.full([TILE_ROWS * TILE_COLUMNS], -1e30, tl.float32)
    total = tl.zeros([TILE_ROWS * TILE_COLUMNS], tl.float32)
    result = tl.zeros([TILE_ROWS * TILE_COLUMNS, BLOCK_DIM], tl.float32)
    for at_column in range(low_column, high_column, COLUMNS):
        k_column = at_column + block_column
        block_offsets = block_row * row_step + k_column * column_step
        outside_columns = _outside(k_column[None, :] - q_column_start[:, None], KERNEL)
        for at_row in range(low_row, high_row, ROWS):
            k_row = at_row + block_row
            offsets = at_row * row_step
            k_inside = (k_row < high_row) & (k_column < high_column)
            k = _load(key + offsets, block_offsets, k_inside, DIM, BLOCK_DIM)
            logits = _logits(
                q, k, outside_columns, k_row[None, :], k_column[None, :], q_row[:, None], q_column[:, None],
                q_row_start[:, None], table, scale, HAS_RPB, KERNEL, BLOCK_TABLE, PRECISION,
            )  # fmt: skip
            new_highest = tl.maximum(highest, tl.max(logits, 1))
            weights = tl.exp2(logits * LOG2E - (new_highest * LOG2E)[:, None])
            shrink = tl.exp2((highest - new_highest) * LOG2E)
            total = total * shrink + tl.sum(weights, 1)
            v = _load(value + offsets, block_offsets, k_inside, DIM, BLOCK_DIM)
            result = result * shrink[:, None]
            result = tl.dot(weights.to(v.dtype), v, result, input_precision=PRECISION)
            highest = new_highest

    pixels = q_row * pixel_row_step + q_column * pixel_column_step
    _store(out + first_pixel * DIM, pixels * DIM, q_inside, result / total[:, None], DIM, BLOCK_DIM)
    tl.store(lse + first_pixel + pixels, highest * LOG2E + tl.log2(total), mask=q_inside)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    query, key, value, rpb, out, lse, grad_out, grad_query, grad_rpb, delta,
    stride_batch, stride_row, stride_column, stride_head, height, width, heads, dilation, scale,
    KERNEL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HAS_RPB: tl.constexpr, BLOCK_TABLE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ATOMIC: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_query, delta = rowsum(grad_out * out) for the other kernel, and this tile's part of grad_rpb.

    grad_query is the first of three in [B, H, W, 3, heads, DIM]. grad_rpb is [heads, SPAN, SPAN], added to atomically,
    or with ATOMIC off [programs, SPAN, SPAN], to be summed up afterwards.
    """
    head, rows, columns, first_row, first_column, start, first_pixel = _tile(
        stride_batch, stride_row, stride_column, stride_head, height, width, heads, dilation, TILE_ROWS, TILE_COLUMNS
    )
    query, key, value = query + start, key + start, value + start
    row_step, column_step = _steps(dilation, stride_row, stride_column, WIDE)
    pixel_row_step, pixel_column_step = _steps(dilation, width * heads, heads, WIDE)
    SPAN: tl.constexpr = 2 * KERNEL - 1

    q_row, q_column = _positions(first_row, first_column, TILE_ROWS, TILE_COLUMNS)
    q_inside = (q_row < rows) & (q_column < columns)
    q_row_start = _window_start(q_row, rows, KERNEL)
    q_column_start = _window_start(q_column, columns, KERNEL)
    q = _load(query, q_row * row_step + q_column * column_step, q_inside, DIM, BLOCK_DIM)
    pixels = q_row * pixel_row_step + q_column * pixel_column_step
    q_out = _load(out + first_pixel * DIM, pixels * DIM, q_inside, DIM, BLOCK_DIM)
    q_grad_out = _load(grad_out + first_pixel * DIM, pixels * DIM, q_inside, DIM, BLOCK_DIM)
    q_delta = tl.sum(q_out.to(tl.float32) * q_grad_out.to(tl.float32), 1)
    tl.store(delta + first_pixel + pixels, q_delta, mask=q_inside)
    q_lse = tl.load(lse + first_pixel + pixels, mask=q_inside, other=float("inf"))  # weights of no query: zero

    table = _table(rpb, head, HAS_RPB, KERNEL, BLOCK_TABLE)
    block_row, block_column = _positions(0, 0, ROWS, COLUMNS)
    low_row, high_row = _key_range(first_row, rows, TILE_ROWS, KERNEL)
    low_column, high_column = _key_range(first_column, columns, TILE_COLUMNS, KERNEL)
    bins = tl.arange(0, BLOCK_SPAN)
    pair_columns = tl.arange(0, TILE_COLUMNS * COLUMNS)  # (query column, key column)
    pair_rows = tl.arange(0, TILE_ROWS * ROWS)  # (query row, key row)
    result = tl.zeros([TILE_ROWS * TILE_COLUMNS, BLOCK_DIM], tl.float32)
    sums = tl.zeros([BLOCK_SPAN, BLOCK_SPAN], tl.float32)
    for at_column in range(low_column, high_column, COLUMNS):
        if HAS_RPB:
            bin_column = (at_column + pair_columns % COLUMNS) - (first_column + pair_columns // COLUMNS) + KERNEL - 1
            to_column = (bin_column[:, None] == bins[None, :]).to(tl.float32).to(q.dtype)
        k_column = at_column + block_column
        block_offsets = block_row * row_step + k_column * column_step
        outside_columns = _outside(k_column[None, :] - q_column_start[:, None], KERNEL)
        for at_row in range(low_row, high_row, ROWS):
            k_row = at_row + block_row
            offsets = at_row * row_step
            k_inside = (k_row < high_row) & (k_column < high_column)
            k = _load(key + offsets, block_offsets, k_inside, DIM, BLOCK_DIM)
            v = _load(value + offsets, block_offsets, k_inside, DIM, BLOCK_DIM)
            logits = _logits(
                q, k, outside_columns, k_row[None, :], k_column[None, :], q_row[:, None], q_column[:, None],
                q_row_start[:, None], table, scale, HAS_RPB, KERNEL, BLOCK_TABLE, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(logits * LOG2E - q_lse[:, None])
            grad_weights = tl.dot(q_grad_out, tl.trans(v), input_precision=PRECISION)
            grad_logits = (weights * (grad_weights - q_delta[:, None])).to(k.dtype)
            result = tl.dot(grad_logits, k, result, input_precision=PRECISION)
            if HAS_RPB:
                # Sums over pairs of equal distance are products with zeros and ones: first columns, then rows.
                pairs = tl.reshape(grad_logits, [TILE_ROWS, TILE_COLUMNS, ROWS, COLUMNS])
                pairs = tl.reshape(tl.permute(pairs, [0, 2, 1, 3]), [TILE_ROWS * ROWS, TILE_COLUMNS * COLUMNS])
                by_column = tl.dot(pairs, to_column, input_precision=PRECISION)
                bin_row = (at_row + pair_rows % ROWS) - (first_row + pair_rows // ROWS) + KERNEL - 1
                to_row = (bins[:, None] == bin_row[None, :]).to(tl.float32)
                if BLOCK_SPAN == 16 or q.dtype == tl.float32:
                    sums = tl.dot(to_row, by_column, sums, input_precision="ieee")
                else:  # in two halves of 16 bits, which the tensor cores take
                    to_row = to_row.to(tl.bfloat16)
                    high = by_column.to(tl.bfloat16)
                    sums = tl.dot(to_row, high, sums)
                    sums = tl.dot(to_row, (by_column - high.to(tl.float32)).to(tl.bfloat16), sums)

    grad_query += (first_pixel - head) * 3 * DIM + head * DIM
    _store(grad_query, pixels * 3 * DIM, q_inside, result * scale, DIM, BLOCK_DIM)
    if HAS_RPB:
        which = head if ATOMIC else tl.program_id(0)
        entries = grad_rpb + which.to(tl.int64) * SPAN * SPAN + bins[:, None] * SPAN + bins[None, :]
        mask = (bins < SPAN)[:, None] & (bins < SPAN)[None, :]
        if ATOMIC:
            tl.atomic_add(entries, sums, mask=mask, sem="relaxed")
        else:
            tl.store(entries, sums, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    query, key, value, rpb, lse, grad_out, delta, grad_key, grad_value,
    stride_batch, stride_row, stride_column, stride_head, height, width, heads, dilation, scale,
    KERNEL: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HAS_RPB: tl.constexpr, BLOCK_TABLE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a tile of keys, the second and third of three in [B, H, W, 3, heads, DIM]."""
    head, rows, columns, first_row, first_column, start, first_pixel = _tile(
        stride_batch, stride_row, stride_column, stride_head, height, width, heads, dilation, TILE_ROWS, TILE_COLUMNS
    )
    query, key, value = query + start, key + start, value + start
    row_step, column_step = _steps(dilation, stride_row, stride_column, WIDE)
    pixel_row_step, pixel_column_step = _steps(dilation, width * heads, heads, WIDE)

    k_row, k_column = _positions(first_row, first_column, TILE_ROWS, TILE_COLUMNS)
    k_inside = (k_row < rows) & (k_column < columns)
    offsets = k_row * row_step + k_column * column_step
    k = _load(key, offsets, k_inside, DIM, BLOCK_DIM)
    v = _load(value, offsets, k_inside, DIM, BLOCK_DIM)

    table = _table(rpb, head, HAS_RPB, KERNEL, BLOCK_TABLE)
    block_row, block_column = _positions(0, 0, ROWS, COLUMNS)
    low_row, high_row = _query_range(first_row, rows, TILE_ROWS, KERNEL)
    low_column, high_column = _query_range(first_column, columns, TILE_COLUMNS, KERNEL)
    k_result = tl.zeros([TILE_ROWS * TILE_COLUMNS, BLOCK_DIM], tl.float32)
    v_result = tl.zeros([TILE_ROWS * TILE_COLUMNS, BLOCK_DIM], tl.float32)
    for at_column in range(low_column, high_column, COLUMNS):
        q_column = at_column + block_column
        q_column_start = _window_start(q_column, columns, KERNEL)
        block_offsets = block_row * row_step + q_column * column_step
        block_pixels = block_row * pixel_row_step + q_column * pixel_column_step
        outside_columns = _outside(k_column[:, None] - q_column_start[None, :], KERNEL)
        for at_row in range(low_row, high_row, ROWS):
            q_row = at_row + block_row
            q_inside = (q_row < high_row) & (q_column < high_column)
            q = _load(query + at_row * row_step, block_offsets, q_inside, DIM, BLOCK_DIM)
            pixel = first_pixel + at_row * pixel_row_step
            q_grad_out = _load(grad_out + pixel * DIM, block_pixels * DIM, q_inside, DIM, BLOCK_DIM)
            q_lse = tl.load(lse + pixel + block_pixels, mask=q_inside, other=float("inf"))  # weights of no query: zero
            q_delta = tl.load(delta + pixel + block_pixels, mask=q_inside, other=0.0)
            q_row_start = _window_start(q_row, rows, KERNEL)
            logits = _logits(  # [keys, queries]
                k, q, outside_columns, k_row[:, None], k_column[:, None], q_row[None, :], q_column[None, :],
                q_row_start[None, :], table, scale, HAS_RPB, KERNEL, BLOCK_TABLE, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(logits * LOG2E - q_lse[None, :])
            v_result = tl.dot(weights.to(q.dtype), q_grad_out, v_result, input_precision=PRECISION)
            grad_weights = tl.dot(v, tl.trans(q_grad_out), input_precision=PRECISION)
            grad_logits = (weights * (grad_weights - q_delta[None, :])).to(q.dtype)
            k_result = tl.dot(grad_logits, q, k_result, input_precision=PRECISION)

    start = (first_pixel - head) * 3 * DIM + head * DIM
    offsets = (k_row * pixel_row_step + k_column * pixel_column_step) * 3 * DIM
    _store(grad_key + start, offsets, k_inside, k_result * scale, DIM, BLOCK_DIM)
    _store(grad_value + start, offsets, k_inside, v_result, DIM, BLOCK_DIM)
