// Vectors of NA2D_LANES floats, and the sizes that follow from the registers.
#pragma once
#include <cstdint>

#include "compiler.h"

namespace na2d {
namespace {

constexpr int L = NA2D_LANES;
constexpr int kRows = 3;                        // query rows per tile
constexpr int kDeltas = L == 16 ? 7 : 4;        // kRows * kDeltas sums must fit the registers
constexpr int kVecs = L == 16 ? 2 : 4;          // vectors of dims, kPixels * kRows of them in registers at a time
constexpr int kPixels = L == 16 ? 2 : 1;
constexpr int kDimPad = 8;                      // dims in scratch are padded to a multiple
constexpr int kGroup = 4;                       // vectors of queries that are taken through all steps together
constexpr int kPrefetch = 32;                   // columns ahead
constexpr int kDimChunk = 32;                   // lanes of dims per pass over a key row: what stays in L1

// Whether the machine multiplies pairs of bfloat16, each product and sum in float32: bfloat16 arrays are then not widened, and
// a 32-bit lane of scratch holds two neighboring dims, or the same dim of two neighbors, the first in its low half.
#if defined(NA2D_BF16_PRODUCTS)
constexpr bool kBf16Products = true;
#else
constexpr bool kBf16Products = false;
#endif

}  // namespace
}  // namespace na2d

#if defined(__GNUC__) && !defined(NA2D_PORTABLE_VECTORS)
#include "vector_extension.h"
#else
#include "vector_portable.h"
#endif

namespace na2d {
namespace {

#if !defined(NA2D_BF16_PRODUCTS)  // never called
inline Vec load_pairs(const uint16_t*) { return Vec{}; }
inline Vec add_pairs(Vec sum, Vec, Vec) { return sum; }
inline Vec round_to_pairs(Vec low, Vec) { return low; }
#endif

// sum += a * b; with `Pairs`, the two products of each lane.
template <bool Pairs>
inline void multiply_add(Vec& sum, Vec a, Vec b) {
  if constexpr (Pairs)
    sum = add_pairs(sum, a, b);
  else
    sum += a * b;
}

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
// Leading dimension of a transposed row: whole vectors, an odd number, so that dims don't share cache sets.
inline int64_t leading(int64_t columns) { return (round_up(columns, L) / L | 1) * L; }

// exp for x <= 0, to 2e-7 of its value near 0 and 1.3e-6 far below, with `Coarse` to 4e-6; 0 below -87 and for -inf, NaN for NaN.
template <bool Coarse>
inline Vec exp_of_negative(Vec x) {
  const Vec log2e = splat(1.44269504f);
  const Vec shifter = splat(12582912.f + 127);  // 1.5 * 2^23: adding it rounds to an integer; 127: an exponent's bias
  const Vec shifted = x * log2e + shifter;
  const Vec f = x * log2e - (shifted - shifter);
  Vec p;  // 2^f on [-1/2, 1/2], fitted for the least largest relative error: 2.6e-6 and 2e-9
  if constexpr (Coarse) {
    p = splat(9.57010221e-3f);
    p = p * f + splat(5.59178628e-2f);
    p = p * f + splat(.240247443f);
    p = p * f + splat(.693121791f);
    p = p * f + splat(.999999285f);
  } else {
    p = splat(1.53533621e-4f);
    p = p * f + splat(1.33988739e-3f);
    p = p * f + splat(9.61843692e-3f);
    p = p * f + splat(5.55033237e-2f);
    p = p * f + splat(.240226477f);
    p = p * f + splat(.693147182f);
    p = p * f + splat(1.f);
  }
  return select(x < splat(-87.f), Vec{}, p * as_float(as_int(shifted) << 23));
}

}  // namespace
}  // namespace na2d
