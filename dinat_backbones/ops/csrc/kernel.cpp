// The kernels, compiled once per instruction set (NA2D_ISA names it, NA2D_LANES is its vector width in floats).
//
// Layout. Lanes are neighboring columns of one map row. Rows of q, k, v are transposed into scratch as [dim][column], so
// that the key at relative position `delta` of all lanes is the vector `delta * dilation` columns further, whatever the
// dilation. Windows differ between lanes only near the left and right border; vectors there compute the union of their
// windows and mask. Rows of one residue class are handled kRows at a time and share every key row they load.
//
// Logits and weights are stored as [query row][window row][delta + K - 1][column].
#include <algorithm>

#include "backward.h"
#include "na2d.h"
#include "tile.h"

namespace na2d {
namespace {

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
