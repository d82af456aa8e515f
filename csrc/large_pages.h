// Memory in pages of 2 MiB: a fresh gigabyte costs 500 page faults instead of 260,000.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace clinkd {

constexpr uintptr_t kLargePage = 2 << 20;

// Ask for large pages where whole ones lie in [begin, begin + bytes); a request, never an error.
inline void large_pages(uintptr_t begin, uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace clinkd
