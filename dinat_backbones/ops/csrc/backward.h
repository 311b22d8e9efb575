// The backward pass of one item.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "tile.h"

namespace na2d {
namespace {

// An item owns its queries (grad_query, grad_rpb) and the keys at the same places (grad_key, grad_value). It recomputes
// the weights of every query that attends to those keys, so that no two items write to one place.
template <class T>
struct Backward {
  Tile<T> tile;
  const Na2dProblem& p;
  const Item& item;
  const int64_t dims, query_ld, own_ld, own_vectors, own_from, own_to;  // own_from, own_to: vectors of the owned queries
  float *grad_out, *grad_logits, *grad_queries, *grad_keys, *grad_values, *table;
  std::vector<std::pair<int64_t, int64_t>> reached;  // per vector of owned keys: relative positions they are attended from
  int64_t flushed;

  static int64_t query_begin(const Na2dProblem& p, const Columns& columns, const Item& item) {
    int64_t begin = item.column_begin;
    for (int64_t x = item.column_begin; x < item.column_end; ++x)
      begin = std::min(begin, x - columns.key_high[x] * p.dilation);
    return begin / L * L;
  }
  static int64_t query_end(const Na2dProblem& p, const Columns& columns, const Item& item) {
    int64_t end = item.column_end;
    for (int64_t x = item.column_begin; x < item.column_end; ++x)
      end = std::max(end, x - columns.key_low[x] * p.dilation + 1);
    return end;
  }

  static int64_t floats(const Na2dProblem& p, int64_t columns) {
    const int64_t K = p.kernel, span = 2 * K - 1, dims = round_up(p.dim, kDimPad);
    const int64_t queries = std::min(p.width, columns + 2 * (K - 1) * p.dilation + L);
    return Tile<T>::floats(p, queries) + kRows * (2 * dims + K * span) * leading(queries + 3 * L) +
           2 * (kRows + K - 1) * dims * leading(columns + 3 * L) + span * span * L;
  }

  Backward(const Na2dProblem& p, const Columns& columns, const Item& item, float*& scratch)
      : tile(p, columns, item, query_begin(p, columns, item), query_end(p, columns, item), scratch), p(p), item(item),
        dims(tile.dims), query_ld(tile.query_ld), own_ld(leading(item.column_end - item.column_begin + 3 * L)),
        own_vectors((item.column_end - item.column_begin + L - 1) / L), own_from((item.column_begin - tile.begin) / L),
        own_to(own_from + own_vectors), flushed(item.row_begin) {
    const int64_t weight_rows = kRows * tile.K * tile.span;
    grad_out = tile.take(scratch, kRows * dims, query_ld, tile.end - tile.begin);
    grad_logits = tile.take(scratch, weight_rows, query_ld, 0);
    grad_queries = tile.take(scratch, kRows * dims, query_ld, 0);
    grad_keys = tile.take(scratch, tile.ring * dims, own_ld, 0);
    grad_values = tile.take(scratch, tile.ring * dims, own_ld, 0);
    for (int64_t x = item.column_begin; x < item.column_end; x += L) {
      const int64_t stop = std::min(x + L, item.column_end);
      reached.emplace_back(*std::min_element(columns.key_low + x, columns.key_low + stop),
                           *std::max_element(columns.key_high + x, columns.key_high + stop));
    }
    table = scratch;
    std::fill(table, table + tile.span * tile.span * L, 0.f);
    // Relative positions no lane of a vector attends to are never written, but read for the keys: they stay zero.
    std::fill(tile.logits, tile.logits + weight_rows * query_ld - L, 0.f);
  }

  // Weights become final in place of the logits; gradients of the weights become gradients of the logits.
  void softmax_gradient() {
    for (int64_t v = 0; v < tile.vectors; ++v) {
      const Range& reach = tile.ranges[v];
      for (int64_t r = 0; r < tile.rows; ++r) {
        const Vec inverse = load(tile.inverse + r * query_ld + v * L);
        const bool owned = owns(tile.row + r) && v >= own_from && v < own_to;
        const int64_t top = tile.start(tile.row + r) - (tile.row + r) + tile.K - 1;
        Vec mean{};
        for (int64_t i = 0; i < tile.K; ++i) {
          int64_t at = tile.place(r, i, reach.low) + v * L;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, at += query_ld) {
            const Vec weight = load(tile.logits + at) * inverse;
            store(tile.logits + at, weight);
            mean += select(weight > Vec{}, weight * load(grad_logits + at), Vec{});
          }
        }
        for (int64_t i = 0; i < tile.K; ++i) {
          int64_t at = tile.place(r, i, reach.low) + v * L;
          float* cell = table + ((top + i) * tile.span + reach.low + tile.K - 1) * L;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, at += query_ld, cell += L) {
            const Vec weight = load(tile.logits + at);
            const Vec gradient = select(weight == Vec{}, Vec{}, weight * (load(grad_logits + at) - mean));
            store(grad_logits + at, gradient);
            if (owned) store(cell, load(cell) + gradient);
          }
        }
      }
    }
  }

