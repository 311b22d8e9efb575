// A few query rows of one item with everything in reach of them, and the steps both passes share.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "na2d.h"
#include "products.h"
#include "rows.h"

namespace na2d {
namespace {

// Relative positions [low, high] that any lane of a vector of queries attends to; [inner_low, inner_high] all lanes do.
struct Range {
  int64_t low, inner_low, inner_high, high;
};

// Rows of one head, copied as pixels, [column][dim], in float32 or in pairs with the pixel `dilation` columns further. In the caller's
// arrays pixels are far apart, and would share few sets of the cache.
template <class T>
struct PixelRows {
  const Na2dProblem& p;
  const Na2dView& view;
  const Na2dView* const padding;  // of keys and values; null for queries, which are all in the map
  const Item& item;
  const int64_t begin, end, dims;  // columns that are there; dims: whole vectors
  float* const copies;

  PixelRows(const Na2dProblem& p, const Na2dView& view, const Na2dView* padding, const Item& item, int64_t begin, int64_t end,
            int64_t slots, float*& scratch)
      : p(p), view(view), padding(padding), item(item), begin(begin), end(end), dims(round_up(p.dim, L)), copies(scratch) {
    scratch += slots * (end - begin) * dims;
  }

  // Copies a map row to a slot.
  void fetch(int64_t slot, int64_t map_row) const {
    float* const copy = copies + slot * (end - begin) * dims;
    const int64_t inside = padding_begin(p, map_row, begin, end);
    if constexpr (kPairs<T>) {
      load_row_pairs(view, padding, p, item.batch, map_row, item.head, begin, inside, end, p.dilation, copy, dims);
    } else {
      if (inside > begin) load_row<T>(view, p, item.batch, map_row, item.head, begin, inside, copy, dims);
      if (inside < end) load_row<T>(*padding, p, 0, 0, item.head, inside, end, copy + (inside - begin) * dims, dims);
    }
  }
  const float* at(int64_t slot, int64_t column) const { return copies + (slot * (end - begin) + column - begin) * dims; }
};

// The part of scratch that is common to both passes, and the steps they share.
//
// Logits and weights of the vectors of queries [from, to) lie as [query row][window row][delta + K - 1][column], counted from
// vector `from` on.
template <class T>
struct Tile {
  const Na2dProblem& p;
  const Columns& columns;
  const Item& item;
  const int64_t K, span, dims, vector_dims, length;  // dims: lanes of planes; vector_dims: of pixels; length: of the group of rows
  const int64_t begin, end, vectors;                 // columns of the queries, begin a multiple of the vector width
  int64_t key_begin, key_end;                        // columns of their keys
  int64_t key_ld, query_ld, ring;
  float *keys, *queries;      // planes [row][dim][column], keys in a ring of rows; each row behind a left pad of L
  std::vector<Range> ranges;  // of every vector
  int64_t row = 0, rows = 0;  // the tile's query rows: group positions [row, row + rows)
  int64_t packed = -1;        // key rows below this are in the ring

  static int64_t key_columns(const Na2dProblem& p, int64_t columns) {
    return std::min(p.width, columns + 2 * (p.kernel - 1) * p.dilation);
  }
  static int64_t floats(const Na2dProblem& p, int64_t columns) {
    const int64_t dims = plane_rows<T>(p);
    return (kRows + p.kernel - 1) * dims * leading(key_columns(p, columns) + 3 * L) + kRows * dims * leading(columns + 3 * L);
  }

  Tile(const Na2dProblem& p, const Columns& columns, const Item& item, int64_t begin, int64_t end, float*& scratch)
      : p(p), columns(columns), item(item), K(p.kernel), span(2 * K - 1), dims(plane_rows<T>(p)),
        vector_dims(round_up(p.dim, L)), length(group_length(p.height, p.dilation, item.group)), begin(begin), end(end),
        vectors((end - begin + L - 1) / L), ring(kRows + K - 1) {
    key_begin = p.width, key_end = 0;
    for (int64_t x = begin; x < end; ++x) {
      key_begin = std::min(key_begin, x + columns.first[x] * p.dilation);
      key_end = std::max(key_end, x + columns.last[x] * p.dilation + 1);
    }
    key_ld = leading(key_end - key_begin + 3 * L), query_ld = leading(end - begin + 3 * L);
    keys = allocate_planes(scratch, ring * dims, key_ld, key_end - key_begin);
    queries = allocate_planes(scratch, kRows * dims, query_ld, end - begin);
    for (int64_t x = begin; x < end; x += L) {
      const auto firsts = std::minmax_element(columns.first + x, columns.first + std::min(x + L, end));
      ranges.push_back({*firsts.first, *firsts.second, *firsts.first + K - 1, *firsts.second + K - 1});
    }
  }

