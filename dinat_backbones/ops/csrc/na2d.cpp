// The C interface: cuts a problem into items, and runs them on the caller's threads with the best kernels of the machine.
#include "na2d.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace na2d {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr int64_t kAlign = 16;  // columns of an item start at multiples of the widest vector

// What the machine supports, best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#ifdef NA2D_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
  found.push_back(&baseline);
  return found;
}

std::atomic<const Kernels*> chosen{supported().front()};

const Kernels& kernels() { return *chosen; }

// Fresh memory is handed over page by page as it is first written; for large results that costs as much as computing them,
// unless the pages are large.
void advise_large_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void advise_large_pages(const Na2dProblem& p, const Na2dView& view) {
  const int64_t sizes[5] = {p.batch, p.height, p.width, p.heads, p.dim};
  int64_t last = 0;
  for (int i = 0; i < 5; ++i) last += (sizes[i] - 1) * view.stride[i];
  advise_large_pages(view.data, (last + 1) * (p.bf16 ? 2 : 4));
}

// Per-thread memory that outlives a call, so that a network's many calls don't pay for fresh pages each time. The kernels
// jump between hundreds of its rows: on small pages the address translations would not fit their cache.
struct Arena {
  float* data = nullptr;
  size_t floats = 0;
  ~Arena() { std::free(data); }
  float* reserve(size_t wanted) {
    if (wanted > floats) {
      std::free(data);
      const size_t bytes = (wanted * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
      data = static_cast<float*>(std::aligned_alloc(kHugePage, bytes));
      floats = data ? wanted : 0;
      if (data) advise_large_pages(data, bytes);
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
      const int64_t length = class_length(p.width, p.dilation, x % p.dilation);
      first[i] = int32_t(window_start(position, length, p.kernel) - position);
      last[i] = first[i] + p.kernel - 1;
      key_low[i] = int32_t(position - last_query(position, length, p.kernel));
      key_high[i] = int32_t(position - first_query(position, p.kernel));
    }
  }
  Columns columns() const { return {first.data(), last.data(), key_low.data(), key_high.data()}; }
};

// Columns per item: as many as keep the scratch near `bytes`, in equal strips.
int64_t strip_width(const Na2dProblem& p, int64_t (*floats)(const Na2dProblem&, int64_t), int64_t bytes) {
  int64_t strips = 1, width = p.width;
  while (width > 4 * kAlign && floats(p, width) * int64_t(sizeof(float)) > bytes) {
    ++strips;
    width = ((p.width + strips - 1) / strips + kAlign - 1) / kAlign * kAlign;
  }
  return width;
}

std::vector<Item> cut(const Na2dProblem& p, int64_t width, int64_t least_rows) {
  const int64_t strips = (p.width + width - 1) / width, classes = std::min<int64_t>(p.dilation, p.height);
  const int64_t units = p.batch * p.heads * classes * strips, longest = class_length(p.height, p.dilation, 0);
  // Several items per thread even out the ends; every cut repeats some packing.
  const int64_t wanted = (6 * p.threads + units - 1) / units;
  const int64_t chunks = p.threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, longest / least_rows));
  std::vector<Item> items;
  items.reserve(units * chunks);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t r = 0; r < classes; ++r) {
        const int64_t length = class_length(p.height, p.dilation, r);
        for (int64_t c = 0; c < chunks; ++c)
          for (int64_t x = 0; x < p.width; x += width)
            items.push_back({b, h, r, length * c / chunks, length * (c + 1) / chunks, x, std::min(p.width, x + width)});
      }
  return items;
}

struct Job {
  const Na2dProblem& problem;
  const Columns columns;
  const std::vector<Item>& items;
  const size_t floats;
  float* grad_rpb;  // one partial table per item, or null going forward
  std::atomic<size_t> next{0};
  std::atomic<bool> out_of_memory{false};

  void work() {
    thread_local Arena arena;
    float* scratch = arena.reserve(floats);
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    const int64_t table = (2 * problem.kernel - 1) * (2 * problem.kernel - 1);
    for (size_t i = next++; i < items.size(); i = next++)
      if (grad_rpb)
        kernels().backward(problem, columns, items[i], scratch, grad_rpb + i * table);
      else
        kernels().forward(problem, columns, items[i], scratch);
  }
};

int run(Job& job) {
  const auto body = [](void* context) { static_cast<Job*>(context)->work(); };
  const unsigned threads = unsigned(std::min<size_t>(job.problem.threads, job.items.size()));
  if (threads <= 1) {
    job.work();
  } else if (job.problem.parallel) {
    job.problem.parallel(body, &job, unsigned(job.problem.threads), 0);
  } else {
    std::vector<std::thread> helpers;
    for (unsigned i = 1; i < threads; ++i) helpers.emplace_back(body, &job);
    job.work();
    for (auto& helper : helpers) helper.join();
  }
  return job.out_of_memory;
}

constexpr int64_t kForwardBytes = 1 << 20, kBackwardBytes = 4 << 20;

}  // namespace
}  // namespace na2d

extern "C" int na2d_forward(const Na2dProblem* p) try {
  using namespace na2d;
  const Geometry geometry(*p);
  advise_large_pages(*p, p->out);
  const int64_t width = strip_width(*p, kernels().forward_floats, kForwardBytes);
  const auto items = cut(*p, width, 2 * p->kernel);
  Job job{*p, geometry.columns(), items, size_t(kernels().forward_floats(*p, width)), nullptr};
  return run(job);
} catch (const std::exception&) {
  return 1;
}

extern "C" int na2d_backward(const Na2dProblem* p) try {
  using namespace na2d;
  const Geometry geometry(*p);
  for (const Na2dView* view : {&p->grad_query, &p->grad_key, &p->grad_value}) advise_large_pages(*p, *view);
  const int64_t width = strip_width(*p, kernels().backward_floats, kBackwardBytes);
  const auto items = cut(*p, width, 4 * p->kernel);
  const int64_t table = (2 * p->kernel - 1) * (2 * p->kernel - 1);
  std::vector<float> partial(items.size() * table);
  Job job{*p, geometry.columns(), items, size_t(kernels().backward_floats(*p, width)), partial.data()};
  const int status = run(job);
  if (p->grad_rpb) {  // in the order of the items, whatever thread did them: deterministic
    std::fill_n(p->grad_rpb, p->heads * table, 0.f);
    for (size_t i = 0; i < items.size(); ++i)
      for (int64_t t = 0; t < table; ++t) p->grad_rpb[items[i].head * table + t] += partial[i * table + t];
  }
  return status;
} catch (const std::exception&) {
  return 1;
}

extern "C" const char* na2d_instruction_set() { return na2d::kernels().name; }

extern "C" int na2d_use_instruction_set(const char* name) {
  for (const na2d::Kernels* candidate : na2d::supported())
    if (!std::strcmp(candidate->name, name)) {
      na2d::chosen = candidate;
      return 0;
    }
  return 1;
}

