// The instruction set "amx_bf16": bfloat16 with the matrix tiles of AMX; everything else as with "avx512_bf16".
//
// Layout. The queries and keys of one dilation group of rows and one of columns are a dense map, where the windows of neighbors
// overlap. A block is up to kBlockRows rows of kBlockColumns neighboring queries there, each a row of a tile; their windows lie
// within 16 columns, the columns of another. Scores are products of whole tiles, of which softmax reads each query's window, and
// weights go back to the same places, among zeros, for the weighted sums. What is multiplied with these zeros must be finite;
// where something is not, the kernels of "avx512_bf16" compute the item again.
// Right-hand sides hold pairs in 32-bit lanes: scores sum up over pairs of dims, so key rows are transposed; weighted sums over
// pairs of neighboring keys, two key rows in a tile.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#include "na2d.h"
#include "rows.h"
#include "vector.h"

namespace na2d {
namespace {

constexpr int kTile = 16;                   // rows of a tile, and 32-bit lanes of one
constexpr int kTileFloats = kTile * kTile;  // 1 KiB
constexpr int kBlockRows = 2, kBlockColumns = 8;
constexpr int kHalf = kTile / 2;            // keys of half a tile, and lanes for one row of a window
constexpr int kMostKernel = 7;              // 8 windows and the gaps between them span 14 columns; half a vector holds a row of one
constexpr int64_t kChunk = 32;              // dims of a tile
constexpr int64_t kSmallGroup = 1024;       // positions of a group whose pixels stay in the L2 cache until it is their turn
static_assert(kBlockRows * kBlockColumns == kTile && kBlockColumns + kMostKernel - 1 <= kTile && L == kTile);

bool fits(const Na2dProblem& p) { return p.bf16 && 3 <= p.kernel && p.kernel <= kMostKernel; }

// All tiles of 16 rows of 64 bytes. The thread's tiles are free again at the end: a system call need not save them then.
struct TilesInUse {
  TilesInUse() {
    alignas(64) static const struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
};

// Up to kBlockColumns neighboring queries of a group of columns, as positions there, and the first of 16 keys around them.
struct Block {
  int64_t query, count, key;
  int64_t keys;                   // which of the group's tiles of keys, see ColumnGroup
  uint8_t offset[kBlockColumns];  // from that key to the first one of each window
  uint8_t bias[kBlockColumns];    // column of that key in the bias table
};

// One group of columns: column = group + position * dilation.
struct ColumnGroup {
  int64_t group, length, inside;  // inside: how many of its columns are in the map
  std::vector<Block> blocks;
  std::vector<int64_t> keys;  // the first key of each tile of a key row: one tile where the row is short

  // For the queries at positions [from, to). `in_halves`: tiles begin at multiples of half their keys, one after the other.
  ColumnGroup(const Na2dProblem& p, int64_t group, int64_t from, int64_t to, bool in_halves)
      : group(group), length(group_length(p.width, p.dilation, group)), inside(group_length(p.map_width, p.dilation, group)) {
    for (int64_t query = from; query < to; query += blocks.back().count) {
      const int64_t start = window_start(query, length, p.kernel);
      const int64_t key = length <= p.kernel + kHalf ? 0 : in_halves ? start / kHalf * kHalf : start;
      if (keys.empty() || keys.back() != key) keys.push_back(key);
      Block block{query, 0, key, int64_t(keys.size()) - 1, {}, {}};
      for (int64_t c = 0; c < std::min<int64_t>(kBlockColumns, to - query); ++c) {
        const int64_t start = window_start(query + c, length, p.kernel);
        if (start > key + kTile - kHalf) break;
        block.offset[c] = uint8_t(start - key);
        block.bias[c] = uint8_t(start - (query + c) + p.kernel - 1);
        ++block.count;
      }
      blocks.push_back(block);
    }
  }
  bool begins_tile(const Block& block) const { return &block == blocks.data() || block.keys != (&block)[-1].keys; }
};

// The first position of a group of columns at or behind a column.
inline int64_t position_of(const Na2dProblem& p, int64_t group, int64_t column) {
  return column <= group ? 0 : (column - group + p.dilation - 1) / p.dilation;
}
// Tiles of keys that so many neighboring queries need at most.
inline int64_t key_tiles_of(int64_t positions) { return positions / kHalf + 2; }
inline int64_t chunks_of(const Na2dProblem& p) { return round_up(p.dim, kChunk) / kChunk; }

// 32 dims of a pixel, of which `left` are there; the others are zeros.
inline __m512i load_dims(const Half* pixel, int64_t step, int64_t left) {
  if (step == 1) return left >= kChunk ? _mm512_loadu_si512(pixel) : _mm512_maskz_loadu_epi16((1u << left) - 1, pixel);
  Half dims[kChunk] = {};
  for (int64_t d = 0; d < std::min(left, kChunk); ++d) dims[d] = pixel[d * step];
  return _mm512_loadu_si512(dims);
}

inline void store_dims(__m512i dims, int64_t step, int64_t left, Half* pixel) {
  if (step == 1 && left >= kChunk) return _mm512_storeu_si512(pixel, dims);
  Half copy[kChunk];
  _mm512_storeu_si512(copy, dims);
  for (int64_t d = 0; d < std::min(left, kChunk); ++d) pixel[d * step] = copy[d];
}

// The largest bits of values without their signs, to find those that are not finite: times a weight of zero they would not be zero.
struct Finite {
  __m512i most = _mm512_setzero_si512();
  void see(__m512i values) { most = _mm512_max_epu16(most, _mm512_and_si512(values, _mm512_set1_epi16(0x7fff))); }
  bool all() const { return !_mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80)); }
};

// One head of a map, row by row.
struct Pixels {
  const Na2dView& view;
  const int64_t dim, dilation, rows;  // rows: those of the group that are in the map
  const Half* const head;
  const Half* const padding;  // the pixel outside of the map; null for queries, which are all in it
  const int64_t padding_step;

  Pixels(const Na2dView& view, const Na2dProblem& p, const Item& item, const Na2dView* outside = nullptr)
      : view(view), dim(p.dim), dilation(p.dilation), rows(group_length(p.map_height, p.dilation, item.group)),
        head(static_cast<const Half*>(view.data) + item.batch * view.stride[0] + item.group * view.stride[1] +
             item.head * view.stride[3]),
        padding(outside ? static_cast<const Half*>(outside->data) + item.head * outside->stride[3] : nullptr),
        padding_step(outside ? outside->stride[4] : 0) {}

