// The kernels, compiled once per instruction set (NA2D_ISA names it, NA2D_LANES is its vector width in floats).
//
// Layout. Lanes are neighboring columns of one map row. Rows of q, k, v are transposed into scratch as [dim][column], so
// that the key at relative position `delta` of all lanes is the vector `delta * dilation` columns further, whatever the
// dilation. Windows differ between lanes only near the left and right border; vectors there compute the union of their
// windows and mask. Rows of one residue class are handled kRows at a time and share every key row they load.
//
// Logits and weights are stored as [query row][window row][delta + K - 1][column].
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "na2d.h"

namespace na2d {
namespace {

constexpr int L = NA2D_LANES;
constexpr int kRows = 3;                        // query rows per tile
constexpr int kDeltas = L == 16 ? 7 : 4;        // accumulators kRows * kDeltas, or kRows * kDims, must fit the registers
constexpr int kDims = L == 16 ? 8 : 4;
constexpr int kDimPad = 8;                      // dims in scratch are padded to a multiple
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

// ---- moving rows between the caller's arrays and scratch ----------------------------------------------------------

#if defined(__clang__)
#define NA2D_SHUFFLE(a, b, mask) shuffle_lanes(a, b, mask)
inline Vec shuffle_lanes(Vec a, Vec b, IntVec mask) {
  Vec out;
  for (int i = 0; i < L; ++i) out[i] = mask[i] < L ? a[mask[i]] : b[mask[i] - L];
  return out;
}
#else
#define NA2D_SHUFFLE(a, b, mask) __builtin_shuffle(a, b, mask)
#endif

template <int Step>
inline void transpose_step(Vec* rows) {
  IntVec low, high;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    low[i] = (i & Step) ? L + (i - Step) : i;
    high[i] = (i & Step) ? L + i : i + Step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & Step)) {
      const Vec a = rows[i], b = rows[i + Step];
      rows[i] = NA2D_SHUFFLE(a, b, low);
      rows[i + Step] = NA2D_SHUFFLE(a, b, high);
    }
}

inline void transpose(Vec* rows) {  // an L x L block in place
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (L >= 8) transpose_step<4>(rows);
  if constexpr (L >= 16) transpose_step<8>(rows);
}

typedef uint16_t Half;  // a bfloat16's bits
typedef uint16_t HalfBits __attribute__((vector_size(L * 2)));
typedef uint16_t HalfVec __attribute__((vector_size(L * 2), aligned(2), may_alias));

inline float widen(float x) { return x; }
inline float widen(Half x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline Vec load_as_float(const float* p) { return load(p); }
inline Vec load_as_float(const Half* p) {
  typedef uint32_t Bits __attribute__((vector_size(L * 4)));
  return Vec(__builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), Bits) << 16);
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, Half* out) {  // round to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = x != x ? Half(0x7fc0) : Half((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store_narrow(float* out, Vec x) { store(out, x); }
inline void store_narrow(Half* out, Vec x) {
  typedef uint32_t Bits __attribute__((vector_size(L * 4)));
  const Bits bits = Bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<HalfVec*>(out) = __builtin_convertvector(Bits(select(x == x, Vec(rounded), Vec(Bits{} + 0x7fc0))), HalfBits);
}

// Row `y` of one head: columns [begin, end) times `factor` to out[dim][column - begin], dims padded with zeros.
template <class T>
void pack(const Na2dView& view, const Na2dProblem& p, int64_t b, int64_t y, int64_t h, int64_t begin, int64_t end,
          float factor, float* out, int64_t ld) {
  const T* base = static_cast<const T*>(view.data) + b * view.stride[0] + y * view.stride[1] + h * view.stride[3];
  const int64_t dx = view.stride[2], dd = view.stride[4], dims = round_up(p.dim, kDimPad);
  for (int64_t x = begin; x < end; x += L) {
    const int64_t nx = std::min<int64_t>(L, end - x);
    // Pixels are far apart in a fused qkv, too far for the hardware to see the stream.
    if (x + kPrefetch + L <= end)
      for (int64_t i = 0; i < L; ++i)
        for (int64_t d = 0; d < p.dim; d += 64 / sizeof(T)) __builtin_prefetch(base + (x + kPrefetch + i) * dx + d);
    for (int64_t d = 0; d < dims; d += L) {
      const int64_t nd = std::min<int64_t>(L, p.dim - d);
      const T* source = base + x * dx + d * dd;
      Vec block[L];
      if (nx == L && nd == L && dd == 1) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = load_as_float(source + i * dx) * splat(factor);
      } else {
        float part[L * L] = {};
        for (int64_t i = 0; i < nx; ++i)
          for (int64_t j = 0; j < nd; ++j) part[i * L + j] = widen(source[i * dx + j * dd]) * factor;
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = load(part + i * L);
      }
      float* target = out + d * ld + (x - begin);  // may touch the right pad, with zeros
      transpose(block);
      if (dims - d >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(target + i * ld, block[i]);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < std::min(L, kDimPad); ++i) store(target + i * ld, block[i]);
      }
    }
  }
}

