// What depends on the system: which instructions there are, and memory in large pages.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(NA2D_X86) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(_MSC_VER)
#include <malloc.h>
#if defined(NA2D_X86)
#include <immintrin.h>
#include <intrin.h>
#endif
#endif

namespace na2d {
namespace {

#if defined(NA2D_X86) && defined(_MSC_VER)
// Whether the system saves these registers, and the processor has all these features (bits of EBX of leaf 7).
inline bool has(uint64_t registers, uint32_t features) {
  int info[4];
  __cpuid(info, 0);
  if (info[0] < 7) return false;
  __cpuid(info, 1);
  const uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28;  // FMA, OSXSAVE, AVX
  if ((uint32_t(info[2]) & needed) != needed || (_xgetbv(0) & registers) != registers) return false;
  __cpuidex(info, 7, 0);
  return (uint32_t(info[1]) & features) == features;
}
inline bool has_avx2() { return has(0x6, 1u << 5); }
inline bool has_avx512() { return has(0xe6, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31); }  // F, DQ, BW, VL
#elif defined(NA2D_X86)
inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
inline bool has_avx512_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}
inline bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
// Linux lets a process use tiles only after it has asked.
inline bool has_amx_bf16() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx = 0;
  const unsigned needed = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & needed) != needed) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and the state's number
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

constexpr size_t kHugePage = 2 << 20;

// Fresh memory is mapped page by page as it is first written; for large results that costs as much as computing them, unless
// the pages are large.
inline void advise_large_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// At least `bytes`, at the beginning of a large page; null when memory ran out.
inline void* allocate_pages(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
#if defined(_WIN32)
  return _aligned_malloc(bytes, kHugePage);
#else
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes)) return nullptr;
  advise_large_pages(data, bytes);
  return data;
#endif
}

inline void free_pages(void* data) {
#if defined(_WIN32)
  _aligned_free(data);
#else
  std::free(data);
#endif
}

}  // namespace
}  // namespace na2d
