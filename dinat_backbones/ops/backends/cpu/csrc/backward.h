// The backward pass of one item.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

#include "tile.h"

namespace na2d {
namespace {

// An item owns its queries (grad_query, grad_rpb, grad_padding) and the keys at the same places (grad_key, grad_value). It
// recomputes the weights of every query that attends to those keys, so that no two items write to one place.
template <class T>
struct Backward {
  Tile<T> tile;
  const Na2dProblem& p;
  const Item& item;
  const int64_t dims, ld, own_columns, own_row, own_from, own_to;  // own_from, own_to: vectors of the owned queries
  const PixelRows<T> keys, queries, grad_out;
  float *values, *grad_out_planes;                   // planes, like the tile's keys and queries
  float *logits, *inverse, *grad_logits, *table;
  float* padding_sums;                               // [key or value][dim][lane]
  float *grad_queries, *grad_keys, *grad_values;     // pixels
  int64_t flushed;
  Gather sums;
  std::vector<char> inner;  // of every vector, see `is_inner`

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
    const int64_t K = p.kernel, span = 2 * K - 1, ring = kRows + K - 1;
    const int64_t queries = std::min(p.width, columns + 2 * (K - 1) * p.dilation + L);
    const int64_t keys = Tile<T>::key_columns(p, queries), planes = plane_rows<T>(p), dims = round_up(p.dim, L);
    const int64_t ld = leading(queries + 3 * L);
    return Tile<T>::floats(p, queries) + ring * (planes * leading(keys + 3 * L) + dims * keys) +
           kRows * (planes * ld + 2 * dims * queries) + kRows * (2 * K * span + 1) * ld + (kRows + 2 * ring) * dims * columns +
           span * span * L + 2 * kLaneDims<T> * planes * L;
  }

  Backward(const Na2dProblem& p, const Columns& columns, const Item& item, float*& scratch)
      : tile(p, columns, item, query_begin(p, columns, item), query_end(p, columns, item), scratch), p(p), item(item),
        dims(tile.vector_dims), ld(tile.query_ld), own_columns(item.column_end - item.column_begin), own_row(own_columns * dims),
        own_from((item.column_begin - tile.begin) / L), own_to(own_from + (own_columns + L - 1) / L),
        keys(p, p.key, &p.key_padding, item, tile.key_begin, tile.key_end, tile.ring, scratch),
        queries(p, p.query, nullptr, item, tile.begin, tile.end, kRows, scratch),
        grad_out(p, p.grad_out, nullptr, item, tile.begin, tile.end, kRows, scratch), flushed(item.row_begin) {
    values = tile.allocate_planes(scratch, tile.ring * tile.dims, tile.key_ld, tile.key_end - tile.key_begin);
    grad_out_planes = tile.allocate_planes(scratch, kRows * tile.dims, ld, tile.end - tile.begin);
    logits = tile.allocate(scratch, kRows * tile.K * tile.span * ld);
    grad_logits = tile.allocate(scratch, kRows * tile.K * tile.span * ld);
    inverse = tile.allocate(scratch, kRows * ld);
    grad_queries = tile.allocate(scratch, kRows * own_row);
    grad_keys = tile.allocate(scratch, tile.ring * own_row);
    grad_values = tile.allocate(scratch, tile.ring * own_row);
    std::fill(grad_keys, grad_keys + 2 * tile.ring * own_row, 0.f);
    table = tile.allocate(scratch, tile.span * tile.span * L);
    std::fill(table, table + tile.span * tile.span * L, 0.f);
    padding_sums = tile.allocate(scratch, 2 * padding_dims() * L);
    std::fill(padding_sums, padding_sums + 2 * padding_dims() * L, 0.f);
    if constexpr (kPairs<T>)
      for (int64_t v = 0; v < tile.vectors; ++v) inner.push_back(is_inner(v));
  }

  int64_t padding_dims() const { return kLaneDims<T> * tile.dims; }