  const Half* at(int64_t row, int64_t column) const { return head + row * dilation * view.stride[1] + column * view.stride[2]; }

  // All that lies in the same row and column.
  void fetch(int64_t row, int64_t column) const {
    const Half* const pixel = at(row, column);
    for (int64_t d = 0; d < dim; d += kChunk) prefetch(pixel + d);
  }

  // Dims [d, d + 32) of pixels of a group of columns, from `position` on; zeros behind `count` and behind the group's end.
  template <int Most>
  void load_pixels(const ColumnGroup& columns, int64_t row, int64_t position, int64_t count, int64_t d, __m512i (&out)[Most]) const {
    const Half* pixel = at(row, columns.group + position * dilation) + d * view.stride[4];
    const int64_t step = dilation * view.stride[2], there = std::min<int64_t>(count, columns.length - position);
    const int64_t inside = row < rows ? std::min(there, columns.inside - position) : 0;
    if (inside == Most && view.stride[4] == 1 && dim - d >= kChunk) {
      NA2D_UNROLL(16)
      for (int i = 0; i < Most; ++i) out[i] = _mm512_loadu_si512(pixel + i * step);
      return;
    }
    const __m512i outside = inside < there ? load_dims(padding + d * padding_step, padding_step, dim - d) : _mm512_setzero_si512();
    for (int64_t i = 0; i < Most; ++i, pixel += step)
      out[i] = i < inside ? load_dims(pixel, view.stride[4], dim - d) : i < there ? outside : _mm512_setzero_si512();
  }

  // Dims [d, d + 32) of one of them, in two vectors of 16; with `InFours`, every other four dims are in the first one.
  template <bool InFours>
  void store_pixel(const ColumnGroup& columns, int64_t row, int64_t position, int64_t d, Vec low, Vec high) const {
    Half* const pixel = const_cast<Half*>(at(row, columns.group + position * dilation)) + d * view.stride[4];
    __m512i dims = (__m512i)_mm512_cvtne2ps_pbh(__m512(high), __m512(low));
    if constexpr (InFours) dims = _mm512_maskz_permutexvar_epi64(__mmask8(-1), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), dims);
    store_dims(dims, view.stride[4], dim - d, pixel);
  }
};

// out[pair of dims][key]: the right-hand side of scores.
inline void store_transposed(const __m512i* pixels, float* out) {
  Vec rows[kTile];
  NA2D_UNROLL(16)
  for (int i = 0; i < kTile; ++i) rows[i] = Vec(pixels[i]);
  transpose(rows);
  NA2D_UNROLL(16)
  for (int i = 0; i < kTile; ++i) store(out + i * kTile, rows[i]);
}

// out[pair of pixels][dim], `ld` floats per pair: the right-hand side of weighted sums. Of 32 dims, every other four come first,
// see `store_pixel`.
inline void store_paired(const __m512i* pixels, int64_t ld, float* out) {
  NA2D_UNROLL(8)
  for (int i = 0; i < kTile; i += 2, out += ld) {
    store(out, Vec(_mm512_unpacklo_epi16(pixels[i], pixels[i + 1])));
    store(out + L, Vec(_mm512_unpackhi_epi16(pixels[i], pixels[i + 1])));
  }
}

inline Vec plus(Vec a, Vec b) { return a + b; }
// The second where one is NaN. (All lanes are named because GCC warns of its own header otherwise.)
inline Vec larger(Vec a, Vec b) { return Vec(_mm512_maskz_max_ps(__mmask16(-1), __m512(a), __m512(b))); }

// exp for x <= 0 in some lanes, to 4e-6 of its value; 0 below -88 and for -inf, NaN for NaN. 0 in the others.
inline Vec exp_of_negative(Vec x, __mmask16 lanes) {
  x = larger(splat(-127.f), x * splat(1.44269504f));
  const Vec shifter = splat(12582912.f + 127);
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  Vec p = splat(9.57010221e-3f);
  p = p * f + splat(5.59178628e-2f);
  p = p * f + splat(.240247443f);
  p = p * f + splat(.693121791f);
  p = p * f + splat(.999999285f);
  return Vec(_mm512_maskz_mul_ps(lanes, __m512(p), __m512(as_float(as_int(shifted) << 23))));
}

// Lane q: what `op` makes of all lanes of values[q].
template <int Step = kTile / 2, class Op>
inline Vec reduce(Vec* values, Op op) {
  NA2D_UNROLL(8)
  for (int i = 0; i < Step; ++i)
    values[i] = op(interleave<Step, false>(values[i], values[i + Step]), interleave<Step, true>(values[i], values[i + Step]));
  if constexpr (Step > 1)
    return reduce<Step / 2>(values, op);
  else
    return values[0];
}

// The queries of a block, up to two rows of them.
struct Queries {
  int64_t rows;
  int64_t bias[kBlockRows];  // row of the bias table for the first row of each window
  int64_t key[kBlockRows];   // the first row of each window, counted from `base`
  int64_t base, stop;        // key rows of all windows; base is the first one of a pair, and may lie one before them

  // Rows of keys are paired so that `phase` + the first one is even.
  Queries(int64_t row, int64_t rows, int64_t length, int64_t kernel, int64_t phase) : rows(rows) {
    const int64_t first = window_start(row, length, kernel);
    base = first - (first + phase) % 2, stop = window_start(row + rows - 1, length, kernel) + kernel;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const int64_t start = window_start(row + std::min(r, rows - 1), length, kernel);
      bias[r] = start - (row + r) + kernel - 1, key[r] = start - base;
    }
  }
  int64_t pairs() const { return (stop - base + 1) / 2; }
};

// Calls body(query, row, column) for the queries of a block; query: the row of a tile.
template <class Body>
inline void for_queries(const Block& block, const Queries& queries, Body body) {
  for (int64_t r = 0; r < queries.rows; ++r)
    for (int64_t c = 0; c < block.count; ++c) body(r * kBlockColumns + c, r, c);
}

