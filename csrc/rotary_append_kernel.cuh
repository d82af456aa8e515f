// Keys turned into their cache on a GPU, values copied beside them: one read and one write of both.
#pragma once

#include "rotary_append.h"
#include "rotary_kernel.cuh"

namespace clinkd {

// The components that a part turns, as they are. V > 1 needs every head aligned to V components.
template <typename T, int V>
__device__ __forceinline__ void copy_part(const RotaryAppendArgs& a, const RotaryPart<V>& part,
                                          const T* x, T* out) {
  using P = Pack<T, V>;
  const int64_t begin = 2 * part.pair;
  const bool whole = begin + 2 * V <= a.keys.head_dim;
#pragma unroll 4
  for (int64_t h = part.begin; h < part.end; ++h) {
    const T* head = x + h * a.value_stride[2];
    T* copy = out + h * a.value_cache_stride[2];
    if (whole) {
      const P u = *reinterpret_cast<const P*>(head + begin);
      const P v = *reinterpret_cast<const P*>(head + begin + V);
      *reinterpret_cast<P*>(copy + begin) = u;
      *reinterpret_cast<P*>(copy + begin + V) = v;
    } else {
      for (int64_t d = begin; d < a.keys.head_dim; ++d) copy[d] = head[d];
    }
  }
}

// Grid as for rotary_kernel.
template <typename T, int V, bool NEIGHBOURS>
__global__ void __launch_bounds__(kRotaryThreads, 6)
    rotary_append_kernel(const RotaryAppendArgs a) {
  const RotaryPart<V> part(a.keys);
  if (part.none) return;
  const int64_t slot = (a.starts ? a.starts[part.batch] : 0) + part.token;
  if (slot < 0 || slot >= a.slots) return;
  const RotaryArgs& k = a.keys;
  const T* key =
      static_cast<const T*>(k.x) + part.batch * k.x_stride[0] + part.token * k.x_stride[1];
  T* turned = static_cast<T*>(k.out) + part.batch * k.out_stride[0] + slot * k.out_stride[1];
  turn_part<T, V, NEIGHBOURS>(k, part, key, turned);
  const T* value = static_cast<const T*>(a.values) + part.batch * a.value_stride[0] +
                   part.token * a.value_stride[1];
  T* copy = static_cast<T*>(a.value_cache) + part.batch * a.value_cache_stride[0] +
            slot * a.value_cache_stride[1];
  copy_part<T, V>(a, part, value, copy);
}

}  // namespace clinkd