// The way back: in[dim][column - begin], times factor or (where given) times factors[column - begin].
template <class T>
void unpack(const Na2dView& view, const Na2dProblem& p, int64_t b, int64_t y, int64_t h, int64_t begin, int64_t end,
            float factor, const float* factors, const float* in, int64_t ld) {
  T* base = static_cast<T*>(view.data) + b * view.stride[0] + y * view.stride[1] + h * view.stride[3];
  const int64_t dx = view.stride[2], dd = view.stride[4];
  for (int64_t x = begin; x < end; x += L) {
    const int64_t nx = std::min<int64_t>(L, end - x);
    const Vec scale = factors ? load(factors + (x - begin)) : splat(factor);
    for (int64_t d = 0; d < p.dim; d += L) {
      const int64_t nd = std::min<int64_t>(L, p.dim - d);
      const float* source = in + d * ld + (x - begin);
      T* target = base + x * dx + d * dd;
      Vec block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = i < nd ? load(source + i * ld) * scale : Vec{};
      transpose(block);
      if (nx == L && nd == L && dd == 1) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store_narrow(target + i * dx, block[i]);
      } else {
        float part[L * L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(part + i * L, block[i]);
        for (int64_t i = 0; i < nx; ++i)
          for (int64_t j = 0; j < nd; ++j) narrow(part[i * L + j], target + i * dx + j * dd);
      }
    }
  }
}

// ---- the two products ---------------------------------------------------------------------------------------------

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

// ---- one item -----------------------------------------------------------------------------------------------------

// Relative positions [low, high] that any lane of a vector of queries attends to; [inner_low, inner_high] all lanes do.
struct Range {
  int64_t low, inner_low, inner_high, high;
};

// The part of scratch that is common to both passes, and the steps they share. Columns are counted as in the map.
template <class T>
struct Tile {
  const Na2dProblem& p;
  const Columns& columns;
  const Item& item;
  const int64_t K, span, dims, length;  // length: of the row class
  const int64_t begin, end, vectors;    // columns of the queries, begin a multiple of the vector width
  int64_t key_begin, key_end;           // columns of their keys
  int64_t key_ld, query_ld, ring;
  float *keys, *values, *queries, *logits, *inverse;  // each at column `begin` or `key_begin`, behind a left pad of L
  std::vector<Range> ranges;                          // of every vector
  int64_t packed = -1;                                // key rows below this are in the ring
  int64_t row = 0, rows = 0;                          // the tile's query rows: class positions [row, row + rows)

  static int64_t floats(const Na2dProblem& p, int64_t columns) {
    const int64_t K = p.kernel, dims = round_up(p.dim, kDimPad), query_ld = leading(columns + 3 * L);
    const int64_t key_columns = std::min(p.width, columns + 2 * (K - 1) * p.dilation);
    return 2 * (kRows + K - 1) * dims * leading(key_columns + 3 * L) + kRows * dims * query_ld +
           kRows * (K * (2 * K - 1) + 1) * query_ld;
  }