// Calls body(query, row, column, std::bool_constant<Odd>): whether its window begins with the second row of a pair.
template <class Body>
inline void for_windows(const Block& block, const Queries& queries, Body body) {
  for (int64_t r = 0; r < queries.rows; ++r)
    if (queries.key[r] % 2)
      for (int64_t c = 0; c < block.count; ++c) body(r * kBlockColumns + c, r, c, std::true_type());
    else
      for (int64_t c = 0; c < block.count; ++c) body(r * kBlockColumns + c, r, c, std::false_type());
}

// Key rows that the tiles of a block hold: its windows, and what else is in the pairs that they begin and end in.
template <int K, int Rows>
constexpr int kRing = (Rows + K + 2) / 2 * 2;

// What has one number for each neighbor of each query: two rows of a window in a vector, each in a half of it. In tiles they lie
// as [key row][query][key], of which a window is a row of K keys.
template <int K>
struct Windows {
  static constexpr int kPairs = (K + 1) / 2, kSpan = 2 * K - 1;
  static constexpr int64_t kTable = K * K * kPairs * L;  // floats of a bias table, or of its gradient, see `cell`

  // Vectors for windows that begin at a row and a column of the bias table.
  static int64_t cell(int64_t row, int64_t column) { return (row * K + column) * kPairs * L; }
  // Calls body(index in such a table, index in a bias table [2K-1, 2K-1]) for each neighbor of each.
  template <class Body>
  static void for_cells(Body body) {
    for (int row = 0; row < K; ++row)
      for (int column = 0; column < K; ++column)
        for (int i = 0; i < K; ++i)
          for (int j = 0; j < K; ++j) body(cell(row, column) + i * kHalf + j, (row + i) * kSpan + column + j);
  }

  // The lanes that are neighbors in a vector of rows 2i and 2i + 1.
  static constexpr __mmask16 lanes(int i) { return __mmask16(((1 << K) - 1) * (2 * i + 1 < K ? 1 + (1 << kHalf) : 1)); }
  // A query's window in tiles of products, and rows 2i and 2i + 1 of it; other lanes hold what lies beside the window.
  static const float* first(const float* tiles, const Block& block, const Queries& queries, int64_t q, int64_t r, int64_t c) {
    return tiles + (queries.key[r] * kTile + q) * kTile + block.offset[c];
  }
  static Vec load_pair(const float* first, int i) {
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(first + 2 * i * kTileFloats));
    return Vec(_mm512_insertf32x8(low, 2 * i + 1 < K ? _mm256_loadu_ps(first + (2 * i + 1) * kTileFloats) : _mm256_setzero_ps(), 1));
  }
};

// Weights, or their gradients, in bfloat16: left-hand sides of sums over keys, [pair of key rows][query][2][key], with zeros between
// the windows.
template <int K>
struct Weights {
  static constexpr int64_t kFloats = kRing<K, kBlockRows> / 2 * kTileFloats;
  float* const tiles;
  uint64_t offsets = 0, rows = 0;  // where they lie

  explicit Weights(float* tiles) : tiles(tiles) {}

  // To be called before those of a block are stored.
  void place(const Block& block, const Queries& queries) {
    uint64_t now;
    std::memcpy(&now, block.offset, sizeof now);
    const uint64_t now_rows = uint64_t(block.count << 24 | queries.rows << 16 | queries.key[0] << 8 | queries.key[1]);
    if (now == offsets && now_rows == rows) return;
    std::fill_n(tiles, kFloats, 0.f);
    offsets = now, rows = now_rows;
  }
  Half* first(const Block& block, const Queries& queries, int64_t q, int64_t r, int64_t c) const {
    return reinterpret_cast<Half*>(tiles) + (queries.key[r] / 2 * kTile + q) * 2 * kTile + block.offset[c];
  }
  template <bool Odd>
  static void store_pair(Half* first, int i, Vec pair) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(__m512(pair));
    const auto row = [&](int k) { return reinterpret_cast<__m128i*>(first + k / 2 * 2 * kTileFloats + k % 2 * kTile); };
    _mm_storeu_si128(row(2 * i + Odd), _mm256_castsi256_si128(halves));
    if (2 * i + 1 < K) _mm_storeu_si128(row(2 * i + 1 + Odd), _mm256_extracti128_si256(halves, 1));
  }
};

// Softmax over windows.
template <int K>
struct Softmax {
  static constexpr int kPairs = Windows<K>::kPairs;
  static constexpr int64_t kFloats = Windows<K>::kTable + kPairs * kTile * L;
  const float scale;
  float *const bias, *const exponents;

  Softmax(const Na2dProblem& p, int64_t head, float* scratch)
      : scale(p.scale), bias(scratch), exponents(bias + Windows<K>::kTable) {
    std::fill_n(bias, Windows<K>::kTable, -std::numeric_limits<float>::infinity());  // lanes that are no neighbor
    const float* const table = p.rpb ? p.rpb + head * Windows<K>::kSpan * Windows<K>::kSpan : nullptr;
    Windows<K>::for_cells([&](int64_t at, int64_t cell) { bias[at] = table ? table[cell] : 0.f; });
  }

  // For each query calls first before(row, column), then body(query, row, column, Odd), and what that returns with (pair of rows of
  // the window, weights before they are divided by their sum).
  template <class Before, class Body>
  void run(const float* products, const Block& block, const Queries& queries, float* inverse, Before before, Body body) const {
    Vec highest[kTile] = {}, total[kTile] = {};
    for_queries(block, queries, [&](int64_t q, int64_t r, int64_t c) {
      const float* const row = bias + Windows<K>::cell(queries.bias[r], block.bias[c]);
      const float* const first = Windows<K>::first(products, block, queries, q, r, c);
      float* const to = exponents + q * kPairs * L;
      before(r, c);
      Vec most = splat(-std::numeric_limits<float>::infinity());
      NA2D_UNROLL(4)
      for (int i = 0; i < kPairs; ++i) {
        const Vec product = Windows<K>::load_pair(first, i);
        const Vec y = Vec(_mm512_mask3_fmadd_ps(__m512(product), __m512(splat(scale)), __m512(load(row + i * L)), Windows<K>::lanes(i)));
        store(to + i * L, y);
        most = larger(y, most);
      }
      highest[q] = most;
    });
    alignas(64) float shift[kTile];
    store(shift, reduce(highest, larger));
    for_windows(block, queries, [&](int64_t q, int64_t r, int64_t c, auto odd) {
      const float* const from = exponents + q * kPairs * L;
      const Vec most = splat(shift[q]);
      const auto finish = body(q, r, c, odd);
      Vec sum{};
      NA2D_UNROLL(4)
      for (int i = 0; i < kPairs; ++i) {
        const Vec y = exp_of_negative(load(from + i * L) - most, Windows<K>::lanes(i));
        sum += y;
        finish(i, y);
      }
      total[q] = sum;
    });
    store(inverse, splat(1.f) / reduce(total, plus));
  }

};

