// Runs a grid on one CPU thread: a fiber for each CUDA thread, one block at a time.
//
// A thread runs until it waits for others (a barrier, a shuffle) or ends; then the schedule says who
// goes on. What is wrong in a kernel with too few barriers shows only under some of the schedules.

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

simt::Index threadIdx, blockIdx;
simt::Dimensions blockDim, gridDim;

namespace simt {
namespace {

enum Order { kForward, kReverse, kShuffled, kWarpsUp, kWarpsDown };

// Threads that wait for each other in a warp.
struct Meeting {
  unsigned mask = 0, arrived = 0, round = 0;
  const char* site = "";
  uint64_t brought[2][32];  // of this round and of the one before, which may still be read
};

struct Thread {
  Fiber fiber;
  const char* waits_at = nullptr;
  bool at_barrier = false;
  unsigned warp_syncs = 0;
};

struct Machine {
  Order order = kForward;
  uint64_t random = 0;
  std::string dropped, error;

  std::function<void()> body;
  Fiber main;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<bool> ready;
  std::vector<std::vector<Meeting>> meetings;  // of each warp
  std::vector<std::pair<const char*, void*>> shared;  // by place in the source
  void* dynamic = nullptr;
  Fiber* previous = nullptr;
  unsigned count = 0, current = 0, waiting = 0, ended = 0, barriers = 0;
  bool running = false, atomic = false;
};
Machine machine;

uint64_t next_random() {  // xorshift64* (Vigna 2016, arXiv:1402.6246)
  uint64_t& x = machine.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return x * 2685821657736338717ull;
}

// A ready thread, or -1.
int choose() {
  const int count = static_cast<int>(machine.count), current = static_cast<int>(machine.current);
  const auto& ready = machine.ready;
  switch (machine.order) {
    case kForward:
      for (int i = 1; i <= count; ++i)
        if (ready[(current + i) % count]) return (current + i) % count;
      return -1;
    case kReverse:
      for (int i = 1; i <= count; ++i)
        if (ready[(current - i + count) % count]) return (current - i + count) % count;
      return -1;
    case kShuffled: {
      const int start = static_cast<int>(next_random() % count);
      for (int i = 0; i < count; ++i)
        if (ready[(start + i) % count]) return (start + i) % count;
      return -1;
    }
    case kWarpsUp:
      for (int i = 0; i < count; ++i)
        if (ready[i]) return i;
      return -1;
    default:
      for (int i = count - 1; i >= 0; --i)
        if (ready[i]) return i;
      return -1;
  }
}

bool is_dropped(const std::string& site) {
  const std::string& end = machine.dropped;
  return !end.empty() && site.size() >= end.size() &&
         site.compare(site.size() - end.size(), end.size(), end) == 0;
}

Fiber& fiber_of_current() { return machine.threads[machine.current]->fiber; }

void place_thread(unsigned index) {
  machine.current = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y,
               index / blockDim.x / blockDim.y};
}

void switch_from(Fiber& from, Fiber& to) {
  machine.previous = &from;
  from.switch_to(to);
}

// Let others run; comes back when this thread is chosen again.
void give_way() {
  const unsigned self = machine.current;
  const int next = choose();
  if (next < 0) {
    std::string stuck;
    for (unsigned i = 0; i < machine.count && stuck.size() < 300; ++i)
      if (machine.threads[i]->waits_at)
        stuck += " " + std::to_string(i) + " at " + machine.threads[i]->waits_at + ";";
    fail("no thread can go on:%s", stuck.c_str());
  }
  if (static_cast<unsigned>(next) != self) {
    Fiber& from = fiber_of_current();
    place_thread(next);
    switch_from(from, fiber_of_current());
  }
}

// Release the barrier when every thread is there.
void check_barrier() {
  if (machine.waiting == 0 || machine.waiting + machine.ended < machine.count) return;
  const char* site = nullptr;
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& thread = *machine.threads[i];
    if (!thread.at_barrier) continue;
    if (site && std::strcmp(site, thread.waits_at) != 0)
      fail("threads wait at different barriers: %s and %s", site, thread.waits_at);
    site = thread.waits_at;
  }
  if (machine.ended) fail("%u threads ended without the barrier at %s", machine.ended, site);
  for (unsigned i = 0; i < machine.count; ++i) {
    machine.threads[i]->at_barrier = false;
    machine.threads[i]->waits_at = nullptr;
    machine.ready[i] = true;
  }
  machine.waiting = 0;
  ++machine.barriers;
}

void run_thread() {
  Fiber::arrived(*machine.previous);
  machine.body();
  machine.ready[machine.current] = false;
  ++machine.ended;
  if (machine.ended == machine.count) {
    switch_from(fiber_of_current(), machine.main);
  } else {
    check_barrier();
    give_way();
  }
  abort();  // an ended thread is never chosen
}

void* fresh_memory(size_t bytes) {
  void* place = std::memset(std::malloc(bytes), 0xff, bytes);
  forget_accesses(place, bytes);
  return place;
}