  static float* allocate(float*& scratch, int64_t floats) {
    float* const block = scratch;
    scratch += floats;
    return block;
  }
  // `rows` rows of `ld` floats, the first column behind a pad of L. The pads are zero: vectors at the ends read, and mask
  // away, up to L columns of them.
  static float* allocate_planes(float*& scratch, int64_t rows, int64_t ld, int64_t columns) {
    float* const block = allocate(scratch, rows * ld) + L;
    for (int64_t i = 0; i < rows; ++i) {
      float* const row = block + i * ld;
      std::fill(row - L, row, 0.f);
      std::fill(row + columns, row + ld - L, 0.f);
    }
    return block;
  }

  int64_t start(int64_t position) const { return window_start(position, length, K); }
  int64_t map_row(int64_t position) const { return position * p.dilation + item.group; }
  int64_t slot(int64_t key_row) const { return key_row % ring; }
  int64_t stop() const { return start(row + rows - 1) + K; }  // behind the tile's last key row
  // Where the logit (or weight) of a tile row, window row and relative column lies, for the first column.
  int64_t logit_index(int64_t r, int64_t window_row, int64_t delta, int64_t ld) const {
    return ((r * K + window_row) * span + delta + K - 1) * ld;
  }

  void pack_keys(const Na2dView& view, const Na2dView& padding, int64_t key_row, float* planes) const {
    float* const row = planes + slot(key_row) * dims * key_ld;
    const int64_t y = map_row(key_row), inside = padding_begin(p, y, key_begin, key_end);
    if (inside > key_begin) pack<T>(view, p, item.batch, y, item.head, key_begin, inside, 1, row, key_ld);
    if (inside < key_end) pack<T>(padding, p, 0, 0, item.head, inside, key_end, 1, row + (inside - key_begin), key_ld);
  }
  void pack_queries(const Na2dView& view, float factor, float* planes) const {
    for (int64_t r = 0; r < rows; ++r)
      pack<T>(view, p, item.batch, map_row(row + r), item.head, begin, end, factor, planes + r * dims * query_ld, query_ld);
  }

  // Moves to the query rows from `first_row` on, before `last_row`; calls load(key row) once for each new key row.
  template <class Load>
  void advance(int64_t first_row, int64_t last_row, Load load) {
    const int64_t left = last_row - first_row, tiles = (left + kRows - 1) / kRows;
    row = first_row, rows = (left + tiles - 1) / tiles;  // evenly: rows of one tile share what they load
    for (int64_t k = std::max(packed, start(row)); k < stop(); ++k) {
      pack_keys(p.key, p.key_padding, k, keys);
      load(k);
    }
    packed = stop();
    pack_queries(p.query, p.scale, queries);
  }

  // Calls body(key row, first tile row whose window holds it, number of such rows).
  template <class Body>
  void for_key_rows(Body body) const {
    for (int64_t k = start(row); k < stop(); ++k) {
      int64_t first = 0, last = rows;
      while (start(row + first) + K <= k) ++first;
      while (start(row + last - 1) > k) --last;
      body(k, first, last - first);
    }
  }

  // out[r][window row][delta][column] = <a row r, b row k>; a lies in planes like the queries, b like the keys.
  void product(const float* a, const float* b, float* out, int64_t ld, int64_t from, int64_t to) const {
    for (int64_t v = from; v < to; v += kGroup)
      for_key_rows([&](int64_t k, int64_t first, int64_t count) {
        for (int64_t u = v; u < std::min(v + kGroup, to); ++u) product_of(a, b, out + (u - from) * L, ld, u, k, first, count);
      });
  }

  void product_of(const float* a, const float* b, float* out, int64_t ld, int64_t v, int64_t k, int64_t first,
                  int64_t count) const {
    const Range& reach = ranges[v];
    const int64_t wanted = reach.high - reach.low + 1, calls = (wanted + kDeltas - 1) / kDeltas;
    const int64_t each = (wanted + calls - 1) / calls, x = begin + v * L;
    for (int64_t chunk = 0; chunk < dims; chunk += kDimChunk) {
      const int64_t chunk_dims = std::min<int64_t>(kDimChunk, dims - chunk);
      for (int64_t delta = reach.low; delta <= reach.high; delta += each) {
        const int64_t deltas = std::min(each, reach.high + 1 - delta);
        float* target[kRows];
        for (int64_t r = 0; r < count; ++r) target[r] = out + logit_index(first + r, k - start(row + first + r), delta, ld);
        const float* left = a + (first * dims + chunk) * query_ld + v * L;
        const float* right = b + (slot(k) * dims + chunk) * key_ld + (x + delta * p.dilation - key_begin);
        with_rows(count, [&](auto rows_of) {
          dots_of<kPairs<T>, decltype(rows_of)::value>(deltas, left, dims * query_ld, query_ld, right, key_ld, int64_t(p.dilation),
                                            chunk_dims, chunk > 0, target, ld);
        });
      }
    }
  }

  // y in the lanes of queries whose windows, which begin at `first`, hold a relative position; `other` in those between.
  NA2D_ALWAYS_INLINE Vec in_window(const Range& reach, IntVec first, int64_t delta, Vec y, Vec other) const {
    if (reach.low == reach.inner_low) return y;  // all windows are the same
    const IntVec offset = splat(int32_t(delta)) - first;
    return select((offset >= splat(0)) & (offset < splat(int32_t(K))), y, other);
  }

