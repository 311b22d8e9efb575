// Random calls of the kernel for builds with sanitizers: every array has exactly the elements that its view names, so that
// one element too far is seen. Prints the number of calls; ends with status 1 where a result depends on the threads or is
// not finite.
//
//     driver FIRST_SEED COUNT
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "na2d.h"

namespace {

using Random = std::mt19937_64;

int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// An array of float32 or bfloat16 behind a view with strides of its own.
struct Array {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  Na2dView view;

  Array(Random& random, const Na2dProblem& p, bool strided) {
    const int64_t sizes[5] = {p.batch, p.map_height, p.map_width, p.heads, p.dim};
    int order[5] = {0, 1, 2, 3, 4};
    if (strided) std::shuffle(order, order + 5, random);
    int64_t step = strided && between(random, 0, 2) == 0 ? 2 : 1;
    for (int i = 4; i >= 0; --i) {
      view.stride[order[i]] = step;
      step *= sizes[order[i]];
    }
    int64_t last = 0;
    for (int i = 0; i < 5; ++i) last += (sizes[i] - 1) * view.stride[i];
    std::normal_distribution<float> normal;
    floats.resize(p.bf16 ? 0 : last + 1);
    halves.resize(p.bf16 ? last + 1 : 0);
    for (float& value : floats) value = normal(random);
    for (uint16_t& value : halves) {
      const float number = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      value = uint16_t(bits >> 16);
    }
    view.data = p.bf16 ? static_cast<void*>(halves.data()) : floats.data();
  }

  bool finite() const {
    return std::all_of(floats.begin(), floats.end(), [](float value) { return std::isfinite(value); }) &&
           std::all_of(halves.begin(), halves.end(), [](uint16_t value) { return (value & 0x7f80) != 0x7f80; });
  }
  bool operator==(const Array& other) const { return floats == other.floats && halves == other.halves; }
};

int64_t calls = 0;

bool one(uint64_t seed) {
  Random random(seed);
  Na2dProblem p{};
  p.kernel = int32_t(2 * between(random, 1, 6) + 1);
  p.dilation = int32_t(between(random, 0, 2) ? between(random, 1, 3) : between(random, 1, 8));
  p.bf16 = int32_t(between(random, 0, 1));
  const int64_t reach = p.kernel * p.dilation;
  const bool padded = between(random, 0, 2) == 0;
  const auto size = [&] {
    if (padded && between(random, 0, 2)) return between(random, 1, reach);
    return reach + (between(random, 0, 1) ? between(random, 0, 2) : between(random, 0, 40));
  };
  p.map_height = size(), p.map_width = size();
  if (between(random, 0, 30) == 0) p.map_width += 200;  // several strips
  p.height = std::max(p.map_height, reach), p.width = std::max(p.map_width, reach);
  p.heads = between(random, 1, 3), p.dim = between(random, 1, 36), p.batch = between(random, 1, 2);
  while (p.batch * p.heads * p.height * p.width * p.kernel * p.kernel * p.dim > 20'000'000 && p.dim > 1) p.dim /= 2;
  p.scale = 1.f / std::sqrt(float(p.dim));

  const bool strided = between(random, 0, 1), bias = between(random, 0, 3);
  std::vector<float> rpb(bias ? p.heads * (2 * p.kernel - 1) * (2 * p.kernel - 1) : 0), grad_rpb(rpb.size());
  std::normal_distribution<float> normal(0.f, between(random, 0, 5) ? 1.f : 100.f);
  for (float& value : rpb) value = normal(random);
  Array query(random, p, strided), key(random, p, strided), value(random, p, strided), out(random, p, strided);
  Array grad_out(random, p, strided), grad_query(random, p, strided), grad_key(random, p, strided);
  Array grad_value(random, p, strided);
  p.rpb = bias ? rpb.data() : nullptr, p.grad_rpb = bias ? grad_rpb.data() : nullptr;
  p.query = query.view, p.key = key.view, p.value = value.view, p.out = out.view, p.grad_out = grad_out.view;
  p.grad_query = grad_query.view, p.grad_key = grad_key.view, p.grad_value = grad_value.view;
  Na2dProblem pixel = p;
  pixel.batch = pixel.map_height = pixel.map_width = 1;
  const Array key_padding(random, pixel, strided), value_padding(random, pixel, strided);
  std::vector<float> grad_padding(padded ? 2 * p.heads * p.dim : 0);
  if (padded) {
    p.key_padding = key_padding.view, p.value_padding = value_padding.view, p.grad_padding = grad_padding.data();
    for (Na2dView* view : {&p.key_padding, &p.value_padding}) std::fill_n(view->stride, 3, 0);
  }

  const int32_t threads = int32_t(between(random, 2, 4));
  std::vector<Array> before;
  std::vector<float> table_before, padding_before;
  for (int i = 0; i < 2; ++i) {  // items depend on the number of threads, results of one number do not on who does what
    p.threads = threads;
    if (na2d_forward(&p) || na2d_backward(&p)) return std::printf("seed %llu: no memory\n", (unsigned long long)seed), false;
    calls += 2;
    if (i && !(before == std::vector<Array>{out, grad_query, grad_key, grad_value} && table_before == grad_rpb &&
               padding_before == grad_padding))
      return std::printf("seed %llu: another result the second time\n", (unsigned long long)seed), false;
    before = {out, grad_query, grad_key, grad_value};
    table_before = grad_rpb, padding_before = grad_padding;
  }
  p.threads = 1;
  if (na2d_forward(&p) || na2d_backward(&p)) return false;
  calls += 2;
  for (const Array* array : {&out, &grad_query, &grad_key, &grad_value})
    if (!array->finite()) return std::printf("seed %llu: not finite\n", (unsigned long long)seed), false;
  return true;
}

}  // namespace

int main(int, char** words) {
  const uint64_t first = std::strtoull(words[1], nullptr, 10), count = std::strtoull(words[2], nullptr, 10);
  bool good = true;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
    if (na2d_use_instruction_set(names[seed % 5])) na2d_use_instruction_set("baseline");
    good &= one(seed);
  }
  std::printf("%lld calls\n", (long long)calls);
  return good ? 0 : 1;
}
