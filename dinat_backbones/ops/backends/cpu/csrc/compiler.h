// What compilers spell differently: unrolling, inlining, prefetching.
#pragma once

#define NA2D_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define NA2D_UNROLL(n) NA2D_PRAGMA(unroll(n))
#elif defined(__GNUC__)
#define NA2D_UNROLL(n) NA2D_PRAGMA(GCC unroll n)
#else
#define NA2D_UNROLL(n)
#endif

#if defined(__GNUC__)  // Clang defines it, too
#define NA2D_ALWAYS_INLINE __attribute__((always_inline))
#else
#define NA2D_ALWAYS_INLINE
#endif

#if !defined(__GNUC__) && (defined(_M_X64) || defined(_M_IX86))
#include <xmmintrin.h>
#endif

namespace na2d {
namespace {

inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#elif defined(_M_X64) || defined(_M_IX86)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
#endif
}

inline void prefetch_to_l2([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#endif
}

}  // namespace
}  // namespace na2d
