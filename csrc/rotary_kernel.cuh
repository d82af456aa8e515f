// Rotary embedding on a GPU: one read and one write of the tensor, angles computed on the way.
#pragma once

#include <cstdint>

#include "floats.cuh"
#include "rotary.h"
#include "rotary_angle.h"

namespace clinkd {

constexpr int kRotaryThreads = 128;
constexpr int kHeadsPerThread = 8;  // share one thread's sines and cosines

// Each thread owns V pairs of one token and turns them in kHeadsPerThread heads. The pairs of a
// thread are 2 V components: V at `first` and V at `second`, or, for neighbours, all side by side.
// V > 1 needs pair_stride 1 or a multiple of V, and every head aligned to V components.
// Grid: x over tokens * chunks (below 2^31, in 32-bit arithmetic), y over groups of heads.
template <typename T, int V, bool NEIGHBOURS>
__global__ void __launch_bounds__(kRotaryThreads, 6) rotary_kernel(const RotaryArgs a) {
  const uint32_t chunks = (static_cast<uint32_t>(a.head_dim) + 2 * V - 1) / (2 * V);
  const uint32_t tokens = static_cast<uint32_t>(a.tokens);
  const uint32_t index = blockIdx.x * kRotaryThreads + threadIdx.x;
  const uint32_t token = index / chunks;
  if (token >= static_cast<uint32_t>(a.batch) * tokens) return;
  const int pair = static_cast<int>(index % chunks) * V;  // the first of V
  const int64_t b = token / tokens, s = token % tokens;
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0] + s * a.x_stride[1];
  T* out = static_cast<T*>(a.out) + b * a.out_stride[0] + s * a.out_stride[1];
  const int64_t head_begin = static_cast<int64_t>(blockIdx.y) * kHeadsPerThread;
  const int64_t head_end =
      head_begin + kHeadsPerThread < a.heads ? head_begin + kHeadsPerThread : a.heads;

  if (pair >= a.pairs) {  // components that pass through
    const int64_t begin = 2 * pair;
    const int64_t end = begin + 2 * V < a.head_dim ? begin + 2 * V : a.head_dim;
    if (a.x == a.out) return;
    for (int64_t h = head_begin; h < head_end; ++h)
      for (int64_t d = begin; d < end; ++d)
        out[h * a.out_stride[2] + d] = x[h * a.x_stride[2] + d];
    return;
  }

  const float* positions = a.positions + b * a.positions_stride[1] + s * a.positions_stride[2];
  float cos[V], sin[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    cos_sin(positions[a.axis[pair + j] * a.positions_stride[0]], a.hi[pair + j], a.lo[pair + j],
            cos[j], sin[j]);
    if (a.inverse) sin[j] = -sin[j];
  }
  const int n = a.pair_stride;
  const int first = NEIGHBOURS ? 2 * pair : pair / n * 2 * n + pair % n;
  const int second = NEIGHBOURS ? first + V : first + n;
  using P = Pack<T, V>;
#pragma unroll 4
  for (int64_t h = head_begin; h < head_end; ++h) {
    const T* head = x + h * a.x_stride[2];
    T* turned = out + h * a.out_stride[2];
    P u = *reinterpret_cast<const P*>(head + first);
    P v = *reinterpret_cast<const P*>(head + second);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      // for neighbours pair j is components 2j and 2j + 1 of the two packs laid end to end
      T& p = !NEIGHBOURS ? u.item[j] : 2 * j < V ? u.item[2 * j] : v.item[2 * j - V];
      T& q = !NEIGHBOURS ? v.item[j] : 2 * j + 1 < V ? u.item[2 * j + 1] : v.item[2 * j + 1 - V];
      const float p_in = to_float(p), q_in = to_float(q);
      from_float(p, p_in * cos[j] - q_in * sin[j]);
      from_float(q, p_in * sin[j] + q_in * cos[j]);
    }
    *reinterpret_cast<P*>(turned + first) = u;
    *reinterpret_cast<P*>(turned + second) = v;
  }
}

}  // namespace clinkd
