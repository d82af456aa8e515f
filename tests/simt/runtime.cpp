// Runs a grid on one CPU thread: a fiber for each CUDA thread, one block or cluster at a time.
//
// A thread runs until it waits for others (a barrier, a shuffle) or ends; then the schedule says who
// goes on. What is wrong in a kernel with too few barriers shows only under some of the schedules.

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <set>

#include "machine.h"

simt::Index threadIdx, blockIdx;
simt::Dimensions blockDim, gridDim;

namespace simt {
namespace {

Machine machine;

void place_thread(unsigned index) {
  machine.current = index;
  const unsigned local = machine.local();
  threadIdx = {local % blockDim.x, local / blockDim.x % blockDim.y,
               local / blockDim.x / blockDim.y};
  blockIdx = machine.block().index;
}

void switch_from(Fiber& from, Fiber& to) {
  machine.previous = &from;
  from.switch_to(to);
}

// Let others run; comes back when this thread is chosen again.
void give_way() {
  const unsigned self = machine.current;
  const int next = machine.choose();
  if (next < 0) {
    std::string stuck;
    for (unsigned i = 0; i < machine.count && stuck.size() < 300; ++i)
      if (machine.threads[i]->waits_at)
        stuck += " " + std::to_string(i) + " at " + machine.threads[i]->waits_at + ";";
    fail("no thread can go on:%s", stuck.c_str());
  }
  if (static_cast<unsigned>(next) != self) {
    Fiber& from = machine.thread().fiber;
    place_thread(next);
    switch_from(from, machine.thread().fiber);
  }
}

// Release the barrier when every thread is there.
void check_barrier(Gathering& all) {
  if (all.waiting == 0 || all.waiting + all.ended < all.count) return;
  const char* site = nullptr;
  for (unsigned i = all.first; i < all.first + all.count; ++i) {
    const Thread& thread = *machine.threads[i];
    if (thread.waits_in != &all) continue;
    if (site && std::strcmp(site, thread.waits_at))
      fail("threads wait at different barriers: %s and %s", site, thread.waits_at);
    site = thread.waits_at;
  }
  if (all.ended) fail("%u threads ended without the barrier at %s", all.ended, site);
  for (unsigned i = all.first; i < all.first + all.count; ++i) {
    machine.threads[i]->waits_in = nullptr;
    machine.threads[i]->waits_at = nullptr;
    machine.ready.add(i);
  }
  all.waiting = 0;
  ++all.passed;
}

void wait_in(Gathering& all, const char* site) {
  machine.thread().waits_at = site;
  machine.thread().waits_in = &all;
  machine.ready.remove(machine.current);
  ++all.waiting;
  check_barrier(all);
  give_way();
}

void run_thread() {
  Fiber::arrived(*machine.previous);
  machine.body();
  Block& block = machine.block();
  machine.ready.remove(machine.current);
  ++block.gathering.ended;
  ++machine.cluster.ended;
  if (machine.cluster.ended == machine.count) {
    switch_from(machine.thread().fiber, machine.main);
  } else {
    if (block.ended()) block.leave();
    check_barrier(block.gathering);
    check_barrier(machine.cluster);
    give_way();
  }
  abort();  // an ended thread is never chosen
}

Region fresh_memory(const char* site, size_t bytes) {
  void* place = std::memset(std::malloc(bytes), 0xff, bytes);
  forget_accesses(place, bytes);
  return {site, static_cast<char*>(place), bytes};
}

void* shared_place(Block& block, const char* site, size_t bytes) {
  for (const Region& region : block.shared)
    if (std::strcmp(region.site, site) == 0) return region.begin;
  block.shared.push_back(fresh_memory(site, bytes));
  return block.shared.back().begin;
}

void forget_blocks() {
  for (const Block& block : machine.blocks) {
    for (const Region& region : block.shared) std::free(region.begin);
    std::free(block.dynamic.begin);
  }
  machine.blocks.clear();
}

// Run these blocks, all at once.
bool run_cluster(const std::vector<Index>& blocks, size_t dynamic_bytes) {
  const unsigned each = machine.block_threads;
  const unsigned count = machine.count = each * static_cast<unsigned>(blocks.size());
  for (const Index& index : blocks) {
    machine.blocks.push_back({index, {static_cast<unsigned>(machine.blocks.size()) * each, each}});
    if (dynamic_bytes) machine.blocks.back().dynamic = fresh_memory("dynamic", dynamic_bytes);
  }
  while (machine.threads.size() < count) machine.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < count; ++i) {
    machine.threads[i]->fiber.start(run_thread);
    machine.threads[i]->waits_at = nullptr;
    machine.threads[i]->waits_in = nullptr;
    machine.threads[i]->warp_syncs = 0;
  }
  machine.ready.fill(count);
  machine.meetings.assign((each + 31) / 32 * blocks.size(), {});
  machine.cluster = {0, count};
  machine.current = machine.order == kReverse ? 0 : count - 1;  // the one before the first
  place_thread(machine.choose());
  machine.running = true;
  switch_from(machine.main, machine.thread().fiber);
  machine.running = machine.atomic = false;
  forget_blocks();
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
                  "), thread " + std::to_string(machine.local()) + ": " + text;
  switch_from(machine.thread().fiber, machine.main);
  abort();
}

unsigned lane() { return machine.local() % 32; }

void barrier(const char* site) {
  if (!machine.is_dropped(site)) wait_in(machine.block().gathering, site);
}

void cluster_barrier(const char* file, int line) {
  static std::set<std::string> sites;
  const std::string& site = *sites.insert(std::string(file) + ":" + std::to_string(line)).first;
  if (!machine.is_dropped(site)) wait_in(machine.cluster, site.c_str());
}

unsigned cluster_size() { return static_cast<unsigned>(machine.blocks.size()); }
unsigned cluster_rank() { return machine.current / machine.block_threads; }

void* peer_place(const void* own, unsigned rank) {
  if (rank >= cluster_size()) fail("block %u of a cluster of %u", rank, cluster_size());
  Block& self = machine.block();
  Block& peer = machine.blocks[rank];
  if (&peer != &self && machine.cluster.passed == 0)
    fail("block %u of the cluster may not run yet: no cluster barrier before", rank);
  if (&peer != &self && peer.ended()) fail("block %u of the cluster has ended", rank);
  if (self.dynamic.holds(own))
    return peer.dynamic.begin + (static_cast<const char*>(own) - self.dynamic.begin);
  for (const Region& region : self.shared)
    if (region.holds(own))
      return static_cast<char*>(shared_place(peer, region.site, region.size)) +
             (static_cast<const char*>(own) - region.begin);
  fail("an address outside of shared memory has no other in the cluster");
}

const uint64_t* meet(const char* site, unsigned mask, uint64_t brought) {
  const unsigned self = machine.current, bit = 1u << lane(), first = self - lane();
  if (!(mask & bit)) fail("this thread is not in its own mask %#x at %s", mask, site);
  auto& warp = machine.meetings[machine.warp()];
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
  found->brought[round][lane()] = brought;
  found->arrived |= bit;
  machine.ready.remove(self);
  machine.threads[self]->waits_at = site;
  if (found->arrived == mask) {
    found->arrived = 0;
    ++found->round;
    for (unsigned i = 0; i < 32 && machine.local() - lane() + i < machine.block_threads; ++i)
      if (mask >> i & 1) {
        machine.ready.add(first + i);
        machine.threads[first + i]->waits_at = nullptr;
      }
  }
  give_way();
  return warp[number].brought[round];
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
  ++machine.thread().warp_syncs;
}

Atomic::Atomic() { machine.atomic = true; }
Atomic::~Atomic() { machine.atomic = false; }

bool where(const void* address, Place& place) {
  if (!machine.running || machine.thread().fiber.holds(address)) return false;
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  place = {machine.local(), block, machine.cluster_number, machine.block().gathering.passed,
           machine.cluster.passed, machine.thread().warp_syncs, machine.atomic};
  return true;
}

void* shared_place(const char* site, size_t bytes) {
  return shared_place(machine.block(), site, bytes);
}

void* dynamic_place() { return machine.block().dynamic.begin; }
size_t& dynamic_limit(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.emplace(kernel, 48 * 1024).first->second;
}

bool run_grid(Dimensions grid, Dimensions block, size_t dynamic_bytes, unsigned cluster,
              std::function<void()> body) {
  forget_accesses();
  gridDim = grid;
  blockDim = block;
  machine.block_threads = block.x * block.y * block.z;
  machine.body = std::move(body);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (machine.order == kReverse || machine.order == kWarpsDown)
    std::reverse(order.begin(), order.end());
  if (machine.order == kShuffled)
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[machine.next_random() % i]);
  for (uint64_t number : order) {
    machine.cluster_number = static_cast<unsigned>(number);
    std::vector<Index> blocks;
    for (uint64_t i = number * cluster; i < (number + 1) * cluster; ++i)
      blocks.push_back({static_cast<unsigned>(i % grid.x),
                        static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / grid.x / grid.y)});
    if (!run_cluster(blocks, dynamic_bytes)) break;
  }
  // a stack is two mappings, of which the system allows a process 65,530: keep those of one block
  if (machine.threads.size() > 1024) machine.threads.resize(1024);
  return machine.error.empty();
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
