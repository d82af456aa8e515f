// Keys turned into their cache on the CPU, values copied beside them.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "rotary_append.h"

namespace clinkd {
namespace {

// under so many bytes a second thread costs more than it saves
constexpr int64_t kBytesPerThread = 64 << 10;

const char* at(const void* place, int64_t bytes) { return static_cast<const char*>(place) + bytes; }
char* at(void* place, int64_t bytes) { return static_cast<char*>(place) + bytes; }

// Tokens `begin` to `end` of row b, whose token 0 has slot `start`.
void copy_values(const RotaryAppendArgs& a, int64_t b, int64_t start, int64_t begin, int64_t end,
                 int threads) {
  const int64_t size = a.keys.type == kFloat32 ? 4 : 2;
  const int64_t bytes = a.keys.head_dim * size;
  const int64_t all = (end - begin) * a.keys.heads * bytes;
  const int parts = int(std::clamp<int64_t>(all / kBytesPerThread, 1, threads));
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
  for (int64_t s = begin; s < end; ++s) {
    const int64_t from = b * a.value_stride[0] + s * a.value_stride[1];
    const int64_t to = b * a.value_cache_stride[0] + (start + s) * a.value_cache_stride[1];
    for (int64_t h = 0; h < a.keys.heads; ++h)
      std::memcpy(at(a.value_cache, (to + h * a.value_cache_stride[2]) * size),
                  at(a.values, (from + h * a.value_stride[2]) * size), bytes);
  }
}

}  // namespace

void rotary_append_cpu(const RotaryAppendArgs& args, int threads) {
  const RotaryArgs& keys = args.keys;
  const int64_t size = keys.type == kFloat32 ? 4 : 2;
  for (int64_t b = 0; b < keys.batch; ++b) {
    const int64_t start = args.starts ? args.starts[b] : 0;
    if (start >= args.slots || start <= -keys.tokens) continue;
    const int64_t begin = std::max<int64_t>(0, -start);
    const int64_t end = std::min(keys.tokens, args.slots - start);
    RotaryArgs row = keys;
    row.batch = 1;
    row.tokens = end - begin;
    row.x = at(keys.x, (b * keys.x_stride[0] + begin * keys.x_stride[1]) * size);
    row.out = at(keys.out, (b * keys.out_stride[0] + (start + begin) * keys.out_stride[1]) * size);
    row.positions += b * keys.positions_stride[1] + begin * keys.positions_stride[2];
    rotary_cpu(row, threads);
    copy_values(args, b, start, begin, end, threads);
  }
}

}  // namespace clinkd