// One left-hand tile times one right-hand tile for each chunk of dims, summed up: out[query][key].
inline void multiply_chunks(const float* left, const float* right, int64_t chunks, float* out) {
  _tile_zero(0);
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_loadd(4, left + c * kTileFloats, 64);
    _tile_loadd(5, right + c * kTileFloats, 64);
    _tile_dpbf16ps(0, 4, 5);
  }
  _tile_stored(0, out, 64);
}

// Pixels of one key row around a block, as right-hand sides: transposed for scores, and paired for sums.
struct KeyTiles {
  const ColumnGroup& columns;
  const int64_t chunks, slot_floats, block_floats;

  KeyTiles(const ColumnGroup& columns, int64_t chunks, int64_t slots)
      : columns(columns), chunks(chunks), slot_floats(chunks * kTileFloats), block_floats(slots * chunks * kTileFloats) {}

  int64_t floats() const { return int64_t(columns.keys.size()) * block_floats; }
  int64_t at(const Block& block, int64_t slot) const { return block.keys * block_floats + slot * slot_floats; }
  void pack(const Pixels& map, const Block& block, int64_t row, float* transposed, float* paired, Finite* finite) const {
    for (int64_t c = 0; c < chunks; ++c) {
      __m512i pixels[kTile];
      map.load_pixels(columns, row, block.key, kTile, c * kChunk, pixels);
      if (transposed) store_transposed(pixels, transposed + c * kTileFloats);
      if (paired) {
        store_paired(pixels, chunks * 2 * L, paired + c * 2 * L);
        for (const __m512i& pixel : pixels) finite->see(pixel);
      }
    }
  }
};

// The queries of a block as a left-hand tile for each chunk of dims; `finite`, where given, sees them.
inline void load_queries(const Pixels& map, const ColumnGroup& columns, const Block& block, int64_t row, const Queries& queries,
                         int64_t chunks, float* out, Finite* finite) {
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t r = 0; r < queries.rows; ++r) {
      __m512i pixels[kBlockColumns];
      map.load_pixels(columns, row + r, block.query, block.count, c * kChunk, pixels);
      NA2D_UNROLL(8)
      for (int i = 0; i < kBlockColumns; ++i) {
        store(out + c * kTileFloats + (r * kBlockColumns + i) * L, Vec(pixels[i]));
        if (finite) finite->see(pixels[i]);
      }
    }
}

// out[chunk of dims][query][dim]: sums over pairs of key rows, which lie in a ring from `slot` on, of weights times paired pixels.
template <int Ring>
void sum_up(const float* weights, const float* paired, int64_t slot, int64_t pairs, int64_t chunks, float* out) {
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < pairs; ++i) {
      const float* const right = paired + (slot + 2 * i) % Ring * chunks * kTileFloats + c * 2 * L;
      _tile_loadd(4, weights + i * kTileFloats, 64);
      _tile_loadd(5, right, chunks * 2 * L * 4);
      _tile_loadd(6, right + L, chunks * 2 * L * 4);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, out + c * 2 * kTileFloats, 2 * L * 4);
    _tile_stored(1, out + c * 2 * kTileFloats + L, 2 * L * 4);
  }
}

// Those sums, times factor(query), to the pixels of a block, where wanted(query).
template <class Wanted, class Factor>
void store_sums(const float* sums, int64_t chunks, const ColumnGroup& columns, const Block& block, int64_t row,
                const Queries& queries, const Pixels& out, Wanted wanted, Factor factor) {
  for (int64_t c = 0; c < chunks; ++c, sums += 2 * kTileFloats)
    for_queries(block, queries, [&](int64_t q, int64_t r, int64_t column) {
      if (!wanted(q)) return;
      const float* const sum = sums + q * 2 * L;
      const Vec by = splat(factor(q));
      out.store_pixel<true>(columns, row + r, block.query + column, c * kChunk, load(sum) * by, load(sum + L) * by);
    });
}

// Fetches what is needed later, while there is something to compute: the same place in the next group of columns where a group is
// small, or else a row that comes next.
struct FetchAhead {
  const ColumnGroup& columns;
  const bool next_group;

  FetchAhead(const Na2dProblem& p, const ColumnGroup& columns, int64_t rows)
      : columns(columns), next_group(p.dilation > 1 && columns.length * rows <= kSmallGroup) {}
  void operator()(const Pixels& map, int64_t row, int64_t next_row, int64_t position) const {
    map.fetch(next_group ? row : next_row, columns.group + position * map.dilation + next_group);
  }
};

// Fetches all rows of an item in the order of addresses: its groups of columns take them in leaps, which memory answers slowly.
inline void fetch_rows(const Na2dProblem& p, const Item& item, int64_t begin, int64_t end, std::initializer_list<const Pixels*> maps) {
  if (p.dilation == 1) return;
  for (int64_t row = begin; row < std::min(end, group_length(p.map_height, p.dilation, item.group)); ++row)
    for (int64_t column = item.column_begin; column < item.column_end; ++column)
      for (const Pixels* map : maps) prefetch_to_l2(map->at(row, column));
}

// Scratch, piece by piece.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* const piece = next;
    next += floats;
    return piece;
  }
};

// The forward pass of one item.
template <int K>
struct Forward {
  static constexpr int kKeyRows = kRing<K, kBlockRows>;
  const Na2dProblem& p;
  const Item& item;
  const int64_t chunks, length;  // length: of the group of rows
  const Pixels queries, keys, values, out;
  const Softmax<K> softmax;
  Weights<K> weights;
  float *const products, *const inverse, *const query_tile, *const sums, *const tiles;

  static int64_t floats(const Na2dProblem& p, int64_t columns) {
    return Softmax<K>::kFloats + Weights<K>::kFloats + kKeyRows * kTileFloats + L +
           chunks_of(p) * kTileFloats * (3 + 2 * kKeyRows * key_tiles_of(columns / p.dilation + 1));
  }

