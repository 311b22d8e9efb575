// Moving map rows between the caller's arrays and scratch, where they lie transposed: [dim][column].
#pragma once
#include <algorithm>
#include <cstring>

#include "na2d.h"
#include "vector.h"

namespace na2d {
namespace {

template <int Step>
inline void transpose_step(Vec* rows) {
  NA2D_UNROLL(16)
  for (int i = 0; i < L; ++i)
    if (!(i & Step)) {
      const Vec a = rows[i], b = rows[i + Step];
      rows[i] = interleave<Step, false>(a, b);
      rows[i + Step] = interleave<Step, true>(a, b);
    }
}

inline void transpose(Vec* rows) {  // an L x L block in place
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (L >= 8) transpose_step<4>(rows);
  if constexpr (L >= 16) transpose_step<8>(rows);
}

typedef uint16_t Half;  // a bfloat16's bits

template <class T>
constexpr bool kPairs = kBf16Products && sizeof(T) == sizeof(Half);
// Dims per lane of a plane, [dim][column].
template <class T>
constexpr int kLaneDims = kPairs<T> ? 2 : 1;
template <class T>
inline int64_t plane_rows(const Na2dProblem& p) {
  return round_up(round_up(p.dim, kLaneDims<T>) / kLaneDims<T>, kDimPad);
}

inline float widen(float x) { return x; }
inline float widen(Half x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline Vec load_as_float(const float* p) { return load(p); }
inline Vec load_as_float(const Half* p) { return as_float(load_widened(p) << 16); }
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, Half* out) {  // round to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = x != x ? Half(0x7fc0) : Half((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store_narrow(float* out, Vec x) { store(out, x); }
inline void store_narrow(Half* out, Vec x) {
  const UintVec bits = as_uint(x), rounded = (bits + splat(0x7fffu) + ((bits >> 16) & splat(1u))) >> 16;
  store_narrowed(out, as_uint(select(x == x, as_float(rounded), as_float(splat(0x7fc0u)))));
}

// Pixels are far apart in a fused qkv, too far for the hardware to see the stream.
template <class T>
inline void prefetch_pixel(const T* pixel, int64_t dims) {
  for (int64_t d = 0; d < dims; d += 64 / sizeof(T)) prefetch(pixel + d);
}

// Lanes of a plane from neighboring dims; pairs are not multiplied by the factor.
template <class T>
inline Vec load_lanes_of(const T* source, float factor) {
  if constexpr (kPairs<T>)
    return load_pairs(source);
  else
    return load_as_float(source) * splat(factor);
}
// One of them, where dims are `step` elements apart and `left` are left.
template <class T>
inline float lane_of(const T* source, int64_t step, [[maybe_unused]] int64_t left, float factor) {
  if constexpr (kPairs<T>) {
    const uint32_t bits = source[0] | (left > 1 ? uint32_t(source[step]) << 16 : 0);
    float pair;
    std::memcpy(&pair, &bits, 4);
    return pair;
  } else {
    return widen(source[0]) * factor;
  }
}

// Row `y` of one head: columns [begin, end) times `factor` to out[lane of dims][column - begin], padded with zeros.
template <class T>
void pack(const Na2dView& view, const Na2dProblem& p, int64_t b, int64_t y, int64_t h, int64_t begin, int64_t end,
          float factor, float* out, int64_t ld) {
  const T* base = static_cast<const T*>(view.data) + b * view.stride[0] + y * view.stride[1] + h * view.stride[3];
  const int64_t dx = view.stride[2], dd = view.stride[4], rows = plane_rows<T>(p);
  constexpr int kDims = kLaneDims<T>;
  for (int64_t x = begin; x < end; x += L) {
    const int64_t nx = std::min<int64_t>(L, end - x);
    for (int64_t i = 0; i < L; ++i) prefetch_pixel(base + (x + kPrefetch + i) * dx, p.dim);
    for (int64_t row = 0; row < rows; row += L) {
      const int64_t nd = std::min<int64_t>(L * kDims, p.dim - row * kDims);
      const T* source = base + x * dx + row * kDims * dd;
      Vec block[L];
      if (nx == L && nd == L * kDims && dd == 1) {
        NA2D_UNROLL(16)
        for (int i = 0; i < L; ++i) block[i] = load_lanes_of(source + i * dx, factor);
      } else {
        float part[L * L] = {};
        for (int64_t i = 0; i < nx; ++i)
          for (int64_t j = 0; j < nd; j += kDims) part[i * L + j / kDims] = lane_of(source + i * dx + j * dd, dd, nd - j, factor);
        NA2D_UNROLL(16)
        for (int i = 0; i < L; ++i) block[i] = load(part + i * L);
      }
      float* target = out + row * ld + (x - begin);  // may touch the right pad, with zeros
      transpose(block);
      if (rows - row >= L) {
        NA2D_UNROLL(16)
        for (int i = 0; i < L; ++i) store(target + i * ld, block[i]);
      } else {
        NA2D_UNROLL(8)
        for (int i = 0; i < (L < kDimPad ? L : kDimPad); ++i) store(target + i * ld, block[i]);
      }
    }
  }
}

// Row `y` of one head: columns [begin, end) to out[column - begin][dim], dims padded with zeros to `dims`.
template <class T>
void load_row(const Na2dView& view, const Na2dProblem& p, int64_t b, int64_t y, int64_t h, int64_t begin, int64_t end, float* out,
          int64_t dims) {
  const T* pixel = static_cast<const T*>(view.data) + b * view.stride[0] + y * view.stride[1] + h * view.stride[3] +
                   begin * view.stride[2];
  const int64_t dd = view.stride[4];
  for (int64_t x = begin; x < end; ++x, pixel += view.stride[2], out += dims) {
    prefetch_pixel(pixel + kPrefetch * view.stride[2], p.dim);
    int64_t d = 0;
    if (dd == 1)
      for (; d + L <= p.dim; d += L) store(out + d, load_as_float(pixel + d));
    for (; d < p.dim; ++d) out[d] = widen(pixel[d * dd]);
    for (; d < dims; ++d) out[d] = 0;
  }
}

// The same in pairs: the low halves are those of the column, the high halves those of the column `step` further, zeros behind
// the end. Columns from `inside` on are those of the padding.
inline void load_row_pairs(const Na2dView& view, const Na2dView* padding, const Na2dProblem& p, int64_t b, int64_t y, int64_t h,
                           int64_t begin, int64_t inside, int64_t end, int64_t step, float* out, int64_t dims) {
  const Half* const row = static_cast<const Half*>(view.data) + b * view.stride[0] + h * view.stride[3];
  const Half* const outside = padding ? static_cast<const Half*>(padding->data) + h * padding->stride[3] : nullptr;
  const auto pixel = [&](int64_t x) { return x < inside ? row + y * view.stride[1] + x * view.stride[2] : outside; };
  const auto step_of_dims = [&](int64_t x) { return x < inside ? view.stride[4] : padding->stride[4]; };
  for (int64_t x = begin; x < end; ++x, out += dims) {
    const bool last = x + step >= end;
    const Half* const near = pixel(x);
    const Half* const far = last ? near : pixel(x + step);
    const int64_t near_step = step_of_dims(x), far_step = last ? near_step : step_of_dims(x + step);
    if (x < inside) prefetch_pixel(near + kPrefetch * view.stride[2], p.dim);
    int64_t d = 0;
    if (near_step == 1 && far_step == 1)
      for (; d + L <= p.dim; d += L) {
        const UintVec low = load_widened(near + d), high = last ? UintVec{} : load_widened(far + d);
        store(out + d, as_float(low + (high << 16)));
      }
    for (; d < p.dim; ++d) {
      const uint32_t bits = near[d * near_step] | (last ? 0 : uint32_t(far[d * far_step]) << 16);
      std::memcpy(out + d, &bits, 4);
    }
    for (; d < dims; ++d) out[d] = 0;
  }
}

// The inverse of load_row: in[column - begin][dim], times factor or (where given) times factors[column - begin].
template <class T>
void store_row(const Na2dView& view, const Na2dProblem& p, int64_t b, int64_t y, int64_t h, int64_t begin, int64_t end,
            float factor, const float* factors, const float* in, int64_t dims) {
  T* pixel = static_cast<T*>(view.data) + b * view.stride[0] + y * view.stride[1] + h * view.stride[3] + begin * view.stride[2];
  const int64_t dd = view.stride[4];
  for (int64_t x = begin; x < end; ++x, pixel += view.stride[2], in += dims) {
    const float scale = factors ? factors[x - begin] : factor;
    prefetch_pixel(pixel + kPrefetch * view.stride[2], p.dim);
    int64_t d = 0;
    if (dd == 1)
      for (; d + L <= p.dim; d += L) store_narrow(pixel + d, load(in + d) * splat(scale));
    for (; d < p.dim; ++d) narrow(in[d] * scale, pixel + d * dd);
  }
}

}  // namespace
}  // namespace na2d
