// Keys turned and put into a cache together with their values: what is read and written.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace clinkd {

// Token s of row b goes to slot starts[b] + s of the caches [B, slots, H, D]; one whose slot they
// do not have goes nowhere.
struct RotaryAppendArgs {
  RotaryArgs keys;         // `out` is the cache of keys
  const void* values;      // as keys.x, [B, S, H, D], components side by side
  void* value_cache;       // as keys.out
  const int64_t* starts;   // [B]; null: all 0
  int64_t slots;
  int64_t value_stride[3], value_cache_stride[3];  // B, S, H
};

void rotary_append_cpu(const RotaryAppendArgs& args, int threads);
int rotary_append_cuda(const RotaryAppendArgs& args, void* stream);  // 0, or a CUDA error

}  // namespace clinkd
