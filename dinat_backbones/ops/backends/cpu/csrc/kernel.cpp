// The kernels, compiled once per instruction set (NA2D_ISA names it, NA2D_LANES is its vector width in floats).
//
// Layout. Scores are computed with lanes that are neighboring columns of one map row: rows of q and k are transposed into
// planes, [dim][column], so that the key at relative position `delta` of all lanes is the vector `delta * dilation` columns
// further, whatever the dilation. Windows differ between lanes only near the left and right border; vectors there compute the
// union of their windows and mask. Weighted sums are computed with lanes that are dims: rows lie as pixels, [column][dim], each
// weight is one number for all lanes, and every column takes exactly its own window.
// Rows of one dilation group are handled kRows at a time and share every row they load.
#include <algorithm>

#include "backward.h"
#include "na2d.h"
#include "tile.h"

namespace na2d {
namespace {

template <class T>
Need forward_need_of(const Na2dProblem& p, int64_t columns) {
  const int64_t K = p.kernel, dims = round_up(p.dim, L);
  const int64_t floats = Tile<T>::floats(p, columns) + (kRows + K - 1) * Tile<T>::key_columns(p, columns) * dims +
                         kRows * ((K * (2 * K - 1) + 1) * leading(kGroup * L) + kGroup * L * dims);
  return {floats, exceeds(floats, 1 << 20)};
}
template <class T>
Need backward_need_of(const Na2dProblem& p, int64_t columns) {
  const int64_t floats = Backward<T>::floats(p, columns);
  return {floats, exceeds(floats, 4 << 20)};
}

template <class T>
void forward_item(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch) {
  Tile<T> tile(p, columns, item, item.column_begin, item.column_end, scratch);
  const int64_t ld = leading(kGroup * L), out_row = kGroup * L * tile.vector_dims;
  const PixelRows<T> values(p, p.value, &p.value_padding, item, tile.key_begin, tile.key_end, tile.ring, scratch);
  float* const logits = tile.allocate(scratch, kRows * tile.K * tile.span * ld);
  float* const inverse = tile.allocate(scratch, kRows * ld);
  float* const out = tile.allocate(scratch, kRows * out_row);
  Gather sums;
  for (int64_t row = item.row_begin; row < item.row_end; row += tile.rows) {
    tile.advance(row, item.row_end, [&](int64_t k) { values.fetch(tile.slot(k), tile.map_row(k)); });
    for (int64_t from = 0; from < tile.vectors; from += kGroup) {
      const int64_t to = std::min(from + kGroup, tile.vectors), x = tile.begin + from * L;
      tile.product(tile.queries, tile.keys, logits, ld, from, to);
      tile.template softmax<kPairs<T>>(logits, inverse, ld, from, to);
      tile.combine(sums, logits, ld, from, values, out, out_row, from, to);
      for (int64_t r = 0; r < tile.rows; ++r)
        store_row<T>(p.out, p, item.batch, tile.map_row(row + r), item.head, x, std::min(x + kGroup * L, tile.end), 1,
                  inverse + r * ld, out + r * out_row, tile.vector_dims);
    }
  }
}

#if defined(NA2D_BF16_PRODUCTS)
// float32 has no pairs: its kernels are those of the instruction set without them.
constexpr const Kernels& float32 = avx512;
#else
void forward_float32(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch) {
  forward_item<float>(p, columns, item, scratch);
}
void backward_float32(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch, float* sums) {
  Backward<float>(p, columns, item, scratch).run(sums);
}
constexpr Kernels float32 = {forward_float32, backward_float32, forward_need_of<float>, backward_need_of<float>, ""};
#endif

void forward(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch) {
  if (p.bf16)
    forward_item<Half>(p, columns, item, scratch);
  else
    float32.forward(p, columns, item, scratch);
}

void backward(const Na2dProblem& p, const Columns& columns, const Item& item, float* scratch, float* sums) {
  if (p.bf16)
    Backward<Half>(p, columns, item, scratch).run(sums);
  else
    float32.backward(p, columns, item, scratch, sums);
}

Need forward_need(const Na2dProblem& p, int64_t columns) {
  return p.bf16 ? forward_need_of<Half>(p, columns) : float32.forward_need(p, columns);
}

Need backward_need(const Na2dProblem& p, int64_t columns) {
  return p.bf16 ? backward_need_of<Half>(p, columns) : float32.backward_need(p, columns);
}

#define NA2D_TEXT_(x) #x
#define NA2D_TEXT(x) NA2D_TEXT_(x)

}  // namespace

const Kernels NA2D_ISA = {forward, backward, forward_need, backward_need, NA2D_TEXT(NA2D_ISA)};

}  // namespace na2d