  Tile(const Na2dProblem& p, const Columns& columns, const Item& item, int64_t begin, int64_t end, float*& scratch)
      : p(p), columns(columns), item(item), K(p.kernel), span(2 * K - 1), dims(round_up(p.dim, kDimPad)),
        length(class_length(p.height, p.dilation, item.residue)), begin(begin), end(end),
        vectors((end - begin + L - 1) / L), ring(kRows + K - 1) {
    key_begin = p.width, key_end = 0;
    for (int64_t x = begin; x < end; ++x) {
      key_begin = std::min(key_begin, x + columns.first[x] * p.dilation);
      key_end = std::max(key_end, x + (columns.first[x] + K - 1) * p.dilation + 1);
    }
    key_ld = leading(key_end - key_begin + 3 * L), query_ld = leading(end - begin + 3 * L);
    keys = take(scratch, ring * dims, key_ld, key_end - key_begin);
    values = take(scratch, ring * dims, key_ld, key_end - key_begin);
    queries = take(scratch, kRows * dims, query_ld, end - begin);
    logits = take(scratch, kRows * K * span, query_ld, end - begin);
    inverse = take(scratch, kRows, query_ld, end - begin);
    for (int64_t x = begin; x < end; x += L) {
      const auto firsts = std::minmax_element(columns.first + x, columns.first + std::min(x + L, end));
      ranges.push_back({*firsts.first, *firsts.second, *firsts.first + K - 1, *firsts.second + K - 1});
    }
  }

  // `rows` rows of `ld` floats, the first column behind a pad of L. The pads are zero: vectors at the ends read, and mask
  // away, up to L columns of them.
  static float* take(float*& scratch, int64_t rows, int64_t ld, int64_t columns) {
    float* const block = scratch + L;
    for (int64_t i = 0; i < rows; ++i) {
      float* const row = block + i * ld;
      std::fill(row - L, row, 0.f);
      std::fill(row + columns, row + ld - L, 0.f);
    }
    scratch += rows * ld;
    return block;
  }

  int64_t start(int64_t position) const { return window_start(position, length, K); }
  int64_t map_row(int64_t position) const { return position * p.dilation + item.residue; }
  int64_t slot(int64_t key_row) const { return key_row % ring * dims * key_ld; }
  // Where the logit (or weight) of a tile row, window row and relative column lies, for column `begin`.
  int64_t place(int64_t r, int64_t window_row, int64_t delta) const {
    return ((r * K + window_row) * span + delta + K - 1) * query_ld;
  }

  void pack_row(const Na2dView& view, int64_t position, int64_t from, int64_t to, float factor, float* out, int64_t ld) {
    pack<T>(view, p, item.batch, map_row(position), item.head, from, to, factor, out, ld);
  }
  void unpack_row(const Na2dView& view, int64_t position, int64_t from, int64_t to, float factor, const float* factors,
                  const float* in, int64_t ld) {
    unpack<T>(view, p, item.batch, map_row(position), item.head, from, to, factor, factors, in, ld);
  }

  void enter(int64_t first_row, int64_t row_count) {
    row = first_row, rows = row_count;
    const int64_t stop = start(row + rows - 1) + K;
    for (int64_t k = std::max(packed, start(row)); k < stop; ++k) {
      pack_row(p.key, k, key_begin, key_end, 1, keys + slot(k), key_ld);
      pack_row(p.value, k, key_begin, key_end, 1, values + slot(k), key_ld);
    }
    packed = stop;
    for (int64_t r = 0; r < rows; ++r)
      pack_row(p.query, row + r, begin, end, p.scale, queries + r * dims * query_ld, query_ld);
  }

  // Calls body(key row, first tile row whose window holds it, number of such rows).
  template <class Body>
  void for_key_rows(Body body) const {
    for (int64_t k = start(row), stop = start(row + rows - 1) + K; k < stop; ++k) {
      int64_t first = 0, last = rows;
      while (start(row + first) + K <= k) ++first;
      while (start(row + last - 1) > k) --last;
      body(k, first, last - first);
    }
  }

  // What to hold in L1: near neighbors share cache lines, so one vector of queries can visit all its key rows; far ones
  // are met again only by the next vectors of queries, so a key row stays until all of those have visited it.
  bool near() const { return (K - 1) * p.dilation <= 2 * L; }

