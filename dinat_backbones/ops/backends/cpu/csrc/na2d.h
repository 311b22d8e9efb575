// Neighborhood attention on the CPU: the problem as the caller states it, and the per-instruction-set entry points.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define NA2D_EXPORT __declspec(dllexport)
#else
#define NA2D_EXPORT __attribute__((visibility("default")))  // the rest of the library is hidden
#endif

// Changes with Na2dProblem and with the functions below; cpu/library.py expects the same number.
#define NA2D_INTERFACE 3

extern "C" {

// One [batch, height, width, heads, dim] array; strides count elements. Null data means absent.
struct Na2dView {
  void* data;
  int64_t stride[5];
};

// Runs body(context) on `threads` threads at once and returns when all are done. It has the signature of GOMP_parallel, so
// that the caller can pass that of the OpenMP runtime torch already uses.
typedef void (*Na2dParallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

struct Na2dProblem {
  // Windows lie in a map of height x width. The arrays hold its upper left map_height x map_width; keys and values outside of them
  // are the padding, and there are no queries.
  int64_t batch, height, width, map_height, map_width, heads, dim;
  int32_t kernel, dilation;  // kernel is odd; height, width >= kernel * dilation
  int32_t bf16;              // element type of all views: 0 float32, 1 bfloat16
  int32_t threads;
  float scale;
  const float* rpb;  // contiguous [heads, 2 * kernel - 1, 2 * kernel - 1] or null
  Na2dView query, key, value, out;
  Na2dView key_padding, value_padding;                  // the same for all pixels: their first three strides are 0
  Na2dView grad_out, grad_query, grad_key, grad_value;  // used by the backward pass only
  float* grad_rpb;                                      // like rpb, or null
  float* grad_padding;                                  // contiguous [key or value][heads][dim], or null
  Na2dParallel parallel;                                // null: std::thread
};

// The caller compares both with its own values before it calls anything else.
NA2D_EXPORT int na2d_interface();         // NA2D_INTERFACE
NA2D_EXPORT int64_t na2d_problem_size();  // sizeof(Na2dProblem)
// 0 on success, 1 when memory ran out.
NA2D_EXPORT int na2d_forward(const Na2dProblem* problem);
NA2D_EXPORT int na2d_backward(const Na2dProblem* problem);
// "amx_bf16", "avx512_bf16", "avx512", "avx2" or "baseline": the instruction set in use, by default the best that the machine has.
NA2D_EXPORT const char* na2d_instruction_set();
// Switches to that instruction set (for tests). 0 on success, 1 if this machine or build does not have it.
NA2D_EXPORT int na2d_use_instruction_set(const char* name);
}

namespace na2d {

// A share of the work: queries (and, going backward, keys) at group positions [row_begin, row_end) of one dilation group of rows
// and columns [column_begin, column_end) of one head of one image.
struct Item {
  int64_t batch, head, group, row_begin, row_end, column_begin, column_end;
};

// The windows along a row, the same for every item of a call; arrays of `width` plus padding, see Geometry in na2d.cpp.
struct Columns {
  const int32_t* first;     // window start minus query position, -(K-1)..0
  const int32_t* last;      // first + K - 1
  const int32_t* key_low;   // smallest and largest (key - query position) over the queries that attend to a key of the map
  const int32_t* key_high;
};

inline int64_t group_length(int64_t length, int64_t dilation, int64_t group) {
  return (length - group + dilation - 1) / dilation;
}
inline int64_t window_start(int64_t position, int64_t length, int64_t kernel) {
  int64_t start = position - kernel / 2;
  if (start > length - kernel) start = length - kernel;
  return start < 0 ? 0 : start;
}
// First and last query whose window holds the key at `position`.
inline int64_t first_query(int64_t position, int64_t kernel) { return position < kernel ? 0 : position - kernel / 2; }
inline int64_t last_query(int64_t position, int64_t length, int64_t kernel) {
  return position >= length - kernel ? length - 1 : position + kernel / 2;
}

// Scratch for an item of so many columns, and whether it is too much: whether more items of fewer columns are better.
struct Need {
  int64_t floats;
  bool too_much;
};
inline bool exceeds(int64_t floats, int64_t bytes) { return floats * int64_t(sizeof(float)) > bytes; }

// Where the padding begins among columns [begin, end) of a row of keys or values.
inline int64_t padding_begin(const Na2dProblem& p, int64_t row, int64_t begin, int64_t end) {
  if (row >= p.map_height || p.map_width < begin) return begin;
  return p.map_width < end ? p.map_width : end;
}

// The kernels, compiled once per instruction set from kernel.cpp; those of amx_bf16 from amx.cpp.
struct Kernels {
  void (*forward)(const Na2dProblem&, const Columns&, const Item&, float* scratch);
  // Adds to sums: the gradient of rpb, [2K-1, 2K-1], and behind it that of the padding, [key or value][dim], if it is wanted.
  void (*backward)(const Na2dProblem&, const Columns&, const Item&, float* scratch, float* sums);
  Need (*forward_need)(const Na2dProblem&, int64_t columns);
  Need (*backward_need)(const Na2dProblem&, int64_t columns);
  const char* name;
};
extern const Kernels baseline, avx2, avx512, avx512_bf16, amx_bf16;

}  // namespace na2d
