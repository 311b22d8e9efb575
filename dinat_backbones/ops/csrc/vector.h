// Vectors of NA2D_LANES floats in the compilers' own vector extension, and the sizes that follow from the registers.
#pragma once
#include <cstdint>

namespace na2d {
namespace {

constexpr int L = NA2D_LANES;
constexpr int kRows = 3;                        // query rows per tile
constexpr int kDeltas = L == 16 ? 7 : 4;        // accumulators kRows * kDeltas, or kRows * kDims, must fit the registers
constexpr int kDims = L == 16 ? 8 : 4;
constexpr int kDimPad = 8;                      // dims in scratch are padded to a multiple
constexpr int kGroup = 4;                       // vectors of near neighbors that visit a key row together
constexpr int kPrefetch = 16;                   // columns ahead
constexpr int kDimChunk = 32;                   // dims per pass over a key row: what stays in L1

typedef float Vec __attribute__((vector_size(L * 4)));
typedef int32_t IntVec __attribute__((vector_size(L * 4)));
typedef float UnalignedVec __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t UnalignedIntVec __attribute__((vector_size(L * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec splat(float x) { return Vec{} + x; }
inline IntVec splat(int32_t x) { return IntVec{} + x; }
inline IntVec load(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVec*>(p); }
inline Vec select(IntVec mask, Vec a, Vec b) { return Vec((IntVec(a) & mask) | (IntVec(b) & ~mask)); }
// Keeps a vector in a register: compilers would rather load it again for each product it goes into.
inline void in_register([[maybe_unused]] Vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}
inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
// Leading dimension of a transposed row: whole vectors, an odd number, so that dims don't share cache sets.
inline int64_t leading(int64_t columns) { return (round_up(columns, L) / L | 1) * L; }

// exp to about 2 ulp for x <= 0; 0 below -87 and for -inf, NaN for NaN.
inline Vec exp_of_negative(Vec x) {
  const Vec shifter = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * splat(1.44269504f) + shifter;
  const Vec n = shifted - shifter;
  const Vec r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);  // ln 2 in two parts
  Vec p = splat(1.f / 5040);
  p = p * r + splat(1.f / 720);
  p = p * r + splat(1.f / 120);
  p = p * r + splat(1.f / 24);
  p = p * r + splat(1.f / 6);
  p = p * r + splat(.5f);
  p = p * r + splat(1.f);
  p = p * r + splat(1.f);
  const IntVec exponent = (IntVec(shifted) - IntVec(shifter) + 127) << 23;
  return select(x < splat(-87.f), Vec{}, p * Vec(exponent));
}

}  // namespace
}  // namespace na2d