  // out[r][window row][delta][column] = <a row r, b row k>; b lies in the ring like keys and values.
  void product(const float* a, const float* b, float* out) const {
    if (near())
      for (int64_t v = 0; v < vectors; ++v)
        for_key_rows([&](int64_t k, int64_t first, int64_t count) { product_of(a, b, out, v, k, first, count); });
    else
      for_key_rows([&](int64_t k, int64_t first, int64_t count) {
        for (int64_t v = 0; v < vectors; ++v) product_of(a, b, out, v, k, first, count);
      });
  }

  void product_of(const float* a, const float* b, float* out, int64_t v, int64_t k, int64_t first, int64_t count) const {
    const Range& reach = ranges[v];
    const int64_t wanted = reach.high - reach.low + 1, calls = (wanted + kDeltas - 1) / kDeltas;
    const int64_t each = (wanted + calls - 1) / calls, x = begin + v * L;
    for (int64_t chunk = 0; chunk < dims; chunk += kDimChunk) {
      const int64_t chunk_dims = std::min<int64_t>(kDimChunk, dims - chunk);
      for (int64_t delta = reach.low; delta <= reach.high; delta += each) {
        const int64_t deltas = std::min(each, reach.high + 1 - delta);
        float* target[kRows];
        for (int64_t r = 0; r < count; ++r)
          target[r] = out + place(first + r, k - start(row + first + r), delta) + v * L;
        const float* left = a + (first * dims + chunk) * query_ld + v * L;
        const float* right = b + slot(k) + chunk * key_ld + (x + delta * p.dilation - key_begin);
        with_rows(count, [&](auto rows_of) {
          dots_of<decltype(rows_of)::value>(deltas, left, dims * query_ld, query_ld, right, key_ld, int64_t(p.dilation),
                                            chunk_dims, chunk > 0, target, query_ld);
        });
      }
    }
  }

  // Logits to weights in place, up to the factor left in `inverse`; the bias comes in here.
  void softmax() const {
    const float* const table = p.rpb ? p.rpb + item.head * span * span : nullptr;
    for (int64_t v = 0; v < vectors; ++v) {
      const Range& reach = ranges[v];
      const int64_t x = begin + v * L;
      const bool uniform = reach.low == reach.inner_low, whole = x + L <= end;
      const IntVec first = load(columns.first + x);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t top = start(row + r) - (row + r) + K - 1;  // bias row of the window's first row
        Vec highest = splat(-std::numeric_limits<float>::infinity());
        for (int64_t i = 0; i < K; ++i) {
          float* s = logits + place(r, i, reach.low) + v * L;
          const float* bias = table ? table + (top + i) * span + reach.low + K - 1 : nullptr;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, s += query_ld) {
            Vec y = load(s);
            if (bias) y += splat(*bias++);
            if (!uniform) {
              const IntVec offset = splat(int32_t(delta)) - first;
              y = select((offset >= 0) & (offset < splat(int32_t(K))), y, splat(-std::numeric_limits<float>::infinity()));
            }
            store(s, y);
            highest = select(y > highest, y, highest);
          }
        }
        Vec total{};
        for (int64_t i = 0; i < K; ++i) {
          float* s = logits + place(r, i, reach.low) + v * L;
          for (int64_t delta = reach.low; delta <= reach.high; ++delta, s += query_ld) {
            const Vec y = exp_of_negative(load(s) - highest);
            store(s, y);
            total += y;
          }
        }
        Vec inverted = splat(1.f) / total;
        if (!whole)
          for (int64_t lane = end - x; lane < L; ++lane) inverted[lane] = 0;
        store(inverse + r * query_ld + v * L, inverted);
      }
    }
  }

  // out[r][dim][column] += sum over the window of weights (laid out like logits) * b (in the ring), for the vectors
  // [from, to).
  void combine(const float* weights, const float* b, float* out, int64_t from, int64_t to) const {
    if (near())
      for (int64_t v = from; v < to; ++v)
        for (int64_t d = 0; d < dims; d += kDims)
          for_key_rows([&](int64_t k, int64_t first, int64_t count) { combine_of(weights, b, out, v, d, k, first, count); });
    else
      for_key_rows([&](int64_t k, int64_t first, int64_t count) {
        for (int64_t v = from; v < to; ++v)
          for (int64_t d = 0; d < dims; d += kDims) combine_of(weights, b, out, v, d, k, first, count);
      });
  }

  void combine_of(const float* weights, const float* b, float* out, int64_t v, int64_t d, int64_t k, int64_t first,
                  int64_t count) const {
    const Range& reach = ranges[v];
    const int64_t x = begin + v * L;
    float* target[kRows];
    for (int64_t r = 0; r < count; ++r) target[r] = out + ((first + r) * dims + d) * query_ld + v * L;
    const auto part = [&](auto masked, int64_t low, int64_t high) {
      if (low > high) return;
      const float* weight[kRows];
      for (int64_t r = 0; r < count; ++r)
        weight[r] = weights + place(first + r, k - start(row + first + r), low) + v * L;
      const float* value = b + slot(k) + d * key_ld + (x + low * p.dilation - key_begin);
      with_rows(count, [&](auto rows_of) {
        mix<decltype(rows_of)::value, decltype(masked)::value>(weight, query_ld, value, key_ld, p.dilation, high - low + 1,
                                                               target, query_ld, columns.first + x, int32_t(low), int32_t(K));
      });
    };
    const int64_t inner_low = std::min(reach.inner_low, reach.high + 1);
    const int64_t inner_high = std::max(reach.inner_high, inner_low - 1);
    part(std::true_type(), reach.low, inner_low - 1);
    part(std::false_type(), inner_low, inner_high);
    part(std::true_type(), inner_high + 1, reach.high);
  }
};