  Forward(const Na2dProblem& p, const Item& item, Scratch scratch)
      : p(p), item(item), chunks(chunks_of(p)), length(group_length(p.height, p.dilation, item.group)), queries(p.query, p, item),
        keys(p.key, p, item, &p.key_padding), values(p.value, p, item, &p.value_padding), out(p.out, p, item),
        softmax(p, item.head, scratch.take(Softmax<K>::kFloats)), weights(scratch.take(Weights<K>::kFloats)),
        products(scratch.take(kKeyRows * kTileFloats)), inverse(scratch.take(L)), query_tile(scratch.take(chunks * kTileFloats)),
        sums(scratch.take(2 * chunks * kTileFloats)), tiles(scratch.next) {}

  // False when a value is not finite; some of the output may be stored then.
  bool run() {
    const TilesInUse in_use;
    fetch_rows(p, item, window_start(item.row_begin, length, K), window_start(item.row_end - 1, length, K) + K, {&queries, &keys, &values});
    for (int64_t group = 0; group < p.dilation; ++group) {
      const int64_t from = position_of(p, group, item.column_begin), to = position_of(p, group, item.column_end);
      if (from < to && !run(ColumnGroup(p, group, from, to, false))) return false;
    }
    return true;
  }

  bool run(const ColumnGroup& columns) {
    const KeyTiles layout(columns, chunks, kKeyRows);
    const int64_t phase = (item.row_begin + K / 2) % 2;  // most windows begin with the first row of a pair
    const auto slot = [&](int64_t key_row) { return (key_row + phase) % kKeyRows; };
    float *const key_tiles = tiles, *const value_tiles = tiles + layout.floats();
    std::fill_n(value_tiles, layout.floats(), 0.f);  // weights of zero are multiplied with key rows that are not there
    Finite finite;
    const FetchAhead fetch(p, columns, length);
    int64_t packed = 0;  // key rows below this are in the ring
    for (int64_t row = item.row_begin; row < item.row_end; row += kBlockRows) {
      const Queries rows(row, std::min<int64_t>(kBlockRows, item.row_end - row), length, K, phase);
      const int64_t first = window_start(row, length, K);
      for (const Block& block : columns.blocks) {
        if (columns.begins_tile(block))
          for (int64_t k = std::max(packed, first); k < rows.stop; ++k) {
            const int64_t at = layout.at(block, slot(k));
            layout.pack(keys, block, k, key_tiles + at, nullptr, nullptr);
            layout.pack(values, block, k, nullptr, value_tiles + at, &finite);
          }
        load_queries(queries, columns, block, row, rows, chunks, query_tile, nullptr);
        for (int64_t k = first; k < rows.stop; ++k)
          multiply_chunks(query_tile, key_tiles + layout.at(block, slot(k)), chunks, products + (k - rows.base) * kTileFloats);
        weights.place(block, rows);
        softmax.run(
            products, block, rows, inverse,
            [&](int64_t r, int64_t c) { fetch(values, row + r, rows.stop + r, block.query + c); },
            [&](int64_t q, int64_t r, int64_t c, auto odd) {
              fetch(queries, row + r, row + r + kBlockRows, block.query + c);
              fetch(keys, row + r, rows.stop + r, block.query + c);
              return [first = weights.first(block, rows, q, r, c)](int i, Vec pair) {
                Weights<K>::template store_pair<decltype(odd)::value>(first, i, pair);
              };
            });
        sum_up<kKeyRows>(weights.tiles, value_tiles + layout.at(block, 0), slot(rows.base), rows.pairs(), chunks, sums);
        store_sums(sums, chunks, columns, block, row, rows, out, [](int64_t) { return true; }, [&](int64_t q) { return inverse[q]; });
      }
      if (!finite.all()) return false;
      packed = rows.stop;
    }
    return true;
  }
};

// The backward pass of one item, which owns what it owns in backward.h.
template <int K>
struct Backward {
  static constexpr int kHalves = 2, kRows = kHalves * kBlockRows;  // two tiles of queries: sums over them are of 32, a whole tile
  static constexpr int kKeyRows = kRing<K, kRows>;
  static constexpr int64_t kTable = Windows<K>::kTable;
  static constexpr int64_t kProducts = kRing<K, kBlockRows> * kTileFloats;
  const Na2dProblem& p;
  const Item& item;
  const int64_t chunks, length;
  const Pixels queries, keys, values, grad_out, grad_queries, grad_keys, grad_values;
  const Softmax<K> softmax;
  Weights<K> weights[kHalves], gradients[kHalves];  // gradients: of the logits
  float *const table, *const products, *const grad_products, *const inverse;
  float* const right;                             // right-hand sides of sums over queries: [key row][query of either half][key]
  float *const query_tile, *const grad_out_tile;  // left-hand sides, [half][chunk][query][dim]
  float *const query_dims, *const grad_out_dims;  // left-hand sides of sums over queries: [dim][query of either half]
  float *const sums, *const padding_sums, *const tiles;  // padding_sums: [key or value][chunk][every other dim]
  bool owned[kTile];
  int64_t flushed;

  static int64_t floats(const Na2dProblem& p, int64_t columns) {
    const int64_t positions = std::min((p.width + p.dilation - 1) / p.dilation, columns / p.dilation + 1 + 2 * (K - 1));
    return Softmax<K>::kFloats + 2 * kHalves * Weights<K>::kFloats + kTable + 2 * kProducts + L + 2 * kKeyRows * kTileFloats +
           chunks_of(p) * (4 * L + kTileFloats * (2 * kHalves + 4 + 2 + 7 * kKeyRows * key_tiles_of(positions)));
  }

