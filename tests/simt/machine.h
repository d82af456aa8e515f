// State of a launch on one CPU thread, and who goes on when a thread waits.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

enum Order { kForward, kReverse, kShuffled, kWarpsUp, kWarpsDown };

// Threads that wait for each other in a warp.
struct Meeting {
  unsigned mask = 0, arrived = 0, round = 0;
  const char* site = "";
  uint64_t brought[2][32];  // of this round and of the one before, which may still be read
};

// Threads that a barrier waits for: `count` from `first` on, a block's or a cluster's.
struct Gathering {
  unsigned first = 0, count = 0, waiting = 0, ended = 0, passed = 0;
};

struct Thread {
  Fiber fiber;
  const char* waits_at = nullptr;
  const Gathering* waits_in = nullptr;
  unsigned warp_syncs = 0;
};

// Shared memory of one declaration.
struct Region {
  const char* site;  // its place in the source
  char* begin;
  size_t size;
  bool holds(const void* place) const { return place >= begin && place < begin + size; }
};

struct Block {
  Index index;
  Gathering gathering;
  std::vector<Region> shared;
  Region dynamic = {};

  bool ended() const { return gathering.ended == gathering.count; }
  // Nothing is left for others of the cluster to read.
  void leave() {
    for (const Region& region : shared) std::memset(region.begin, 0xff, region.size);
    if (dynamic.begin) std::memset(dynamic.begin, 0xff, dynamic.size);
  }
};

// A set of numbers below a count.
class Bits {
 public:
  void fill(unsigned count) {
    words_.assign((count + 63) / 64, ~0ull);
    if (count % 64) words_.back() = (1ull << count % 64) - 1;
  }
  void add(unsigned i) { words_[i / 64] |= 1ull << i % 64; }
  void remove(unsigned i) { words_[i / 64] &= ~(1ull << i % 64); }
  // The first in it of `from` and those above, or -1.
  int up(unsigned from) const {
    uint64_t mask = ~0ull << from % 64;
    for (size_t i = from / 64; i < words_.size(); ++i, mask = ~0ull)
      if (const uint64_t word = words_[i] & mask)
        return static_cast<int>(i * 64) + __builtin_ctzll(word);
    return -1;
  }
  // The first in it of `from` and those below, or -1.
  int down(unsigned from) const {
    uint64_t mask = ~0ull >> (63 - from % 64);
    for (size_t i = from / 64 + 1; i-- > 0; mask = ~0ull)
      if (const uint64_t word = words_[i] & mask)
        return static_cast<int>(i * 64) + 63 - __builtin_clzll(word);
    return -1;
  }

 private:
  std::vector<uint64_t> words_;
};

// The blocks of one cluster, all of whose threads run together; without clusters each is one block.
struct Machine {
  Order order = kForward;
  uint64_t random = 0;
  std::string dropped, error;

  std::function<void()> body;
  Fiber main;
  std::vector<std::unique_ptr<Thread>> threads;  // block by block
  Bits ready;
  std::vector<std::vector<Meeting>> meetings;  // of each warp, block by block
  std::vector<Block> blocks;
  Gathering cluster;
  Fiber* previous = nullptr;
  unsigned count = 0, block_threads = 0, current = 0, cluster_number = 0;
  bool running = false, atomic = false;

  Block& block() { return blocks[current / block_threads]; }
  Thread& thread() { return *threads[current]; }
  unsigned local() const { return current % block_threads; }  // number of the thread in its block
  unsigned warp() const {
    return current / block_threads * ((block_threads + 31) / 32) + local() / 32;
  }

  uint64_t next_random() {  // xorshift64* (Vigna 2016, arXiv:1402.6246)
    uint64_t& x = random;
    x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
    return x * 2685821657736338717ull;
  }

  // A ready thread, or -1.
  int choose() {
    int found = -1;
    switch (order) {
      case kForward:
        found = current + 1 < count ? ready.up(current + 1) : -1;
        break;
      case kReverse:
        found = current > 0 ? ready.down(current - 1) : -1;
        return found < 0 ? ready.down(count - 1) : found;
      case kShuffled:
        found = ready.up(static_cast<unsigned>(next_random() % count));
        break;
      case kWarpsUp:
        break;
      case kWarpsDown:
        return ready.down(count - 1);
    }
    return found < 0 ? ready.up(0) : found;
  }

  bool is_dropped(const std::string& site) const {
    return !dropped.empty() && site.size() >= dropped.size() &&
           site.compare(site.size() - dropped.size(), dropped.size(), dropped) == 0;
  }
};

}  // namespace simt
