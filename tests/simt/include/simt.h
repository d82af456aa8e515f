// What stands for CUDA's execution model when a .cu file is compiled as plain C++: every CUDA thread
// is a fiber on one CPU thread, blocks or clusters of them run one after another. See runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace simt {

struct Index {
  unsigned x, y, z;
};
struct Dimensions {
  unsigned x, y, z;
  constexpr Dimensions(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// `body` once for each thread of the grid. False, with `simt_error` saying why, where CUDA's rules
// are broken: a barrier that not all threads reach, a shuffle with a thread that is gone, …
// `cluster`: how many blocks, neighbours in x, run together.
bool run_grid(Dimensions grid, Dimensions block, size_t dynamic_bytes, unsigned cluster,
              std::function<void()> body);

// End the launch with a message; does not return to the kernel.
[[noreturn]] void fail(const char* format, ...);

void barrier(const char* site);
void cluster_barrier(const char* file, int line);
unsigned cluster_size();
unsigned cluster_rank();
// Where block `rank` of the cluster has what this one has at `own`, a place in shared memory. Legal
// once all of them run, which a cluster's barrier says, and until that block has ended.
void* peer_place(const void* own, unsigned rank);

// All threads of `mask` in this warp meet. Gives what the 32 lanes brought; lanes outside the mask
// brought nothing, all bits set.
const uint64_t* meet(const char* site, unsigned mask, uint64_t brought);
unsigned lane();

// Memory that the threads of a block share, one place for each declaration: fresh in each block, all
// bits set (a NaN), with the sanitizer's guards at both ends.
void* shared_place(const char* site, size_t bytes);
void* dynamic_place();
size_t& dynamic_limit(const void* kernel);  // bytes of it that a launch may have
template <typename T>
T& shared(const char* site) {
  return *static_cast<T*>(shared_place(site, sizeof(T)));
}

// `source`'s value among those of the lanes, or the own one where there is no such lane.
template <typename T>
T shuffle(const char* site, unsigned mask, T value, int source, bool exists) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = meet(site, mask, bits);
  std::memcpy(&value, exists ? &all[source] : &bits, sizeof(T));
  return value;
}
template <typename T>
T shuffle_index(const char* site, unsigned mask, T value, int source, int width = 32) {
  const int first = static_cast<int>(lane()) / width * width;
  return shuffle(site, mask, value, first + (source & (width - 1)), true);
}
template <typename T>
T shuffle_down(const char* site, unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned end = (lane() / width + 1) * width, source = lane() + distance;
  return shuffle(site, mask, value, source, source < end);
}
template <typename T>
T shuffle_up(const char* site, unsigned mask, T value, unsigned distance, int width = 32) {
  const int first = static_cast<int>(lane()) / width * width;
  const int source = static_cast<int>(lane()) - static_cast<int>(distance);
  return shuffle(site, mask, value, source, source >= first);
}
template <typename T>
T shuffle_xor(const char* site, unsigned mask, T value, int flip, int width = 32) {
  const int source = static_cast<int>(lane()) ^ flip;
  return shuffle(site, mask, value, source, source / width <= static_cast<int>(lane()) / width);
}

unsigned ballot(const char* site, unsigned mask, bool vote);
void sync_warp(const char* site, unsigned mask = ~0u);

// While one lives, the thread's accesses to memory are atomic.
struct Atomic {
  Atomic();
  ~Atomic();
};

// Who accesses memory now, and how often it has waited for others; for races.cpp.
struct Place {
  unsigned thread, block, cluster, barriers, cluster_barriers, warp_syncs;
  bool atomic;
};
// False outside of a kernel, and for what lies on the thread's own stack.
bool where(const void* address, Place& place);
void forget_accesses();
void forget_accesses(const void* address, size_t size);

}  // namespace simt

extern simt::Index threadIdx, blockIdx;
extern simt::Dimensions blockDim, gridDim;
