// The C interface: splits a problem into items, and runs them on the caller's threads with the best kernels of the machine.
#include "na2d.h"

#include "machine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace na2d {
namespace {

constexpr int64_t kAlign = 16;  // columns of an item start at multiples of the widest vector
constexpr int64_t kTableBytes = 4 << 20;  // tables of gradients per call, see Tables

// What the machine supports, best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#ifdef NA2D_X86
#ifdef NA2D_AMX_BF16
  if (has_avx512() && has_avx512_bf16() && has_amx_bf16()) found.push_back(&amx_bf16);
#endif
#ifdef NA2D_AVX512_BF16
  if (has_avx512() && has_avx512_bf16()) found.push_back(&avx512_bf16);
#endif
  if (has_avx512()) found.push_back(&avx512);
  if (has_avx2()) found.push_back(&avx2);
#endif
  found.push_back(&baseline);
  return found;
}

std::atomic<const Kernels*> chosen{supported().front()};

const Kernels& kernels() { return *chosen; }

void advise_large_pages(const Na2dProblem& p, const Na2dView& view) {
  const int64_t sizes[5] = {p.batch, p.map_height, p.map_width, p.heads, p.dim};
  int64_t last = 0;
  for (int i = 0; i < 5; ++i) last += (sizes[i] - 1) * view.stride[i];
  advise_large_pages(view.data, (last + 1) * (p.bf16 ? 2 : 4));
}

// Per-thread memory that outlives a call, so that a network's many calls don't pay for fresh pages each time. The kernels
// jump between hundreds of its rows: with small pages the address translations would not fit the TLB.
struct Arena {
  float* data = nullptr;
  size_t floats = 0;
  ~Arena() { free_pages(data); }
  float* reserve(size_t wanted) {
    if (wanted > floats) {
      free_pages(data);
      data = static_cast<float*>(allocate_pages(wanted * sizeof(float)));
      floats = data ? wanted : 0;
    }
    return data;
  }
};

struct Geometry {
  std::vector<int32_t> first, last, key_low, key_high;
  explicit Geometry(const Na2dProblem& p) {
    const int64_t padded = p.width + 2 * kAlign;
    first.resize(padded), last.resize(padded), key_low.resize(padded), key_high.resize(padded);
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t x = std::min(i, p.width - 1), position = x / p.dilation;
      const int64_t length = group_length(p.width, p.dilation, x % p.dilation);
      first[i] = int32_t(window_start(position, length, p.kernel) - position);
      last[i] = first[i] + p.kernel - 1;
      const int64_t queries = group_length(p.map_width, p.dilation, x % p.dilation);
      key_low[i] = int32_t(position - std::min(last_query(position, length, p.kernel), queries - 1));
      key_high[i] = int32_t(position - first_query(position, p.kernel));
    }
  }
  Columns columns() const { return {first.data(), last.data(), key_low.data(), key_high.data()}; }
};

// Columns per item: as many as are not too much, but at least 64, in equal strips.
int64_t strip_width(const Na2dProblem& p, Need (*need)(const Na2dProblem&, int64_t)) {
  int64_t strips = 1, width = p.map_width;
  while (width > 4 * kAlign && need(p, width).too_much) {
    ++strips;
    width = ((p.map_width + strips - 1) / strips + kAlign - 1) / kAlign * kAlign;
  }
  return width;
}

// The work of one call: for every head of every image the same number of items, one after the other.
struct Items {
  std::vector<Item> all;
  int64_t per_head;
};

Items split(const Na2dProblem& p, int64_t width, int64_t least_rows) {
  const int64_t strips = (p.map_width + width - 1) / width, groups = std::min<int64_t>(p.dilation, p.map_height);
  const int64_t units = p.batch * p.heads * groups * strips, longest = group_length(p.map_height, p.dilation, 0);
  // Several items per thread even out the ends; every split repeats some packing.
  const int64_t wanted = (6 * p.threads + units - 1) / units;
  const int64_t chunks = p.threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, longest / least_rows));
  Items items{{}, groups * chunks * strips};
  items.all.reserve(units * chunks);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t r = 0; r < groups; ++r) {
        const int64_t length = group_length(p.map_height, p.dilation, r);
        for (int64_t c = 0; c < chunks; ++c)
          for (int64_t x = 0; x < p.map_width; x += width)
            items.all.push_back(
                {b, h, r, length * c / chunks, length * (c + 1) / chunks, x, std::min(p.map_width, x + width)});
      }
  return items;
}

// Partial tables of the gradients of the bias and of the padding. Each is the sum over some neighboring items of one head of one image, added in order by
// one thread, and the tables are added in order as well, so that the result does not depend on how threads share the work.
// There is one table per item, or fewer where those would take more than kTableBytes, but at least one per head of each image.
struct Tables {
  const int64_t bias, padding, size;  // numbers of each gradient, and of both
  int64_t items_of_each, per_head;
  std::vector<float> data;

  Tables(const Na2dProblem& p, const Items& items)
      : bias((2 * p.kernel - 1) * (2 * p.kernel - 1)), padding(p.grad_padding ? 2 * p.dim : 0), size(bias + padding) {
    const int64_t most = kTableBytes / (size * int64_t(sizeof(float))), heads = p.batch * p.heads;
    const int64_t most_per_head = std::min(items.per_head, std::max<int64_t>(1, most / heads));
    items_of_each = (items.per_head + most_per_head - 1) / most_per_head;
    per_head = (items.per_head + items_of_each - 1) / items_of_each;
    data.resize(heads * per_head * size);
  }
};

