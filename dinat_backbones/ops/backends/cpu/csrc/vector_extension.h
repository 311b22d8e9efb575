// Vectors in the extension that GCC and Clang share.
#pragma once
#include <cstdint>

#if defined(NA2D_BF16_PRODUCTS)
#include <immintrin.h>
#endif

namespace na2d {
namespace {

typedef float Vec __attribute__((vector_size(L * 4)));
typedef int32_t IntVec __attribute__((vector_size(L * 4)));
typedef uint32_t UintVec __attribute__((vector_size(L * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(L * 2)));
typedef int16_t HalfPairs __attribute__((vector_size(L * 4)));
typedef float UnalignedVec __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t UnalignedIntVec __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(L * 2), aligned(2), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline IntVec load(const int32_t* p) { return *reinterpret_cast<const UnalignedIntVec*>(p); }
inline UintVec load_widened(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const UnalignedHalfVec*>(p), UintVec);
}
inline void store_narrowed(uint16_t* p, UintVec v) {
  *reinterpret_cast<UnalignedHalfVec*>(p) = __builtin_convertvector(v, HalfVec);
}
inline Vec splat(float x) { return x - Vec{}; }  // not 0 + x, which changes -0, so that compilers would compute it
inline IntVec splat(int32_t x) { return IntVec{} + x; }
inline UintVec splat(uint32_t x) { return UintVec{} + x; }
inline Vec as_float(IntVec v) { return Vec(v); }
inline Vec as_float(UintVec v) { return Vec(v); }
inline IntVec as_int(Vec v) { return IntVec(v); }
inline UintVec as_uint(Vec v) { return UintVec(v); }
inline Vec select(IntVec mask, Vec a, Vec b) { return mask ? a : b; }

// Keeps a vector in a register: without this, compilers load it again for each product.
inline void in_register([[maybe_unused]] Vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

#if defined(NA2D_BF16_PRODUCTS)
typedef float HalfAlignedVec __attribute__((vector_size(L * 4), aligned(2), may_alias));

// Pairs of neighboring elements.
inline Vec load_pairs(const uint16_t* p) { return *reinterpret_cast<const HalfAlignedVec*>(p); }
// Lanes of a and b are pairs: adds the products of the low halves and of the high halves.
inline Vec add_pairs(Vec sum, Vec a, Vec b) { return Vec(_mm512_dpbf16_ps(__m512(sum), (__m512bh)(a), (__m512bh)(b))); }
// Pairs of two vectors, rounded to nearest even.
inline Vec round_to_pairs(Vec low, Vec high) {
  HalfPairs turns;
  NA2D_UNROLL(16)
  for (int i = 0; i < L; ++i) turns[2 * i] = short(i), turns[2 * i + 1] = short(L + i);
  return Vec(_mm512_permutexvar_epi16(__m512i(turns), (__m512i)(_mm512_cvtne2ps_pbh(__m512(high), __m512(low)))));
}
#endif

// Blocks of `Step` lanes of a and b in turns: the even blocks of both, or with `Odd` the odd ones.
#if defined(__clang__)
template <int Step, bool Odd>
inline Vec interleave(Vec a, Vec b) {
  Vec out;
  for (int i = 0; i < L; ++i) {
    const int from = (i & ~Step) | (Odd ? Step : 0);
    out[i] = (i & Step) ? b[from] : a[from];
  }
  return out;
}
#else
template <int Step, bool Odd>
inline Vec interleave(Vec a, Vec b) {
  IntVec mask;
  NA2D_UNROLL(16)
  for (int i = 0; i < L; ++i) mask[i] = ((i & ~Step) | (Odd ? Step : 0)) + ((i & Step) ? L : 0);
  return __builtin_shuffle(a, b, mask);
}
#endif

}  // namespace
}  // namespace na2d