void forget_block() {
  for (auto& entry : machine.shared) std::free(entry.second);
  machine.shared.clear();
  std::free(machine.dynamic);
  machine.dynamic = nullptr;
}

bool run_block(size_t dynamic_bytes) {
  const unsigned count = machine.count;
  while (machine.threads.size() < count) machine.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < count; ++i) {
    machine.threads[i]->fiber.start(run_thread);
    machine.threads[i]->waits_at = nullptr;
    machine.threads[i]->at_barrier = false;
    machine.threads[i]->warp_syncs = 0;
  }
  machine.ready.assign(count, true);
  machine.meetings.assign((count + 31) / 32, {});
  machine.waiting = machine.ended = machine.barriers = 0;
  if (dynamic_bytes) machine.dynamic = fresh_memory(dynamic_bytes);
  machine.current = machine.order == kReverse ? 0 : count - 1;  // the one before the first
  place_thread(choose());
  machine.running = true;
  switch_from(machine.main, fiber_of_current());
  machine.running = machine.atomic = false;
  forget_block();
  return machine.error.empty();
}

}  // namespace

void fail(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  machine.error = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                  "), thread " + std::to_string(machine.current) + ": " + text;
  switch_from(fiber_of_current(), machine.main);
  abort();
}

unsigned lane() { return machine.current % 32; }

void barrier(const char* site) {
  if (is_dropped(site)) return;
  Thread& self = *machine.threads[machine.current];
  self.waits_at = site;
  self.at_barrier = true;
  machine.ready[machine.current] = false;
  ++machine.waiting;
  check_barrier();
  give_way();
}

const uint64_t* meet(const char* site, unsigned mask, uint64_t brought) {
  const unsigned self = machine.current, first = self / 32 * 32, bit = 1u << self % 32;
  if (!(mask & bit)) fail("this thread is not in its own mask %#x at %s", mask, site);
  auto& warp = machine.meetings[self / 32];
  auto found = std::find_if(warp.begin(), warp.end(), [&](auto& m) { return m.mask == mask; });
  if (found == warp.end()) {
    warp.push_back({});
    found = warp.end() - 1;
    found->mask = mask;
  }
  const size_t number = found - warp.begin();
  if (found->arrived == 0) {
    found->site = site;
    std::memset(found->brought[found->round % 2], 0xff, sizeof(found->brought[0]));
  } else if (std::strcmp(found->site, site) != 0) {
    fail("threads of a warp meet at different places: %s and %s", found->site, site);
  }
  const unsigned round = found->round % 2;
  found->brought[round][self % 32] = brought;
  found->arrived |= bit;
  machine.ready[self] = false;
  machine.threads[self]->waits_at = site;
  if (found->arrived == mask) {
    found->arrived = 0;
    ++found->round;
    for (unsigned i = 0; i < 32 && first + i < machine.count; ++i)
      if (mask >> i & 1) {
        machine.ready[first + i] = true;
        machine.threads[first + i]->waits_at = nullptr;
      }
  }
  give_way();
  return machine.meetings[self / 32][number].brought[round];
}

unsigned ballot(const char* site, unsigned mask, bool vote) {
  const uint64_t* votes = meet(site, mask, vote);
  unsigned all = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1 && votes[i]) all |= 1u << i;
  return all;
}

void sync_warp(const char* site, unsigned mask) {
  meet(site, mask, 0);
  ++machine.threads[machine.current]->warp_syncs;
}

Atomic::Atomic() { machine.atomic = true; }
Atomic::~Atomic() { machine.atomic = false; }

bool where(const void* address, Place& place) {
  if (!machine.running || fiber_of_current().holds(address)) return false;
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  place = {machine.current, block, machine.barriers, machine.threads[machine.current]->warp_syncs,
           machine.atomic};
  return true;
}

void* shared_place(const char* site, size_t bytes) {
  for (auto& [known, place] : machine.shared)
    if (std::strcmp(known, site) == 0) return place;
  machine.shared.emplace_back(site, fresh_memory(bytes));
  return machine.shared.back().second;
}

void* dynamic_place() { return machine.dynamic; }

bool run_grid(Dimensions grid, Dimensions block, size_t dynamic_bytes, std::function<void()> body) {
  forget_accesses();
  gridDim = grid;
  blockDim = block;
  machine.count = block.x * block.y * block.z;
  machine.body = std::move(body);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  if (machine.order == kReverse || machine.order == kWarpsDown)
    std::reverse(blocks.begin(), blocks.end());
  if (machine.order == kShuffled)
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[next_random() % i]);
  for (uint64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    if (!run_block(dynamic_bytes)) return false;
  }
  return true;
}

}  // namespace simt

// How the next launches run. `dropped`: the end of "file:line" of a barrier to leave out, or "".
extern "C" void simt_configure(int order, uint64_t seed, const char* dropped) {
  simt::machine.order = static_cast<simt::Order>(order);
  simt::machine.random = seed * 2 + 1;
  simt::machine.dropped = dropped;
  simt::machine.error.clear();
}
extern "C" const char* simt_error() { return simt::machine.error.c_str(); }