  // Weights become final in place of the logits; gradients of the weights become gradients of the logits.
  void softmax_gradient() {
    for (int64_t v = 0; v < tile.vectors; ++v) {
      const Range& reach = tile.ranges[v];
      const IntVec first = load(tile.columns.first + tile.begin + v * L);
      for (int64_t r = 0; r < tile.rows; ++r) {
        const Vec inverted = load(inverse + r * ld + v * L);
        const bool owned = owns(tile.row + r) && v >= own_from && v < own_to;
        const int64_t top = tile.start(tile.row + r) - (tile.row + r) + tile.K - 1;
        Vec mean{};
        for (int64_t i = 0; i < tile.K; ++i) {
          int64_t at = tile.logit_index(r, i, reach.low, ld) + v * L;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, at += ld) {
            const Vec weight = tile.in_window(reach, first, delta, load(logits + at) * inverted, Vec{});
            store(logits + at, weight);
            mean += select(weight > Vec{}, weight * load(grad_logits + at), Vec{});
          }
        }
        for (int64_t i = 0; i < tile.K; ++i) {
          int64_t at = tile.logit_index(r, i, reach.low, ld) + v * L;
          float* cell = table + ((top + i) * tile.span + reach.low + tile.K - 1) * L;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, at += ld, cell += L) {
            const Vec weight = load(logits + at);
            const Vec gradient = select(weight == Vec{}, Vec{}, weight * (load(grad_logits + at) - mean));
            store(grad_logits + at, gradient);
            if (owned) store(cell, load(cell) + gradient);
          }
        }
      }
    }
  }

  bool owns(int64_t position) const { return position >= item.row_begin && position < item.row_end; }

  // Adds up the gradients of the padding over the owned queries.
  void add_padding_gradient() {
    alignas(64) static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const IntVec lanes = load(numbers);
    for (int64_t v = own_from; v < own_to; ++v) {
      const Range& reach = tile.ranges[v];
      const int64_t x = tile.begin + v * L;
      for (int64_t r = 0; r < tile.rows; ++r) {
        if (!owns(tile.row + r)) continue;
        const int64_t top = tile.start(tile.row + r);
        if (tile.map_row(top + tile.K - 1) < p.map_height && x + L - 1 + reach.high * p.dilation < p.map_width) continue;
        Vec weight{}, gradient{};  // of each query, its sums over keys outside of the map
        for (int64_t i = 0; i < tile.K; ++i) {
          int64_t at = tile.logit_index(r, i, reach.low, ld) + v * L;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, at += ld) {
            const int64_t column = x + delta * p.dilation;
            const int64_t inside = padding_begin(p, tile.map_row(top + i), column, column + L) - column;
            if (inside == L) continue;
            const auto outside = lanes > splat(int32_t(inside) - 1);
            weight += select(outside, load(logits + at), Vec{});
            gradient += select(outside, load(grad_logits + at), Vec{});
          }
        }
        add_product(gradient, tile.queries + r * tile.dims * ld + v * L, padding_sums);
        add_product(weight, grad_out_planes + r * tile.dims * ld + v * L, padding_sums + padding_dims() * L);
      }
    }
  }

  // target[dim] += factor * plane[dim], lane by lane.
  void add_product(Vec factor, const float* plane, float* target) const {
    const auto add = [&](Vec values) {
      store(target, load(target) + select(factor == Vec{}, Vec{}, factor * values));
      target += L;
    };
    for (int64_t row = 0; row < tile.dims; ++row, plane += ld) {
      if constexpr (kPairs<T>) {
        const UintVec bits = as_uint(load(plane));
        add(as_float(bits << 16));
        add(as_float(bits & splat(0xffff0000u)));
      } else {
        add(load(plane));
      }
    }
  }

  // Whether all keys that the queries of a vector attend to are so far from the borders that K / 2 queries on either side attend
  // to them.
  bool is_inner(int64_t v) const {
    const Range& reach = tile.ranges[v];
    const int64_t x = tile.begin + v * L;
    return (x + reach.low * p.dilation) / p.dilation >= tile.K && (x + L - 1) / p.dilation + reach.high < p.width / p.dilation - tile.K;
  }

  // Weights become pairs in place, for `scatter`: of two queries that attend to the same key, with delta and delta - 1.
  void pair_queries(float* weights) const {
    const int64_t K = tile.K, half = K / 2, stop = tile.vectors * L;
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t i = 0; i < K; ++i)
        for (int64_t delta = K - 1; delta > -K; --delta) {
          float* const row = weights + tile.logit_index(r, i, delta, ld);
          for (int64_t v = 0; v < tile.vectors; ++v) {
            const Range& reach = tile.ranges[v];
            if (delta < reach.low || delta > reach.high) continue;
            if (inner[v] && delta < half && (delta + half) % 2 == 0) continue;  // there no pair begins
            const int64_t next = v * L + p.dilation;
            const bool has_next = delta > 1 - K && next < stop;
            store(row + v * L, round_to_pairs(load(row + v * L), has_next ? load(row - ld + next) : Vec{}));
          }
        }
  }

  // target[key row][column][dim] += sum over the queries of the tile that attend to the key of weight * source: the transpose
  // of Tile::combine.
  void scatter(const float* weights, const PixelRows<T>& source, float* target) {
    const int64_t x = item.column_begin - tile.begin;
    sums.dims = dims, sums.pair_step = 1;
    sums.pixel_step = -p.dilation * dims, sums.weight_step = ld - p.dilation;
    const int64_t stop = std::min(tile.stop(), item.row_end);
    for (int64_t k = std::max(tile.start(tile.row), item.row_begin); k < stop; k += kRows) {
      sums.rows = int(std::min<int64_t>(kRows, stop - k));
      sums.sources.clear();
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t top = tile.start(tile.row + r), first = std::max(top - k, int64_t(0));
        const int64_t count = std::min<int64_t>(sums.rows, top + tile.K - k) - first;
        if (count <= 0) continue;
        Source row{source.at(r, item.column_begin), {}, int(first), int(count)};
        for (int64_t a = 0; a < count; ++a) row.weights[a] = weights + tile.logit_index(r, k + first + a - top, 0, ld) + x;
        sums.sources.push_back(row);
      }
      for (int64_t a = 0; a < sums.rows; ++a) sums.targets[a] = target + tile.slot(k + a) * own_row;
      const int64_t at = item.column_begin;
      gather<kPairs<T>>(sums, 0, own_columns, tile.columns.key_low + at, tile.columns.key_high + at, true);
    }
  }

  void store_gradient(const Na2dView& view, int64_t position, float factor, float* pixels) const {
    store_row<T>(view, p, item.batch, tile.map_row(position), item.head, item.column_begin, item.column_end, factor, nullptr, pixels,
              dims);
  }

  // Stores the gradients of the key rows below `stop`: no later tile adds to them.
  void flush(int64_t stop) {
    for (; flushed < std::min(stop, item.row_end); ++flushed)
      for (const auto& [view, factor, rows] : {std::tuple(&p.grad_key, p.scale, grad_keys), std::tuple(&p.grad_value, 1.f, grad_values)}) {
        float* const pixels = rows + tile.slot(flushed) * own_row;
        store_gradient(*view, flushed, factor, pixels);
        std::fill(pixels, pixels + own_row, 0.f);
      }
  }

  void run(float* results) {
    const int64_t first = first_query(item.row_begin, tile.K), queries_end = group_length(p.map_height, p.dilation, item.group);
    const int64_t stop = std::min(last_query(item.row_end - 1, tile.length, tile.K) + 1, queries_end);
    for (int64_t row = first; row < stop; row += tile.rows) {
      tile.advance(row, stop, [&](int64_t k) {
        tile.pack_keys(p.value, p.value_padding, k, values);
        keys.fetch(tile.slot(k), tile.map_row(k));
      });
      tile.pack_queries(p.grad_out, 1, grad_out_planes);
      for (int64_t r = 0; r < tile.rows; ++r) {
        queries.fetch(r, tile.map_row(row + r));
        grad_out.fetch(r, tile.map_row(row + r));
      }
      tile.product(tile.queries, tile.keys, logits, ld, 0, tile.vectors);
      tile.template softmax<false>(logits, inverse, ld, 0, tile.vectors);
      tile.product(grad_out_planes, values, grad_logits, ld, 0, tile.vectors);
      softmax_gradient();
      if (p.grad_padding) add_padding_gradient();
      if constexpr (kPairs<T>) pair_queries(logits);
      scatter(logits, grad_out, grad_values);
      if (row < item.row_end && row + tile.rows > item.row_begin) {
        if constexpr (kPairs<T>) tile.pair_neighbors(grad_logits, logits, ld, own_from, own_to);
        tile.combine(sums, kPairs<T> ? logits : grad_logits, ld, 0, keys, grad_queries, own_row, own_from, own_to);
        for (int64_t r = 0; r < tile.rows; ++r)
          if (owns(row + r)) store_gradient(p.grad_query, row + r, p.scale, grad_queries + r * own_row);
      }
      if constexpr (kPairs<T>) pair_queries(grad_logits);
      scatter(grad_logits, queries, grad_keys);
      flush(row + tile.rows < stop ? tile.start(row + tile.rows) : item.row_end);
    }
    const auto sum_of_lanes = [](const float* lanes) {
      float sum = 0;
      for (int lane = 0; lane < L; ++lane) sum += lanes[lane];
      return sum;
    };
    const int64_t cells = tile.span * tile.span;
    for (int64_t t = 0; t < cells; ++t) results[t] += sum_of_lanes(table + t * L);
    if (!p.grad_padding) return;
    for (int64_t d = 0; d < p.dim; ++d) {
      const float scale = kPairs<T> ? p.scale : 1;  // float32 queries were multiplied by it
      results[cells + d] += sum_of_lanes(padding_sums + d * L) * scale;
      results[cells + p.dim + d] += sum_of_lanes(padding_sums + (padding_dims() + d) * L);
    }
  }
};

}  // namespace
}  // namespace na2d