struct Job {
  const Na2dProblem& problem;
  const Columns columns;
  const Items& items;
  const size_t floats;
  Tables* const tables;  // null going forward
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  // Units of work, which a thread takes one at a time: the items of one table, or one item.
  int64_t units() const {
    const int64_t heads = problem.batch * problem.heads;
    return heads * (tables ? tables->per_head : items.per_head);
  }

  void work() {
    thread_local Arena arena;
    float* scratch = arena.reserve(floats);
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    const int64_t count = units(), step = together();
    for (int64_t begin = next.fetch_add(step); begin < count; begin = next.fetch_add(step))
      for (int64_t i = begin; i < std::min(begin + step, count); ++i)
        if (tables)
          backward(by_place(i, tables->per_head), scratch);
        else
          kernels().forward(problem, columns, items.all[by_place(i, items.per_head)], scratch);
  }

  // How many of them a thread takes at a time: two neighboring heads, whose pixels often share a pair of cache lines.
  int64_t together() const { return problem.heads % 2 == 0 && units() >= 16 * problem.threads ? 2 : 1; }

  // Units of an image lie head by head; they are taken place by place, all heads of one after the other: these lie next to each
  // other in memory, and come from there together.
  int64_t by_place(int64_t unit, int64_t per_head) const {
    const int64_t of_image = problem.heads * per_head, first = unit / of_image * of_image, place = (unit - first) / problem.heads;
    return first + (unit - first) % problem.heads * per_head + place;
  }

  void backward(int64_t unit, float* scratch) {
    const int64_t head = unit / tables->per_head, first = unit % tables->per_head * tables->items_of_each;
    const int64_t last = std::min(first + tables->items_of_each, items.per_head);
    for (int64_t item = first; item < last; ++item)
      kernels().backward(problem, columns, items.all[head * items.per_head + item], scratch,
                         tables->data.data() + unit * tables->size);
  }
};

int run(Job& job) {
  const auto body = [](void* context) { static_cast<Job*>(context)->work(); };
  const int64_t threads = std::min<int64_t>(job.problem.threads, job.units());
  if (threads <= 1) {
    job.work();
  } else if (job.problem.parallel) {
    job.problem.parallel(body, &job, unsigned(job.problem.threads), 0);
  } else {
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    try {
      while (int64_t(helpers.size()) < threads - 1) helpers.emplace_back(body, &job);
    } catch (const std::system_error&) {
      // The system has no more threads: the existing ones do all the work.
    }
    job.work();
    for (auto& helper : helpers) helper.join();
  }
  return job.out_of_memory;
}

}  // namespace
}  // namespace na2d

extern "C" int na2d_forward(const Na2dProblem* p) try {
  using namespace na2d;
  const Geometry geometry(*p);
  advise_large_pages(*p, p->out);
  const int64_t width = strip_width(*p, kernels().forward_need);
  const Items items = split(*p, width, 2 * p->kernel);
  Job job{*p, geometry.columns(), items, size_t(kernels().forward_need(*p, width).floats), nullptr};
  return run(job);
} catch (const std::exception&) {
  return 1;
}

extern "C" int na2d_backward(const Na2dProblem* p) try {
  using namespace na2d;
  const Geometry geometry(*p);
  for (const Na2dView* view : {&p->grad_query, &p->grad_key, &p->grad_value}) advise_large_pages(*p, *view);
  const int64_t width = strip_width(*p, kernels().backward_need);
  const Items items = split(*p, width, 4 * p->kernel);
  Tables tables(*p, items);
  Job job{*p, geometry.columns(), items, size_t(kernels().backward_need(*p, width).floats), &tables};
  const int status = run(job);
  if (p->grad_rpb) std::fill_n(p->grad_rpb, p->heads * tables.bias, 0.f);
  if (p->grad_padding) std::fill_n(p->grad_padding, p->heads * tables.padding, 0.f);
  for (int64_t i = 0; i < job.units(); ++i) {
    const int64_t head = i / tables.per_head % p->heads;
    const float* const sums = tables.data.data() + i * tables.size;
    for (int64_t t = 0; p->grad_rpb && t < tables.bias; ++t) p->grad_rpb[head * tables.bias + t] += sums[t];
    for (int64_t t = 0; t < tables.padding; ++t)
      p->grad_padding[(t / p->dim * p->heads + head) * p->dim + t % p->dim] += sums[tables.bias + t];
  }
  return status;
} catch (const std::exception&) {
  return 1;
}

extern "C" int na2d_interface() { return NA2D_INTERFACE; }

extern "C" int64_t na2d_problem_size() { return sizeof(Na2dProblem); }

extern "C" const char* na2d_instruction_set() { return na2d::kernels().name; }

extern "C" int na2d_use_instruction_set(const char* name) {
  for (const na2d::Kernels* candidate : na2d::supported())
    if (!std::strcmp(candidate->name, name)) {
      na2d::chosen = candidate;
      return 0;
    }
  return 1;
}