  // Logits to weights in place, up to the factor left in `inverse` [query row][column]; the bias is added here. With `AsPairs`,
  // each weight lies in a pair with that of the next relative position, where `combine` looks for one.
  template <bool AsPairs>
  void softmax(float* logits, float* inverse, int64_t ld, int64_t from, int64_t to) const {
    const float* const table = p.rpb ? p.rpb + item.head * span * span : nullptr;
    const Vec nothing = splat(-std::numeric_limits<float>::infinity());
    for (int64_t v = from; v < to; ++v) {
      const Range& reach = ranges[v];
      const int64_t x = begin + v * L, column = (v - from) * L;
      const bool whole = x + L <= end;
      const IntVec first = load(columns.first + x);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t top = start(row + r) - (row + r) + K - 1;  // bias row of the window's first row
        const auto bias_row = [&](int64_t i) { return table ? table + (top + i) * span + K - 1 : nullptr; };
        const auto logit = [&](const float* product, const float* bias, int64_t delta) NA2D_ALWAYS_INLINE {
          Vec y = load(product);
          if constexpr (kPairs<T>) y = y * splat(p.scale);  // float32 queries were multiplied by it
          if (bias) y += splat(bias[delta]);
          return in_window(reach, first, delta, y, nothing);
        };
        Vec highest = nothing;
        for (int64_t i = 0; i < K; ++i) {
          const float* s = logits + logit_index(r, i, reach.low, ld) + column;
          const float* const bias = bias_row(i);
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, s += ld) {
            const Vec y = logit(s, bias, delta);
            highest = select(y > highest, y, highest);
          }
        }
        Vec total{};
        for (int64_t i = 0; i < K; ++i) {
          float* s = logits + logit_index(r, i, reach.low, ld) + column;
          const float* const bias = bias_row(i);
          Vec before{};
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, s += ld) {
            // Not only the logit: where those of a window are NaN, its highest one is -inf.
            const Vec y = in_window(reach, first, delta, exp_of_negative<kPairs<T>>(logit(s, bias, delta) - highest), Vec{});
            if constexpr (AsPairs) {
              if (delta > reach.low && starts_pair(reach, delta - 1)) store(s - ld, round_to_pairs(before, y));
              before = y;
            } else {
              store(s, y);
            }
            total += y;
          }
          if constexpr (AsPairs) store(s - ld, round_to_pairs(before, Vec{}));
        }
        Vec inverted = splat(1.f) / total;
        if (!whole)
          for (int64_t lane = end - x; lane < L; ++lane) inverted[lane] = 0;
        store(inverse + r * ld + column, inverted);
      }
    }
  }

  // Whether a pair begins at a relative position, in any lane. A window that ends with a single neighbor begins a pair there, too.
  static bool starts_pair(const Range& reach, int64_t delta) { return reach.low != reach.inner_low || (delta - reach.low) % 2 == 0; }

  // The same pairs from weights, for vectors of queries [from, to).
  void pair_neighbors(const float* weights, float* pairs, int64_t ld, int64_t from, int64_t to) const {
    for (int64_t v = from; v < to; ++v) {
      const Range& reach = ranges[v];
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < K; ++i) {
          int64_t at = logit_index(r, i, reach.low, ld) + v * L;
          for (int64_t delta = reach.low; delta < reach.high; ++delta, at += ld)
            if (starts_pair(reach, delta)) store(pairs + at, round_to_pairs(load(weights + at), load(weights + at + ld)));
          store(pairs + at, round_to_pairs(load(weights + at), Vec{}));
        }
    }
  }

  // out[r][column][dim] = sum over the window of weights * source, rows of keys, for the columns of the vectors [from, to).
  // Weights start at vector `origin`, out at vector `from`.
  void combine(Gather& g, const float* weights, int64_t ld, int64_t origin, const PixelRows<T>& source, float* out,
               int64_t out_row, int64_t from, int64_t to) const {
    const int64_t x = begin + from * L;
    g.sources.clear();
    for_key_rows([&](int64_t k, int64_t first, int64_t count) {
      Source row{source.at(slot(k), x), {}, int(first), int(count)};
      for (int64_t r = 0; r < count; ++r)
        row.weights[r] = weights + logit_index(first + r, k - start(this->row + first + r), 0, ld) + (from - origin) * L;
      g.sources.push_back(row);
    });
    g.dims = vector_dims, g.rows = int(rows);
    g.pixel_step = p.dilation * vector_dims, g.weight_step = ld;
    for (int64_t r = 0; r < rows; ++r) g.targets[r] = out + r * out_row;
    g.pair_step = 0;
    gather<kPairs<T>>(g, 0, std::min(to * L, end - begin) - from * L, columns.first + x, columns.last + x, false);
  }
};

}  // namespace
}  // namespace na2d