  bool owns(int64_t position) const { return position >= item.row_begin && position < item.row_end; }

  // target[key row][dim][column] += sum over the queries of the tile that attend to the key of weight * source: the
  // transpose of Tile::combine, gathering over shifted weights and sources.
  void scatter(const float* weights, const float* source, float* target) const {
    tile.for_groups(0, own_vectors, [&](int64_t v_first, int64_t v_last) {
      for_sources([&](int64_t r, int64_t k, int64_t count) {
        for (int64_t d = 0; d < dims; d += kDims)
          for (int64_t v = v_first; v < v_last; ++v) scatter_of(weights, source, target, v, d, r, k, count);
      });
    });
  }

  // Calls body(tile row, first of some owned key rows in its window, their number).
  template <class Body>
  void for_sources(Body body) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t top = tile.start(tile.row + r), stop = std::min(top + tile.K, item.row_end);
      for (int64_t k = std::max(top, item.row_begin); k < stop; k += kRows) body(r, k, std::min<int64_t>(kRows, stop - k));
    }
  }

  void scatter_of(const float* weights, const float* source, float* target, int64_t v, int64_t d, int64_t r, int64_t k,
                  int64_t count) const {
    const int64_t x = item.column_begin + v * L, top = tile.start(tile.row + r);
    const int64_t low = reached[v].first, high = reached[v].second;
    const int64_t from = x - low * p.dilation - tile.begin;
    const float* weight[kRows];
    float* out[kRows];
    for (int64_t a = 0; a < count; ++a) {
      weight[a] = weights + tile.place(r, k + a - top, low) + from;
      out[a] = target + ((k + a) % tile.ring * dims + d) * own_ld + v * L;
    }
    with_rows(count, [&](auto rows_of) {
      mix<decltype(rows_of)::value, false>(weight, query_ld - p.dilation, source + (r * dims + d) * query_ld + from,
                                           query_ld, -p.dilation, high - low + 1, out, own_ld, nullptr, 0, 0);
    });
  }

  // Hands out the key rows below `stop`: no later tile adds to them.
  void flush(int64_t stop) {
    for (; flushed < std::min(stop, item.row_end); ++flushed) {
      const int64_t at = flushed % tile.ring * dims * own_ld;
      tile.unpack_row(p.grad_key, flushed, item.column_begin, item.column_end, 1, nullptr, grad_keys + at, own_ld);
      tile.unpack_row(p.grad_value, flushed, item.column_begin, item.column_end, 1, nullptr, grad_values + at, own_ld);
      std::fill(grad_keys + at, grad_keys + at + dims * own_ld - L, 0.f);
      std::fill(grad_values + at, grad_values + at + dims * own_ld - L, 0.f);
    }
  }

  void run(float* grad_rpb) {
    const int64_t row_floats = dims * query_ld;
    const int64_t first = first_query(item.row_begin, tile.K), stop = last_query(item.row_end - 1, tile.length, tile.K) + 1;
    for (int64_t row = first; row < stop; row += kRows) {
      tile.enter(row, std::min<int64_t>(kRows, stop - row));
      for (int64_t r = 0; r < tile.rows; ++r)
        tile.pack_row(p.grad_out, row + r, tile.begin, tile.end, 1, grad_out + r * row_floats, query_ld);
      tile.product(tile.queries, tile.keys, tile.logits);
      tile.softmax();
      tile.product(grad_out, tile.values, grad_logits);
      softmax_gradient();
      if (row < item.row_end && row + tile.rows > item.row_begin) {
        std::fill(grad_queries, grad_queries + tile.rows * row_floats - L, 0.f);
        tile.combine(grad_logits, tile.keys, grad_queries, own_from, own_to);
        for (int64_t r = 0; r < tile.rows; ++r)
          if (owns(row + r))
            tile.unpack_row(p.grad_query, row + r, item.column_begin, item.column_end, p.scale, nullptr,
                            grad_queries + r * row_floats + own_from * L, query_ld);
      }
      scatter(tile.logits, grad_out, grad_values);
      scatter(grad_logits, tile.queries, grad_keys);
      flush(row + tile.rows < stop ? tile.start(row + tile.rows) : item.row_end);
    }
    for (int64_t t = 0; t < tile.span * tile.span; ++t) {
      float sum = 0;
      for (int lane = 0; lane < L; ++lane) sum += table[t * L + lane];
      grad_rpb[t] = sum;
    }
  }
};

}  // namespace
}  // namespace na2d
