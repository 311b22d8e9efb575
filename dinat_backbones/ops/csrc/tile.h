// A few query rows of one item with everything in reach of them, and the steps both passes share.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
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

// The part of scratch that is common to both passes, and the steps they share. Columns are counted as in the map.
template <class T>
struct Tile {
  const Na2dProblem& p;
  const Columns& columns;
  const Item& item;
  const int64_t K, span, dims, length;  // length: of the row class
  const int64_t begin, end, vectors;    // columns of the queries, begin a multiple of the vector width
  int64_t key_begin, key_end;           // columns of their keys
  int64_t key_ld, query_ld, ring;
  float *keys, *values, *queries, *logits, *inverse;  // each at column `begin` or `key_begin`, behind a left pad of L
  std::vector<Range> ranges;                          // of every vector
  int64_t packed = -1;                                // key rows below this are in the ring
  int64_t row = 0, rows = 0;                          // the tile's query rows: class positions [row, row + rows)

  static int64_t floats(const Na2dProblem& p, int64_t columns) {
    const int64_t K = p.kernel, dims = round_up(p.dim, kDimPad), query_ld = leading(columns + 3 * L);
    const int64_t key_columns = std::min(p.width, columns + 2 * (K - 1) * p.dilation);
    return 2 * (kRows + K - 1) * dims * leading(key_columns + 3 * L) + kRows * dims * query_ld +
           kRows * (K * (2 * K - 1) + 1) * query_ld;
  }

  Tile(const Na2dProblem& p, const Columns& columns, const Item& item, int64_t begin, int64_t end, float*& scratch)
      : p(p), columns(columns), item(item), K(p.kernel), span(2 * K - 1), dims(round_up(p.dim, kDimPad)),
        length(class_length(p.height, p.dilation, item.residue)), begin(begin), end(end),
        vectors((end - begin + L - 1) / L), ring(kRows + K - 1) {
    key_begin = p.width, key_end = 0;
    for (int64_t x = begin; x < end; ++x) {
      key_begin = std::min(key_begin, x + columns.first[x] * p.dilation);
      key_end = std::max(key_end, x + (columns.first[x] + K - 1) * p.dilation + 1);
    }
    key_ld = leading(key_end - key_begin + 3 * L), query_ld = leading(end - begin + 3 * L);
    keys = take(scratch, ring * dims, key_ld, key_end - key_begin);
    values = take(scratch, ring * dims, key_ld, key_end - key_begin);
    queries = take(scratch, kRows * dims, query_ld, end - begin);
    logits = take(scratch, kRows * K * span, query_ld, end - begin);
    inverse = take(scratch, kRows, query_ld, end - begin);
    for (int64_t x = begin; x < end; x += L) {
      const auto firsts = std::minmax_element(columns.first + x, columns.first + std::min(x + L, end));
      ranges.push_back({*firsts.first, *firsts.second, *firsts.first + K - 1, *firsts.second + K - 1});
    }
  }

  // `rows` rows of `ld` floats, the first column behind a pad of L. The pads are zero: vectors at the ends read, and mask
  // away, up to L columns of them.
  static float* take(float*& scratch, int64_t rows, int64_t ld, int64_t columns) {
    float* const block = scratch + L;
    for (int64_t i = 0; i < rows; ++i) {
      float* const row = block + i * ld;
      std::fill(row - L, row, 0.f);
      std::fill(row + columns, row + ld - L, 0.f);
    }
    scratch += rows * ld;
    return block;
  }

  int64_t start(int64_t position) const { return window_start(position, length, K); }
  int64_t map_row(int64_t position) const { return position * p.dilation + item.residue; }
  int64_t slot(int64_t key_row) const { return key_row % ring * dims * key_ld; }
  // Where the logit (or weight) of a tile row, window row and relative column lies, for column `begin`.
  int64_t place(int64_t r, int64_t window_row, int64_t delta) const {
    return ((r * K + window_row) * span + delta + K - 1) * query_ld;
  }

  void pack_row(const Na2dView& view, int64_t position, int64_t from, int64_t to, float factor, float* out, int64_t ld) {
    pack<T>(view, p, item.batch, map_row(position), item.head, from, to, factor, out, ld);
  }
  void unpack_row(const Na2dView& view, int64_t position, int64_t from, int64_t to, float factor, const float* factors,
                  const float* in, int64_t ld) {
    unpack<T>(view, p, item.batch, map_row(position), item.head, from, to, factor, factors, in, ld);
  }

  void enter(int64_t first_row, int64_t row_count) {
    row = first_row, rows = row_count;
    const int64_t stop = start(row + rows - 1) + K;
    for (int64_t k = std::max(packed, start(row)); k < stop; ++k) {
      pack_row(p.key, k, key_begin, key_end, 1, keys + slot(k), key_ld);
      pack_row(p.value, k, key_begin, key_end, 1, values + slot(k), key_ld);
    }
    packed = stop;
    for (int64_t r = 0; r < rows; ++r)
      pack_row(p.query, row + r, begin, end, p.scale, queries + r * dims * query_ld, query_ld);
  }

  // Calls body(key row, first tile row whose window holds it, number of such rows).
  template <class Body>
  void for_key_rows(Body body) const {
    for (int64_t k = start(row), stop = start(row + rows - 1) + K; k < stop; ++k) {
      int64_t first = 0, last = rows;
      while (start(row + first) + K <= k) ++first;
      while (start(row + last - 1) > k) --last;
      body(k, first, last - first);
    }
  }

  // How many vectors of queries visit a key row before the next row comes up. What they share should stay in L1: near
  // neighbors are shared by the next few vectors, whose sums then stay, too; far ones by all vectors of the row.
  int64_t group() const { return (K - 1) * p.dilation <= 2 * L ? kGroup : vectors; }

