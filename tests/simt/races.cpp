// Races between the threads of a launch, whatever the schedule: two accesses to a byte by different
// threads, one of them a write, with nothing in between that makes one wait for the other.
//
// Kernels are compiled with -fsanitize=thread, which puts a call before every access to memory; the
// calls come here, not to that sanitizer's library, which knows CPU threads only.

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {
namespace {

struct Access {
  Place place;
  bool known = false, several = false;  // several: other threads too, since the last wait
};
struct Byte {
  Access write, read;
};
std::unordered_map<uintptr_t, Byte> bytes;

// A buffer whose accesses are counted, however often a byte of it is read.
struct Watched {
  uintptr_t begin, end;
  uint64_t read, written;
};
std::vector<Watched> watched;

bool same_thread(const Place& a, const Place& b) { return a.thread == b.thread && a.block == b.block; }

// Whether `now` did not wait for the access before it. Only blocks of a cluster wait for each other.
bool beside(const Place& before, const Place& now) {
  if (before.cluster != now.cluster) return true;
  if (before.cluster_barriers != now.cluster_barriers) return false;
  if (before.block != now.block) return true;
  if (before.barriers != now.barriers) return false;
  return before.thread / 32 != now.thread / 32 || before.warp_syncs >= now.warp_syncs;
}

void check(const Access& before, const Place& now, const char* first, const char* second) {
  if (!before.known || (before.place.atomic && now.atomic)) return;
  if (same_thread(before.place, now) && !before.several) return;
  if (beside(before.place, now))
    fail("a race: thread %u of block %u %s a byte, this thread %s it, and neither waits",
         before.place.thread, before.place.block, first, second);
}

void touch(const void* address, size_t size, bool writes) {
  Place now;
  if (!where(address, now)) return;
  for (Watched& buffer : watched)
    if (reinterpret_cast<uintptr_t>(address) - buffer.begin < buffer.end - buffer.begin)
      (writes ? buffer.written : buffer.read) += size;
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = bytes[reinterpret_cast<uintptr_t>(address) + i];
    check(byte.write, now, "wrote", writes ? "writes" : "reads");
    if (writes) {
      check(byte.read, now, "read", "writes");
      byte.write = {now, true, false};
    } else if (byte.read.known && beside(byte.read.place, now) &&
               !same_thread(byte.read.place, now)) {
      byte.read.several = true;
    } else if (!byte.read.several || !beside(byte.read.place, now)) {
      byte.read = {now, true, false};
    }
  }
}

}  // namespace

void forget_accesses() { bytes.clear(); }
void forget_accesses(const void* address, size_t size) {
  for (size_t i = 0; i < size && !bytes.empty(); ++i)
    bytes.erase(reinterpret_cast<uintptr_t>(address) + i);
}

}  // namespace simt

extern "C" void simt_watch(void* begin, size_t size) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  simt::watched.push_back({at, at + size, 0, 0});
}
// Bytes read and written of each buffer, in the order of the calls above; no more are counted.
extern "C" void simt_watched(uint64_t* counts) {
  for (const auto& buffer : simt::watched) *counts++ = buffer.read, *counts++ = buffer.written;
  simt::watched.clear();
}

#define SIMT_TOUCH(size)                                                                      \
  extern "C" void __tsan_read##size(void* p) { simt::touch(p, size, false); }                 \
  extern "C" void __tsan_write##size(void* p) { simt::touch(p, size, true); }
#define SIMT_TOUCH_UNALIGNED(size)                                                            \
  extern "C" void __tsan_unaligned_read##size(void* p) { simt::touch(p, size, false); }       \
  extern "C" void __tsan_unaligned_write##size(void* p) { simt::touch(p, size, true); }
SIMT_TOUCH(1)
SIMT_TOUCH(2)
SIMT_TOUCH(4)
SIMT_TOUCH(8)
SIMT_TOUCH(16)
SIMT_TOUCH_UNALIGNED(2)
SIMT_TOUCH_UNALIGNED(4)
SIMT_TOUCH_UNALIGNED(8)
SIMT_TOUCH_UNALIGNED(16)
extern "C" void __tsan_read_range(void* p, unsigned long n) { simt::touch(p, n, false); }
extern "C" void __tsan_write_range(void* p, unsigned long n) { simt::touch(p, n, true); }
extern "C" void __tsan_init() {}
