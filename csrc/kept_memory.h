// Memory that is kept when it is given back: pages that the system clears cost more than a kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "large_pages.h"

#if defined(__linux__) && defined(MADV_FREE)
#define CLINKD_KEEPS_MEMORY
#endif

namespace clinkd {
#ifdef CLINKD_KEEPS_MEMORY

struct Block {
  char* begin;
  size_t bytes;
};

constexpr size_t kMostIdle = 8;  // blocks that nobody uses, the last ones given back

// Callers hold Python's lock, which also guards the list; it is never destroyed, for tensors may
// outlive it at the end of a process.
inline std::vector<Block>& idle_blocks() {
  static auto* blocks = [] {
    auto* made = new std::vector<Block>;
    made->reserve(kMostIdle + 1);  // so that giving back needs no memory
    return made;
  }();
  return *blocks;
}

inline void release_memory() {
  for (const Block& block : idle_blocks()) munmap(block.begin, block.bytes);
  idle_blocks().clear();
}

// Sizes that differ little share a block: up to an eighth more than asked for, in large pages.
inline size_t rounded_up(size_t bytes) {
  size_t step = kLargePage;
  while (step <= bytes / 16) step *= 2;
  return (bytes + step - 1) / step * step;
}

// A block of at least so many bytes, and fewer than twice as many if it was used before.
inline Block take_block(size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  auto& idle = idle_blocks();
  const size_t wanted = rounded_up(bytes);
  auto best = idle.end();
  for (auto block = idle.begin(); block != idle.end(); ++block)
    if (block->bytes >= wanted && block->bytes < 2 * wanted &&
        (best == idle.end() || block->bytes <= best->bytes))
      best = block;  // of equal ones the last given back, whose lines may still be in a cache
  if (best != idle.end()) {
    const Block found = *best;
    idle.erase(best);
    return found;
  }
  const auto map = [&] {  // one large page more, to begin at one
    return mmap(nullptr, wanted + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                -1, 0);
  };
  void* place = map();
  if (place == MAP_FAILED) {
    release_memory();
    place = map();
  }
  if (place == MAP_FAILED) throw std::bad_alloc();
  char* const mapped = static_cast<char*>(place);
  const size_t before = -reinterpret_cast<uintptr_t>(mapped) % kLargePage;
  if (before > 0) munmap(mapped, before);
  munmap(mapped + before + wanted, kLargePage - before);
  // whatever a host does with free large pages: these are not free while they are kept
  large_pages(reinterpret_cast<uintptr_t>(mapped + before), wanted);
  return {mapped + before, wanted};
}

// Until the system needs the pages elsewhere they stay as they are.
inline void give_block(const Block& block) {
  if (madvise(block.begin, block.bytes, MADV_FREE) != 0) {
    munmap(block.begin, block.bytes);
    return;
  }
  auto& idle = idle_blocks();
  idle.push_back(block);
  if (idle.size() > kMostIdle) {
    munmap(idle.front().begin, idle.front().bytes);
    idle.erase(idle.begin());
  }
}

// What a tensor's storage holds on to: bytes of a block, which goes back when this does.
class KeptMemory {
 public:
  explicit KeptMemory(size_t bytes) : block_(take_block(bytes)), bytes_(bytes) {}
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;
  ~KeptMemory() { give_block(block_); }
  char* begin() const { return block_.begin; }
  size_t bytes() const { return bytes_; }

 private:
  Block block_;
  size_t bytes_;
};

#endif
}  // namespace clinkd
