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

// The blocks of one cluster, all of whose threads run together; without clusters each is one block.
struct Machine {
  Order order = kForward;
  uint64_t random = 0;
  std::string dropped, error;

  std::function<void()> body;
  Fiber main;
  std::vector<std::unique_ptr<Thread>> threads;  // block by block
  std::vector<bool> ready;
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
    const int many = static_cast<int>(count), from = static_cast<int>(current);
    switch (order) {
      case kForward:
        for (int i = 1; i <= many; ++i)
          if (ready[(from + i) % many]) return (from + i) % many;
        return -1;
      case kReverse:
        for (int i = 1; i <= many; ++i)
          if (ready[(from - i + many) % many]) return (from - i + many) % many;
        return -1;
      case kShuffled: {
        const int start = static_cast<int>(next_random() % many);
        for (int i = 0; i < many; ++i)
          if (ready[(start + i) % many]) return (start + i) % many;
        return -1;
      }
      case kWarpsUp:
        for (int i = 0; i < many; ++i)
          if (ready[i]) return i;
        return -1;
      default:
        for (int i = many - 1; i >= 0; --i)
          if (ready[i]) return i;
        return -1;
    }
  }

  bool is_dropped(const std::string& site) const {
    return !dropped.empty() && site.size() >= dropped.size() &&
           site.compare(site.size() - dropped.size(), dropped.size(), dropped) == 0;
  }
};

}  // namespace simt