template <class T>
void forward_item(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch) {
  Tile<T> tile(p, columns, item, item.column_begin, item.column_end, scratch);
  const int64_t row_floats = tile.dims * tile.query_ld;
  float* const out = tile.take(scratch, kRows * tile.dims, tile.query_ld, 0);
  for (int64_t row = item.row_begin; row < item.row_end; row += kRows) {
    tile.enter(row, std::min<int64_t>(kRows, item.row_end - row));
    tile.product(tile.queries, tile.keys, tile.logits);
    tile.softmax();
    std::fill(out, out + tile.rows * row_floats - L, 0.f);
    tile.combine(tile.logits, tile.values, out, 0, tile.vectors);
    for (int64_t r = 0; r < tile.rows; ++r)
      tile.unpack_row(p.out, row + r, tile.begin, tile.end, 1, tile.inverse + r * tile.query_ld, out + r * row_floats,
                      tile.query_ld);
  }
}

int64_t forward_floats(const Na2dProblem& p, int64_t columns) {
  return Tile<float>::floats(p, columns) + kRows * round_up(p.dim, kDimPad) * leading(columns + 3 * L);
}

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
    if (tile.near())
      for (int64_t v = 0; v < own_vectors; ++v)
        for (int64_t d = 0; d < dims; d += kDims)
          for_sources([&](int64_t r, int64_t k, int64_t count) { scatter_of(weights, source, target, v, d, r, k, count); });
    else
      for_sources([&](int64_t r, int64_t k, int64_t count) {
        for (int64_t v = 0; v < own_vectors; ++v)
          for (int64_t d = 0; d < dims; d += kDims) scatter_of(weights, source, target, v, d, r, k, count);
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

void forward(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch) {
  if (p.bf16)
    forward_item<Half>(p, columns, item, scratch);
  else
    forward_item<float>(p, columns, item, scratch);
}

void backward(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch, float* grad_rpb) {
  if (p.bf16)
    Backward<Half>(p, columns, item, scratch).run(grad_rpb);
  else
    Backward<float>(p, columns, item, scratch).run(grad_rpb);
}

int64_t backward_floats(const Na2dProblem& p, int64_t columns) { return Backward<float>::floats(p, columns); }

#define NA2D_TEXT_(x) #x
#define NA2D_TEXT(x) NA2D_TEXT_(x)

}  // namespace

const Kernels NA2D_ISA = {forward, backward, forward_floats, backward_floats, NA2D_TEXT(NA2D_ISA)};

}  // namespace na2d
