// The two inner loops: dot products of queries with their neighbors, and weighted sums over neighbors.
#pragma once
#include <type_traits>
#include <vector>

#include "vector.h"

namespace na2d {
namespace {

// out[r][j] (+)= sum over dims of a[r][dim] * b[dim][j * step]: rows r of queries against Deltas neighbors in one key row.
// Lanes are columns; with `Pairs`, of two dims.
template <bool Pairs, int Rows, int Deltas>
void dots(const float* a, int64_t a_row, int64_t a_ld, const float* b, int64_t b_ld, int64_t step, int64_t dims,
          bool accumulate, float* const* out, int64_t out_ld) {
  Vec sum[Rows][Deltas];
  NA2D_UNROLL(8)
  for (int r = 0; r < Rows; ++r)
    NA2D_UNROLL(8)
    for (int j = 0; j < Deltas; ++j) sum[r][j] = accumulate ? load(out[r] + j * out_ld) : Vec{};
  for (int64_t d = 0; d < dims; ++d, a += a_ld, b += b_ld) {
    Vec q[Rows];
    NA2D_UNROLL(8)
    for (int r = 0; r < Rows; ++r) q[r] = load(a + r * a_row);
    NA2D_UNROLL(8)
    for (int j = 0; j < Deltas; ++j) {
      Vec k = load(b + j * step);
      in_register(k);
      NA2D_UNROLL(8)
      for (int r = 0; r < Rows; ++r) multiply_add<Pairs>(sum[r][j], q[r], k);
    }
  }
  NA2D_UNROLL(8)
  for (int r = 0; r < Rows; ++r)
    NA2D_UNROLL(8)
    for (int j = 0; j < Deltas; ++j) store(out[r] + j * out_ld, sum[r][j]);
}

template <bool Pairs, int Rows, int Deltas = kDeltas, class... Args>
inline void dots_of(int64_t deltas, Args... args) {
  if constexpr (Deltas > 1) {
    if (deltas < Deltas) return dots_of<Pairs, Rows, Deltas - 1>(deltas, args...);
  }
  dots<Pairs, Rows, Deltas>(args...);
}

// A row of pixels that `count` target rows, from the `first` one on, sum up with weights of their own. Pointers are those
// of column 0 at relative position 0. With pairs, a pixel holds each dim of two neighbors, and so does a weight.
struct Source {
  const float* pixels;  // [column][dim]
  const float* weights[kRows];
  int first, count;
};

struct Gather {
  std::vector<Source> sources;
  int64_t weight_step, pixel_step;  // floats from one relative position to the next
  int64_t dims;                     // of a pixel, whole vectors
  int64_t pair_step;                // relative positions from the first neighbor of a pair to where the pair lies, 0 or 1
  float* targets[kRows];            // [column][dim]
  int rows;
};

// Adds `deltas` neighbors, or pairs of them, of `Pixels` neighboring pixels of one source; with `Single` only the first one of
// each pair. Lanes are dims.
template <bool Pairs, bool Single, int First, int Count, int Pixels, int Vecs>
inline NA2D_ALWAYS_INLINE void add_source(Vec (&sum)[Pixels][kRows][Vecs], const Source& source, int64_t weight_at,
                                                      int64_t weight_step, int64_t pixel_at, int64_t pixel_step,
                                                      int64_t dims, int64_t deltas) {
  const float* weight[Count];
  NA2D_UNROLL(8)
  for (int r = 0; r < Count; ++r) weight[r] = source.weights[r] + weight_at;
  const float* pixel = source.pixels + pixel_at;
  for (int64_t j = 0; j < deltas; ++j, pixel += pixel_step) {
    NA2D_UNROLL(4)
    for (int p = 0; p < Pixels; ++p) {
      Vec w[Count];
      NA2D_UNROLL(8)
      for (int r = 0; r < Count; ++r) w[r] = splat(weight[r][p]);
      NA2D_UNROLL(8)
      for (int i = 0; i < Vecs; ++i) {
        Vec x = load(pixel + p * dims + i * L);
        // Not a weight of zero: what lies outside of the window may be infinite.
        if constexpr (Single) x = as_float(as_int(x) & splat(0xffff));
        in_register(x);
        NA2D_UNROLL(8)
        for (int r = 0; r < Count; ++r) multiply_add<Pairs>(sum[p][First + r][i], w[r], x);
      }
    }
    NA2D_UNROLL(8)
    for (int r = 0; r < Count; ++r) weight[r] += weight_step;
  }
}

// targets[r][x][dim] (+)= sum over sources and relative positions [low, high] of weight * pixel, for `Vecs` vectors of dims
// from `d` on and `Pixels` columns from x on. The sums stay in registers all the way.
template <bool Pairs, int Pixels, int Vecs>
void gather_at(const Gather& g, int64_t x, int64_t d, int64_t low, int64_t high, bool accumulate) {
  Vec sum[Pixels][kRows][Vecs] = {};
  for (const Source& source : g.sources) {
    const auto add = [&](auto first, auto count) NA2D_ALWAYS_INLINE {
      constexpr int First = decltype(first)::value, Count = decltype(count)::value;
      const auto add_from = [&](auto single, int64_t at, int64_t step, int64_t steps) NA2D_ALWAYS_INLINE {
        add_source<Pairs, decltype(single)::value, First, Count, Pixels, Vecs>(
            sum, source, x + at * g.weight_step, step * g.weight_step, x * g.dims + d + at * g.pixel_step,
            step * g.pixel_step, g.dims, steps);
      };
      if constexpr (Pairs) {
        add_from(std::false_type(), low + g.pair_step, 2, (high - low + 1) / 2);
        if ((high - low + 1) % 2) add_from(std::true_type(), high, 1, 1);
      } else {
        add_from(std::false_type(), low, 1, high - low + 1);
      }
    };
    using std::integral_constant;
    static_assert(kRows == 3);
    switch (source.first * kRows + source.count) {
      case 0 * kRows + 1: add(integral_constant<int, 0>(), integral_constant<int, 1>()); break;
      case 0 * kRows + 2: add(integral_constant<int, 0>(), integral_constant<int, 2>()); break;
      case 0 * kRows + 3: add(integral_constant<int, 0>(), integral_constant<int, 3>()); break;
      case 1 * kRows + 1: add(integral_constant<int, 1>(), integral_constant<int, 1>()); break;
      case 1 * kRows + 2: add(integral_constant<int, 1>(), integral_constant<int, 2>()); break;
      default: add(integral_constant<int, 2>(), integral_constant<int, 1>());
    }
  }
  NA2D_UNROLL(4)
  for (int p = 0; p < Pixels; ++p)
    NA2D_UNROLL(8)
    for (int r = 0; r < kRows; ++r)
      if (r < g.rows) {
        float* target = g.targets[r] + (x + p) * g.dims + d;
        NA2D_UNROLL(8)
        for (int i = 0; i < Vecs; ++i) store(target + i * L, accumulate ? load(target + i * L) + sum[p][r][i] : sum[p][r][i]);
      }
}

template <bool Pairs, int Pixels, int Vecs = kVecs, class... Args>
inline void gather_vecs(int64_t vecs, Args... args) {
  if constexpr (Vecs > 1) {
    if (vecs < Vecs) return gather_vecs<Pairs, Pixels, Vecs - 1>(vecs, args...);
  }
  gather_at<Pairs, Pixels, Vecs>(args...);
}

// Columns [from, to), each with its own relative positions [low[x], high[x]].
template <bool Pairs>
void gather(const Gather& g, int64_t from, int64_t to, const int32_t* low, const int32_t* high, bool accumulate) {
  for (int64_t x = from; x < to;) {
    const bool together = kPixels > 1 && x + kPixels <= to && low[x] == low[x + kPixels - 1] && high[x] == high[x + kPixels - 1];
    for (int64_t d = 0; d < g.dims; d += kVecs * L) {
      const int64_t vecs = (g.dims - d) / L;
      if (together)
        gather_vecs<Pairs, kPixels>(vecs, g, x, d, low[x], high[x], accumulate);
      else
        gather_vecs<Pairs, 1>(vecs, g, x, d, low[x], high[x], accumulate);
    }
    x += together ? kPixels : 1;
  }
}

// Calls body(std::integral_constant<int, rows>).
template <class Body>
inline void with_rows(int64_t rows, Body body) {
  static_assert(kRows == 3);
  if (rows == 1)
    body(std::integral_constant<int, 1>());
  else if (rows == 2)
    body(std::integral_constant<int, 2>());
  else
    body(std::integral_constant<int, 3>());
}

}  // namespace
}  // namespace na2d