  Backward(const Na2dProblem& p, const Item& item, Scratch scratch)
      : p(p), item(item), chunks(chunks_of(p)), length(group_length(p.height, p.dilation, item.group)), queries(p.query, p, item),
        keys(p.key, p, item, &p.key_padding), values(p.value, p, item, &p.value_padding), grad_out(p.grad_out, p, item), grad_queries(p.grad_query, p, item),
        grad_keys(p.grad_key, p, item), grad_values(p.grad_value, p, item),
        softmax(p, item.head, scratch.take(Softmax<K>::kFloats)),
        weights{Weights<K>(scratch.take(Weights<K>::kFloats)), Weights<K>(scratch.take(Weights<K>::kFloats))},
        gradients{Weights<K>(scratch.take(Weights<K>::kFloats)), Weights<K>(scratch.take(Weights<K>::kFloats))},
        table(scratch.take(kTable)), products(scratch.take(kProducts)), grad_products(scratch.take(kProducts)),
        inverse(scratch.take(L)), right(scratch.take(2 * kKeyRows * kTileFloats)),
        query_tile(scratch.take(kHalves * chunks * kTileFloats)), grad_out_tile(scratch.take(kHalves * chunks * kTileFloats)),
        query_dims(scratch.take(2 * chunks * kTileFloats)), grad_out_dims(scratch.take(2 * chunks * kTileFloats)),
        sums(scratch.take(2 * chunks * kTileFloats)), padding_sums(scratch.take(4 * chunks * L)),
        tiles(scratch.next) {
    std::fill_n(table, kTable, 0.f);
    std::fill_n(padding_sums, 4 * chunks * L, 0.f);
    std::fill_n(query_tile, 2 * kHalves * chunks * kTileFloats, 0.f);
  }

  // False when a query, key or gradient of the output is not finite; some gradients may be stored then, none is in `results`.
  bool run(float* results) {
    const TilesInUse in_use;
    fetch_rows(p, item, first_query(item.row_begin, K), last_query(item.row_end - 1, length, K) + 1, {&queries, &keys, &values, &grad_out});
    for (int64_t group = 0; group < p.dilation; ++group) {
      const int64_t from = position_of(p, group, item.column_begin), to = position_of(p, group, item.column_end);
      if (from < to && !run(group, from, to)) return false;
    }
    Windows<K>::for_cells([&](int64_t at, int64_t cell) { results[cell] += table[at]; });
    if (!p.grad_padding) return true;
    results += Windows<K>::kSpan * Windows<K>::kSpan;
    for (int64_t d = 0; d < p.dim; ++d) {
      const int64_t at = (d / kChunk * 2 + d % 2) * L + d % kChunk / 2;
      results[d] += padding_sums[at] * p.scale;
      results[p.dim + d] += padding_sums[2 * chunks * L + at];
    }
    return true;
  }

