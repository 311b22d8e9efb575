// Vectors in standard C++, for compilers without the extension that GCC and Clang share. The loops are for the compiler to
// vectorize; -DNA2D_PORTABLE_VECTORS takes them anywhere.
#pragma once
#include <cstdint>
#include <cstring>

namespace na2d {
namespace {

template <class T>
struct Lanes {
  T lane[L];
  T& operator[](int64_t i) { return lane[i]; }
  const T& operator[](int64_t i) const { return lane[i]; }
};
typedef Lanes<float> Vec;
typedef Lanes<int32_t> IntVec;
typedef Lanes<uint32_t> UintVec;

template <class Out, class F>
inline Out each_lane(F f) {
  Out out;
  for (int i = 0; i < L; ++i) out.lane[i] = f(i);
  return out;
}

template <class T>
inline Lanes<T> operator+(const Lanes<T>& a, const Lanes<T>& b) {
  return each_lane<Lanes<T>>([&](int i) { return a[i] + b[i]; });
}
template <class T>
inline Lanes<T> operator-(const Lanes<T>& a, const Lanes<T>& b) {
  return each_lane<Lanes<T>>([&](int i) { return a[i] - b[i]; });
}
template <class T>
inline Lanes<T>& operator+=(Lanes<T>& a, const Lanes<T>& b) {
  return a = a + b;
}
inline Vec operator*(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return a[i] * b[i]; });
}
inline Vec operator/(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return a[i] / b[i]; });
}
template <class T>
inline Lanes<T> operator&(const Lanes<T>& a, const Lanes<T>& b) {
  return each_lane<Lanes<T>>([&](int i) { return T(a[i] & b[i]); });
}
template <class T>
inline Lanes<T> operator>>(const Lanes<T>& a, int bits) {
  return each_lane<Lanes<T>>([&](int i) { return T(a[i] >> bits); });
}
template <class T>
inline Lanes<T> operator<<(const Lanes<T>& a, int bits) {
  return each_lane<Lanes<T>>([&](int i) { return T(uint32_t(a[i]) << bits); });
}
// Comparisons return lanes of all ones or all zeros.
template <class T>
inline IntVec operator<(const Lanes<T>& a, const Lanes<T>& b) {
  return each_lane<IntVec>([&](int i) { return -int32_t(a[i] < b[i]); });
}
template <class T>
inline IntVec operator>(const Lanes<T>& a, const Lanes<T>& b) {
  return each_lane<IntVec>([&](int i) { return -int32_t(a[i] > b[i]); });
}
template <class T>
inline IntVec operator>=(const Lanes<T>& a, const Lanes<T>& b) {
  return each_lane<IntVec>([&](int i) { return -int32_t(a[i] >= b[i]); });
}
template <class T>
inline IntVec operator==(const Lanes<T>& a, const Lanes<T>& b) {
  return each_lane<IntVec>([&](int i) { return -int32_t(a[i] == b[i]); });
}

template <class T>
inline Lanes<T> load_lanes(const T* p) {
  Lanes<T> out;
  std::memcpy(out.lane, p, sizeof(out.lane));
  return out;
}
inline Vec load(const float* p) { return load_lanes(p); }
inline IntVec load(const int32_t* p) { return load_lanes(p); }
inline void store(float* p, const Vec& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
inline UintVec load_widened(const uint16_t* p) {
  return each_lane<UintVec>([&](int i) { return uint32_t(p[i]); });
}
inline void store_narrowed(uint16_t* p, const UintVec& v) {
  for (int i = 0; i < L; ++i) p[i] = uint16_t(v[i]);
}
inline Vec splat(float x) {
  return each_lane<Vec>([=](int) { return x; });
}
inline IntVec splat(int32_t x) {
  return each_lane<IntVec>([=](int) { return x; });
}
inline UintVec splat(uint32_t x) {
  return each_lane<UintVec>([=](int) { return x; });
}
template <class To, class From>
inline To same_bits(const From& from) {
  To to;
  std::memcpy(to.lane, from.lane, sizeof(to.lane));
  return to;
}
inline Vec as_float(const IntVec& v) { return same_bits<Vec>(v); }
inline Vec as_float(const UintVec& v) { return same_bits<Vec>(v); }
inline IntVec as_int(const Vec& v) { return same_bits<IntVec>(v); }
inline UintVec as_uint(const Vec& v) { return same_bits<UintVec>(v); }
inline Vec select(const IntVec& mask, const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) { return mask[i] ? a[i] : b[i]; });
}
inline void in_register(Vec&) {}

// Blocks of `Step` lanes of a and b in turns: the even blocks of both, or with `Odd` the odd ones.
template <int Step, bool Odd>
inline Vec interleave(const Vec& a, const Vec& b) {
  return each_lane<Vec>([&](int i) {
    const int from = (i & ~Step) | (Odd ? Step : 0);
    return (i & Step) ? b[from] : a[from];
  });
}

}  // namespace
}  // namespace na2d
