// Rotary embedding on a GPU: one read and one write of the tensor, angles computed on the way.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "floats.cuh"
#include "rotary.h"
#include "rotary_angle.h"

namespace clinkd {

constexpr int kRotaryThreads = 128;
constexpr int kHeadsPerThread = 8;  // share one thread's sines and cosines

// Which part of the work is a thread's: V pairs, `pair` the first of them, of one token in heads
// `begin` to `end`. Grid: x over tokens * chunks (below 2^31, in 32-bit arithmetic), y over groups
// of heads.
template <int V>
struct RotaryPart {
  int64_t batch, token, begin, end;
  int pair;
  bool none;  // past the last token

  __device__ __forceinline__ explicit RotaryPart(const RotaryArgs& a) {
    const uint32_t chunks = (static_cast<uint32_t>(a.head_dim) + 2 * V - 1) / (2 * V);
    const uint32_t tokens = static_cast<uint32_t>(a.tokens);
    const uint32_t index = blockIdx.x * kRotaryThreads + threadIdx.x;
    const uint32_t place = index / chunks;
    none = place >= static_cast<uint32_t>(a.batch) * tokens;
    pair = static_cast<int>(index % chunks) * V;
    batch = place / tokens;
    token = place % tokens;
    begin = static_cast<int64_t>(blockIdx.y) * kHeadsPerThread;
    end = begin + kHeadsPerThread < a.heads ? begin + kHeadsPerThread : a.heads;
  }
};

// Turns a part from x to out, the first head of its token. The pairs of a thread are 2 V
// components: V at `first` and V at `second`, or, for neighbours, all side by side.
// V > 1 needs pair_stride 1 or a multiple of V, and every head aligned to V components.
template <typename T, int V, bool NEIGHBOURS>
__device__ __forceinline__ void turn_part(const RotaryArgs& a, const RotaryPart<V>& part,
                                          const T* x, T* out) {
  const int pair = part.pair;
  if (pair >= a.pairs) {  // components that pass through
    const int64_t begin = 2 * pair;
    const int64_t end = begin + 2 * V < a.head_dim ? begin + 2 * V : a.head_dim;
    if (a.x == a.out) return;
    for (int64_t h = part.begin; h < part.end; ++h)
      for (int64_t d = begin; d < end; ++d)
        out[h * a.out_stride[2] + d] = x[h * a.x_stride[2] + d];
    return;
  }

  const float* positions =
      a.positions + part.batch * a.positions_stride[1] + part.token * a.positions_stride[2];
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
  const int apart = second - first;
  const T* head = x + part.begin * a.x_stride[2] + first;
  T* turned = out + part.begin * a.out_stride[2] + first;
#pragma unroll 4
  for (int left = static_cast<int>(part.end - part.begin); left > 0; --left) {
    P u = *reinterpret_cast<const P*>(head);
    P v = *reinterpret_cast<const P*>(head + apart);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      // for neighbours pair j is components 2j and 2j + 1 of the two packs laid end to end
      T& p = !NEIGHBOURS ? u.item[j] : 2 * j < V ? u.item[2 * j] : v.item[2 * j - V];
      T& q = !NEIGHBOURS ? v.item[j] : 2 * j + 1 < V ? u.item[2 * j + 1] : v.item[2 * j + 1 - V];
      const float p_in = to_float(p), q_in = to_float(q);
      from_float(p, p_in * cos[j] - q_in * sin[j]);
      from_float(q, p_in * sin[j] + q_in * cos[j]);
    }
    *reinterpret_cast<P*>(turned) = u;
    *reinterpret_cast<P*>(turned + apart) = v;
    head += a.x_stride[2];
    turned += a.out_stride[2];
  }
}

template <typename T, int V, bool NEIGHBOURS>
__global__ void __launch_bounds__(kRotaryThreads, 8) rotary_kernel(const RotaryArgs a) {
  const RotaryPart<V> part(a);
  if (part.none) return;
  const T* x =
      static_cast<const T*>(a.x) + part.batch * a.x_stride[0] + part.token * a.x_stride[1];
  T* out = static_cast<T*>(a.out) + part.batch * a.out_stride[0] + part.token * a.out_stride[1];
  turn_part<T, V, NEIGHBOURS>(a, part, x, out);
}

// The grid of a launch; false where there are too many tokens.
template <int V>
bool rotary_grid(const RotaryArgs& a, dim3& grid) {
  const int64_t chunks = (a.head_dim + 2 * V - 1) / (2 * V);
  const int64_t threads = a.batch * a.tokens * chunks;
  grid = dim3(static_cast<unsigned>((threads + kRotaryThreads - 1) / kRotaryThreads),
              static_cast<unsigned>((a.heads + kHeadsPerThread - 1) / kHeadsPerThread));
  return threads < INT32_MAX;
}

// Whether every head and every pair's two halves lie on 16 bytes.
template <typename T>
bool rotary_whole_packs(const RotaryArgs& a) {
  constexpr int V = 16 / sizeof(T);
  uintptr_t places = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.out);
  for (int i = 0; i < 3; ++i)
    places |= static_cast<uintptr_t>((a.x_stride[i] | a.out_stride[i]) * sizeof(T));
  const bool pairs = a.pairs % V == 0 && (a.pair_stride == 1 || a.pair_stride % V == 0);
  return pairs && places % 16 == 0;
}

}  // namespace clinkd