  // For the keys, and queries, at positions [from, to) of a group of columns.
  bool run(int64_t group, int64_t from, int64_t to) {
    const int64_t width = group_length(p.width, p.dilation, group);
    const int64_t queries_end = std::min(last_query(to - 1, width, K) + 1, group_length(p.map_width, p.dilation, group));
    const ColumnGroup columns(p, group, first_query(from, K), queries_end, true);
    const KeyTiles layout(columns, chunks, kKeyRows);
    const int64_t tile = chunks * kTileFloats, all_tiles = layout.floats();
    const int64_t first_row = first_query(item.row_begin, K);
    const int64_t stop_row = std::min(last_query(item.row_end - 1, length, K) + 1, queries.rows);
    const int64_t phase = (first_row + K / 2) % 2;
    const auto slot = [&](int64_t key_row) { return (key_row + phase) % kKeyRows; };
    float *const key_tiles = tiles, *const value_tiles = key_tiles + all_tiles, *const paired_keys = value_tiles + all_tiles;
    float *const key_sums = paired_keys + all_tiles, *const value_sums = key_sums + 2 * all_tiles;  // [dim][key] for each of those
    std::fill_n(paired_keys, all_tiles, 0.f);
    Finite finite;
    const FetchAhead fetch(p, columns, length);
    int64_t packed = 0;
    flushed = item.row_begin;
    for (int64_t row = first_row; row < stop_row; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, stop_row - row);
      const Queries all(row, count, length, K, phase);
      const int64_t first = window_start(row, length, K);
      for (const Block& block : columns.blocks) {
        if (columns.begins_tile(block))
          for (int64_t k = std::max(packed, first); k < all.stop; ++k) {
            const int64_t at = layout.at(block, slot(k));
            layout.pack(values, block, k, value_tiles + at, nullptr, nullptr);
            layout.pack(keys, block, k, key_tiles + at, paired_keys + at, &finite);
          }
        const auto half_of = [&](int64_t half) {
          const int64_t begin = std::min(row + half * kBlockRows, length - 1);
          return Queries(begin, std::clamp<int64_t>(count - half * kBlockRows, 0, kBlockRows), length, K, phase);
        };
        const Queries halves[kHalves] = {half_of(0), half_of(1)};
        for (int64_t half = 0; half < kHalves; ++half) {
          const Queries& rows = halves[half];
          const int64_t half_row = row + half * kBlockRows;
          if (!rows.rows) continue;
          weights[half].place(block, rows);
          gradients[half].place(block, rows);
          float *const left = query_tile + half * tile, *const grad_left = grad_out_tile + half * tile;
          load_queries(queries, columns, block, half_row, rows, chunks, left, &finite);
          load_queries(grad_out, columns, block, half_row, rows, chunks, grad_left, &finite);
          for (int64_t k = window_start(half_row, length, K); k < rows.stop; ++k) {
            const int64_t at = layout.at(block, slot(k));
            multiply_chunks(left, key_tiles + at, chunks, products + (k - rows.base) * kTileFloats);
            multiply_chunks(grad_left, value_tiles + at, chunks, grad_products + (k - rows.base) * kTileFloats);
          }
          for_queries(block, rows, [&](int64_t q, int64_t r, int64_t c) {
            const int64_t y = half_row + r, x = block.query + c;
            owned[q] = item.row_begin <= y && y < item.row_end && from <= x && x < to;
          });
          const auto fetch_both = [&](const Pixels& a, const Pixels& b, int64_t ahead) {
            return [&, ahead](int64_t r, int64_t c) {
              fetch(a, half_row + r, half_row + r + ahead, block.query + c);
              fetch(b, half_row + r, half_row + r + ahead, block.query + c);
            };
          };
          differentiate(block, rows, weights[half], gradients[half], fetch_both(queries, grad_out, kRows),
                        fetch_both(keys, values, all.stop - row));
          if (p.grad_padding) add_padding_gradient(columns, block, rows, gradients[half], weights[half], left, grad_left);
          sum_up<kKeyRows>(gradients[half].tiles, paired_keys + layout.at(block, 0), slot(rows.base), rows.pairs(), chunks, sums);
          store_sums(sums, chunks, columns, block, half_row, rows, grad_queries, [&](int64_t q) { return owned[q]; },
                     [&](int64_t) { return p.scale; });
        }
        if (!finite.all()) return false;
        turn_dims(query_tile, query_dims);
        turn_dims(grad_out_tile, grad_out_dims);
        const int64_t begin = std::max(first, item.row_begin), end = std::min(all.stop, item.row_end);
        const int64_t fresh = columns.begins_tile(block) ? packed : end;  // key rows from here on have no sums yet
        turn(gradients, halves, all, right);
        add_products(query_dims, right, all, begin, end, fresh, [&](int64_t k) { return key_sums + 2 * layout.at(block, slot(k)); });
        turn(weights, halves, all, right + kKeyRows * kTileFloats);
        add_products(grad_out_dims, right + kKeyRows * kTileFloats, all, begin, end, fresh, [&](int64_t k) { return value_sums + 2 * layout.at(block, slot(k)); });
      }
      packed = all.stop;
      const int64_t done = row + kRows < stop_row ? window_start(row + kRows, length, K) : item.row_end;
      for (; flushed < std::min(done, item.row_end); ++flushed) {
        flush(layout, from, to, key_sums + 2 * slot(flushed) * tile, p.scale, grad_keys);
        flush(layout, from, to, value_sums + 2 * slot(flushed) * tile, 1, grad_values);
      }
    }
    return true;
  }

  // Products to weights and their gradients, and these to gradients of the logits. Calls first_fetch(row, column) and
  // second_fetch(row, column) for each query meanwhile.
  template <class First, class Second>
  void differentiate(const Block& block, const Queries& rows, const Weights<K>& weights, const Weights<K>& gradients,
                     First first_fetch, Second second_fetch) {
    constexpr int kPairs = Windows<K>::kPairs;
    Vec total[kTile] = {};
    softmax.run(products, block, rows, inverse, first_fetch, [&](int64_t q, int64_t r, int64_t c, auto) {
      const float* const first = Windows<K>::first(grad_products, block, rows, q, r, c);
      float* const to = softmax.exponents + q * kPairs * L;
      return [&total = total[q], first, to](int i, Vec weight) {
        store(to + i * L, weight);
        total += select(weight == Vec{}, Vec{}, weight * Windows<K>::load_pair(first, i));
      };
    });
    alignas(64) float mean[kTile];
    store(mean, reduce(total, plus) * load(inverse));
    for_windows(block, rows, [&](int64_t q, int64_t r, int64_t c, auto odd) {
      float* const cells = table + Windows<K>::cell(rows.bias[r], block.bias[c]);
      const float* const first = Windows<K>::first(grad_products, block, rows, q, r, c);
      Half *const weight_first = weights.first(block, rows, q, r, c), *const gradient_first = gradients.first(block, rows, q, r, c);
      const Vec by = splat(inverse[q]), from = splat(mean[q]);
      second_fetch(r, c);
      NA2D_UNROLL(4)
      for (int i = 0; i < kPairs; ++i) {
        const auto times = [i](Vec a, Vec b) { return Vec(_mm512_maskz_mul_ps(Windows<K>::lanes(i), __m512(a), __m512(b))); };
        const Vec weight = times(load(softmax.exponents + (q * kPairs + i) * L), by);
        const Vec gradient = select(weight == Vec{}, Vec{}, weight * (Windows<K>::load_pair(first, i) - from));
        Weights<K>::template store_pair<decltype(odd)::value>(weight_first, i, weight);
        Weights<K>::template store_pair<decltype(odd)::value>(gradient_first, i, gradient);
        if (owned[q]) store(cells + i * L, load(cells + i * L) + gradient);
      }
    });
  }

  // Adds up the gradients of the padding over the owned queries of a block.
  void add_padding_gradient(const ColumnGroup& columns, const Block& block, const Queries& rows, const Weights<K>& gradients,
                            const Weights<K>& weights, const float* query_pixels, const float* grad_out_pixels) const {
    if (rows.stop <= keys.rows && block.key + kTile <= columns.inside) return;
    const int64_t inside = std::clamp<int64_t>(columns.inside - block.key, 0, kTile);
    const uint32_t right = 0xffffu & 0xffffu << inside;  // keys of a row that are outside of the map
    const auto add = [&](const float* tiles, const float* pixels, float* target) {
      Vec sums_of[kTile] = {};  // of each query over those keys
      for (int64_t i = 0; i < rows.pairs(); ++i) {
        const int64_t row = rows.base + 2 * i;
        const __mmask32 outside = (row < keys.rows ? right : 0xffffu) | (row + 1 < keys.rows ? right : 0xffffu) << kTile;
        const __m512bh ones = (__m512bh)_mm512_maskz_set1_epi16(outside, 0x3f80);
        for (int q = 0; q < kTile; ++q)
          sums_of[q] = Vec(_mm512_dpbf16_ps(__m512(sums_of[q]), (__m512bh)load(tiles + i * kTileFloats + q * L), ones));
      }
      alignas(64) float factors[kTile];
      store(factors, reduce(sums_of, plus));
      for_queries(block, rows, [&](int64_t q, int64_t, int64_t) {
        if (!owned[q] || factors[q] == 0) return;
        for (int64_t c = 0; c < chunks; ++c) {
          const UintVec dims = as_uint(load(pixels + c * kTileFloats + q * L));
          float* const to = target + c * 2 * L;
          store(to, load(to) + splat(factors[q]) * as_float(dims << 16));
          store(to + L, load(to + L) + splat(factors[q]) * as_float(dims & splat(0xffff0000u)));
        }
      });
    };
    add(gradients.tiles, query_pixels, padding_sums);
    add(weights.tiles, grad_out_pixels, padding_sums + 2 * chunks * L);
  }

  // Left-hand sides of sums over keys to right-hand sides of sums over queries: those of the two halves in turns.
  static void turn(const Weights<K>* left, const Queries* halves, const Queries& all, float* right) {
    for (int64_t k = 0; k < 2 * all.pairs(); k += 2, right += 2 * kTileFloats) {
      const float* from[kHalves];
      for (int half = 0; half < kHalves; ++half) {
        const int64_t pair = (all.base + k - halves[half].base) / 2;
        from[half] = halves[half].rows && all.base + k >= halves[half].base && pair < halves[half].pairs()
                         ? left[half].tiles + pair * kTileFloats : nullptr;
      }
      NA2D_UNROLL(16)
      for (int q = 0; q < kTile; ++q) {
        const __m512i a = from[0] ? (__m512i)load(from[0] + q * L) : _mm512_setzero_si512();
        const __m512i b = from[1] ? (__m512i)load(from[1] + q * L) : _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
        store(right + q * L, Vec(_mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high)));
        store(right + kTileFloats + q * L, Vec(_mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high)));
      }
    }
  }

  // Pixels of both halves, [half][chunk][query][dim], to [chunk][dim][query of either half].
  void turn_dims(const float* pixels, float* out) const {
    for (int64_t c = 0; c < chunks; ++c, pixels += kTileFloats, out += 2 * kTileFloats) {
      Vec halves[kHalves][kTile];
      for (int half = 0; half < kHalves; ++half) {
        NA2D_UNROLL(16)
        for (int i = 0; i < kTile; ++i) halves[half][i] = load(pixels + half * chunks * kTileFloats + i * L);
        transpose(halves[half]);
      }
      NA2D_UNROLL(16)
      for (int i = 0; i < kTile; ++i) {
        const __m512i a = (__m512i)halves[0][i], b = (__m512i)halves[1][i];
        store(out + 2 * i * L, Vec(_mm512_mask_blend_epi16(0xaaaaaaaa, a, __m512i(UintVec(b) << 16))));
        store(out + (2 * i + 1) * L, Vec(_mm512_mask_blend_epi16(0xaaaaaaaa, __m512i(UintVec(a) >> 16), b)));
      }
    }
  }

  // target(key row)[dim][key] += left times right for the key rows [begin, end).
  template <class Target>
  void add_products(const float* left, const float* right, const Queries& all, int64_t begin, int64_t end, int64_t fresh, Target target) const {
    for (int64_t c = 0; c < chunks; ++c, left += 2 * kTileFloats) {
      _tile_loadd(6, left, 64);
      _tile_loadd(7, left + kTileFloats, 64);
      for (int64_t k = begin; k < end; ++k) {
        float* const sum = target(k) + 2 * c * kTileFloats;
        _tile_loadd(2, right + (k - all.base) * kTileFloats, 64);
        if (k < fresh) {
          _tile_loadd(0, sum, 64);
          _tile_loadd(1, sum + kTileFloats, 64);
        } else {
          _tile_zero(0);
          _tile_zero(1);
        }
        _tile_dpbf16ps(0, 6, 2);
        _tile_dpbf16ps(1, 7, 2);
        _tile_stored(0, sum, 64);
        _tile_stored(1, sum + kTileFloats, 64);
      }
    }
  }

  // Sums of one key row, [tile of keys][chunk][dim][key], times `factor`, to pixels.
  void flush(const KeyTiles& layout, int64_t from, int64_t to, float* sums, float factor, const Pixels& out) {
    const std::vector<int64_t>& firsts = layout.columns.keys;
    const int64_t step = 2 * layout.block_floats, last = int64_t(firsts.size()) - 1;
    alignas(64) static const float nothing[kHalf] = {};
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t x = from / kHalf * kHalf; x < to; x += kTile) {
        const int64_t at = (x - firsts[0]) / kHalf;  // of the tile that begins here; those before and behind share half of its keys
        const auto half_tile = [&](int64_t tile, int64_t half) -> const float* {
          return tile < 0 || tile > last ? nullptr : sums + tile * step + c * 2 * kTileFloats + half * kHalf;
        };
        const float* const parts[2][2] = {{half_tile(at, 0), half_tile(at - 1, 1)}, {half_tile(at, 1), half_tile(at + 1, 0)}};
        Vec halves[2][kTile];
        for (int half = 0; half < 2; ++half) {
          NA2D_UNROLL(16)
          for (int i = 0; i < kTile; ++i) {
            const int64_t row = (half * kTile + i) * L;
            const auto part = [&](const float* p) { return _mm256_loadu_ps(p ? p + row : nothing); };
            const __m256 low = _mm256_add_ps(part(parts[0][0]), part(parts[0][1])), high = _mm256_add_ps(part(parts[1][0]), part(parts[1][1]));
            halves[half][i] = Vec(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
          }
          transpose(halves[half]);
        }
        for (int64_t i = std::max<int64_t>(0, from - x); i < std::min<int64_t>(kTile, to - x); ++i)
          out.store_pixel<false>(layout.columns, flushed, x + i, c * kChunk, halves[0][i] * splat(factor), halves[1][i] * splat(factor));
      }
  }
};

