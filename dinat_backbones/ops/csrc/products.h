// The two inner loops: dot products of queries with their neighbors, and weighted sums over neighbors.
#pragma once
#include <type_traits>

#include "vector.h"

namespace na2d {
namespace {

// out[r][j] (+)= sum over dims of a[r][dim] * b[dim][j * step]: rows r of queries against Deltas neighbors in one key row.
template <int Rows, int Deltas>
void dots(const float* a, int64_t a_row, int64_t a_ld, const float* b, int64_t b_ld, int64_t step, int64_t dims,
          bool accumulate, float* const* out, int64_t out_ld) {
  Vec sum[Rows][Deltas];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < Deltas; ++j) sum[r][j] = accumulate ? load(out[r] + j * out_ld) : Vec{};
  for (int64_t d = 0; d < dims; ++d, a += a_ld, b += b_ld) {
    Vec q[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) q[r] = load(a + r * a_row);
#pragma GCC unroll 8
    for (int j = 0; j < Deltas; ++j) {
      Vec k = load(b + j * step);
      in_register(k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r][j] += q[r] * k;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < Deltas; ++j) store(out[r] + j * out_ld, sum[r][j]);
}

template <int Rows, int Deltas = kDeltas, class... Args>
inline void dots_of(int64_t deltas, Args... args) {
  if constexpr (Deltas > 1) {
    if (deltas < Deltas) return dots_of<Rows, Deltas - 1>(deltas, args...);
  }
  dots<Rows, Deltas>(args...);
}

// out[r][dim] += sum over `deltas` neighbors of weight[r][neighbor] * value[dim][neighbor], for kDims dims. Neighbors are
// w_step and v_step apart; where Masked, values of lanes outside [first, first + K) of their own window count as zero.
template <int Rows, bool Masked>
void mix(const float* const* weight, int64_t w_step, const float* value, int64_t v_ld, int64_t v_step, int64_t deltas,
         float* const* out, int64_t out_ld, const int32_t* first, int32_t delta, int32_t kernel) {
  Vec sum[Rows][kDims];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kDims; ++i) sum[r][i] = load(out[r] + i * out_ld);
  for (int64_t j = 0; j < deltas; ++j) {
    Vec w[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) w[r] = load(weight[r] + j * w_step);
    IntVec inside{};
    if constexpr (Masked) {
      const IntVec offset = splat(int32_t(delta + j)) - load(first);
      inside = (offset >= 0) & (offset < splat(kernel));
    }
    const float* v = value + j * v_step;
#pragma GCC unroll 8
    for (int i = 0; i < kDims; ++i) {
      Vec x = load(v + i * v_ld);
      if constexpr (Masked) x = Vec(IntVec(x) & inside);
      in_register(x);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r][i] += w[r] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kDims; ++i) store(out[r] + i * out_ld, sum[r][i]);
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