  // Calls body(first, last) for groups of the vectors [from, to).
  template <class Body>
  void for_groups(int64_t from, int64_t to, Body body) const {
    for (int64_t v = from; v < to; v += group()) body(v, std::min(v + group(), to));
  }

  // out[r][window row][delta][column] = <a row r, b row k>; b lies in the ring like keys and values.
  void product(const float* a, const float* b, float* out) const {
    for_groups(0, vectors, [&](int64_t v_first, int64_t v_last) {
      for_key_rows([&](int64_t k, int64_t first, int64_t count) {
        for (int64_t v = v_first; v < v_last; ++v) product_of(a, b, out, v, k, first, count);
      });
    });
  }

  void product_of(const float* a, const float* b, float* out, int64_t v, int64_t k, int64_t first, int64_t count) const {
    const Range& reach = ranges[v];
    const int64_t wanted = reach.high - reach.low + 1, calls = (wanted + kDeltas - 1) / kDeltas;
    const int64_t each = (wanted + calls - 1) / calls, x = begin + v * L;
    for (int64_t chunk = 0; chunk < dims; chunk += kDimChunk) {
      const int64_t chunk_dims = std::min<int64_t>(kDimChunk, dims - chunk);
      for (int64_t delta = reach.low; delta <= reach.high; delta += each) {
        const int64_t deltas = std::min(each, reach.high + 1 - delta);
        float* target[kRows];
        for (int64_t r = 0; r < count; ++r)
          target[r] = out + place(first + r, k - start(row + first + r), delta) + v * L;
        const float* left = a + (first * dims + chunk) * query_ld + v * L;
        const float* right = b + slot(k) + chunk * key_ld + (x + delta * p.dilation - key_begin);
        with_rows(count, [&](auto rows_of) {
          dots_of<decltype(rows_of)::value>(deltas, left, dims * query_ld, query_ld, right, key_ld, int64_t(p.dilation),
                                            chunk_dims, chunk > 0, target, query_ld);
        });
      }
    }
  }

  // Logits to weights in place, up to the factor left in `inverse`; the bias comes in here.
  void softmax() const {
    const float* const table = p.rpb ? p.rpb + item.head * span * span : nullptr;
    for (int64_t v = 0; v < vectors; ++v) {
      const Range& reach = ranges[v];
      const int64_t x = begin + v * L;
      const bool uniform = reach.low == reach.inner_low, whole = x + L <= end;
      const IntVec first = load(columns.first + x);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t top = start(row + r) - (row + r) + K - 1;  // bias row of the window's first row
        Vec highest = splat(-std::numeric_limits<float>::infinity());
        for (int64_t i = 0; i < K; ++i) {
          float* s = logits + place(r, i, reach.low) + v * L;
          const float* bias = table ? table + (top + i) * span + reach.low + K - 1 : nullptr;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, s += query_ld) {
            Vec y = load(s);
            if (bias) y += splat(*bias++);
            if (!uniform) {
              const IntVec offset = splat(int32_t(delta)) - first;
              y = select((offset >= 0) & (offset < splat(int32_t(K))), y, splat(-std::numeric_limits<float>::infinity()));
            }
            store(s, y);
            highest = select(y > highest, y, highest);
          }
        }
        Vec total{};
        for (int64_t i = 0; i < K; ++i) {
          float* s = logits + place(r, i, reach.low) + v * L;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, s += query_ld) {
            const Vec y = exp_of_negative(load(s) - highest);
            store(s, y);
            total += y;
          }
        }
        Vec inverted = splat(1.f) / total;
        if (!whole)
          for (int64_t lane = end - x; lane < L; ++lane) inverted[lane] = 0;
        store(inverse + r * query_ld + v * L, inverted);
      }
    }
  }

  // out[r][dim][column] += sum over the window of weights (laid out like logits) * b (in the ring), for the vectors
  // [from, to).
  void combine(const float* weights, const float* b, float* out, int64_t from, int64_t to) const {
    for_groups(from, to, [&](int64_t v_first, int64_t v_last) {
      for_key_rows([&](int64_t k, int64_t first, int64_t count) {
        for (int64_t d = 0; d < dims; d += kDims)
          for (int64_t v = v_first; v < v_last; ++v) combine_of(weights, b, out, v, d, k, first, count);
      });
    });
  }

  void combine_of(const float* weights, const float* b, float* out, int64_t v, int64_t d, int64_t k, int64_t first,
                  int64_t count) const {
    const Range& reach = ranges[v];
    const int64_t x = begin + v * L;
    float* target[kRows];
    for (int64_t r = 0; r < count; ++r) target[r] = out + ((first + r) * dims + d) * query_ld + v * L;
    const auto part = [&](auto masked, int64_t low, int64_t high) {
      if (low > high) return;
      const float* weight[kRows];
      for (int64_t r = 0; r < count; ++r)
        weight[r] = weights + place(first + r, k - start(row + first + r), low) + v * L;
      const float* value = b + slot(k) + d * key_ld + (x + low * p.dilation - key_begin);
      with_rows(count, [&](auto rows_of) {
        mix<decltype(rows_of)::value, decltype(masked)::value>(weight, query_ld, value, key_ld, p.dilation, high - low + 1,
                                                               target, query_ld, columns.first + x, int32_t(low), int32_t(K));
      });
    };
    const int64_t inner_low = std::min(reach.inner_low, reach.high + 1);
    const int64_t inner_high = std::max(reach.inner_high, inner_low - 1);
    part(std::true_type(), reach.low, inner_low - 1);
    part(std::false_type(), inner_low, inner_high);
    part(std::true_type(), inner_high + 1, reach.high);
  }
};

}  // namespace
}  // namespace na2d