// Calls body(std::integral_constant<int, kernel>).
template <class Body>
auto with_kernel(int64_t kernel, Body body) {
  if (kernel == 7) return body(std::integral_constant<int, 7>());
  if (kernel == 5) return body(std::integral_constant<int, 5>());
  return body(std::integral_constant<int, 3>());
}

void forward(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch) {
  const bool done = fits(p) && with_kernel(p.kernel, [&](auto K) { return Forward<decltype(K)::value>(p, item, Scratch{scratch}).run(); });
  if (!done) avx512_bf16.forward(p, columns, item, scratch);
}

void backward(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch, float* sums) {
  const bool done =
      fits(p) && with_kernel(p.kernel, [&](auto K) { return Backward<decltype(K)::value>(p, item, Scratch{scratch}).run(sums); });
  if (!done) avx512_bf16.backward(p, columns, item, scratch, sums);
}

// What is in scratch is best read from the L2 cache. It is enough for the other kernels, too, which take over where a value is not
// finite.
Need forward_need(const Na2dProblem& p, int64_t columns) {
  const Need need = avx512_bf16.forward_need(p, columns);
  if (!fits(p)) return need;
  const int64_t floats = with_kernel(p.kernel, [&](auto K) { return Forward<decltype(K)::value>::floats(p, columns); });
  return {std::max(need.floats, floats), exceeds(floats, 256 << 10)};
}

Need backward_need(const Na2dProblem& p, int64_t columns) {
  const Need need = avx512_bf16.backward_need(p, columns);
  if (!fits(p)) return need;
  const int64_t floats = with_kernel(p.kernel, [&](auto K) { return Backward<decltype(K)::value>::floats(p, columns); });
  return {std::max(need.floats, floats), exceeds(floats, 1280 << 10)};
}

}  // namespace

const Kernels amx_bf16 = {forward, backward, forward_need, backward_need, "amx_bf16"};

}  // namespace na2d
