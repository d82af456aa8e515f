// The student's part of the top-k distillation loss on a GPU: a block of threads for each row. A
// map of one bit a column says which columns are the teacher's. The mathematics is that of
// topk_kd_cpu.cpp.
#pragma once

#include "floats.cuh"
#include "topk_kd.h"

namespace clinkd {

constexpr int kTopKThreads = 512;
constexpr int kTopKWarps = kTopKThreads / 32;
constexpr int64_t kTopKMostColumns = 48 * 1024 * 8 - 32 * 1024;  // a bit each, beside the sums

// The tail's sums so far, both relative to its level.
struct TailSums {
  float top, total, soft_total;

  __device__ __forceinline__ void raise(float new_top, float scale) {
    new_top = fmaxf(new_top, top);
    const float moved = top - finite_level(new_top);
    total *= power_of_two(moved * kLog2E);
    soft_total *= power_of_two(moved * scale);
    top = new_top;
  }
  template <int V>
  __device__ __forceinline__ void add(const float (&z)[V], float scale) {
    float most = -float_infinity();
#pragma unroll
    for (int j = 0; j < V; ++j) most = fmaxf(most, z[j]);
    if (most > top + kRoom / fmaxf(scale, kLog2E)) raise(most, scale);
    const float level = finite_level(top);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      total += power_of_two((z[j] - level) * kLog2E);
      soft_total += power_of_two((z[j] - level) * scale);
    }
  }
  // Those of LANES lanes together, for all of them.
  template <int LANES>
  __device__ __forceinline__ void combine(float scale) {
    float most = top;
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
      most = fmaxf(most, shuffle_xor(most, distance));
    raise(most, scale);
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      total += shuffle_xor(total, distance);
      soft_total += shuffle_xor(soft_total, distance);
    }
  }
};

// One bit a column, set where the teacher has it. All threads wait for it.
__device__ __forceinline__ void map_columns(const TopKArgs& a, int64_t row, uint32_t* map) {
  const int words = static_cast<int>((a.columns + 31) / 32);
  for (int i = threadIdx.x; i < words; i += kTopKThreads) map[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.k; i += kTopKThreads) {
    const int32_t id = a.ids[row * a.k + i];
    if (id < a.columns) atomicOr(map + id / 32, 1u << (id % 32));
  }
  __syncthreads();
}

__device__ __forceinline__ bool is_mapped(const uint32_t* map, int64_t column) {
  return map[column / 32] >> (column % 32) & 1u;
}

// Grid: one block a row; (columns + 31) / 32 words of shared memory.
template <typename T, int V>
__global__ void __launch_bounds__(kTopKThreads) topk_tails_kernel(const TopKArgs a) {
  extern __shared__ uint32_t map[];
  __shared__ TailSums shared[kTopKWarps];
  const int64_t row = blockIdx.x;
  float* found = a.statistics + row * kTailStatistics;
  TailSums sums = {-float_infinity(), 0.0f, 0.0f};
  if (a.labels[row] != a.ignore_index) {
    map_columns(a, row, map);
    const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
    const float scale = kLog2E / a.temperature;
    const int columns = static_cast<int>(a.columns), packs = columns / V;
    for (int i = threadIdx.x; i < packs; i += kTopKThreads) {
      const auto logits = *reinterpret_cast<const Pack<T, V>*>(student + i * V);
      // V divides 32: one word has the bits of the whole pack
      const uint32_t mapped = map[i * V / 32] >> (i * V % 32);
      float z[V];
#pragma unroll
      for (int j = 0; j < V; ++j)
        z[j] = mapped >> j & 1u ? -float_infinity() : capped(to_float(logits.item[j]), a.softcap);
      sums.add(z, scale);
    }
    for (int i = packs * V + threadIdx.x; i < columns; i += kTopKThreads) {
      const float z[1] = {capped(to_float(student[i]), a.softcap)};
      if (!is_mapped(map, i)) sums.add(z, scale);
    }
    sums.combine<32>(scale);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sums;
    __syncthreads();
    sums = shared[threadIdx.x % kTopKWarps];
    sums.combine<kTopKWarps>(scale);
  }
  if (threadIdx.x == 0) {
    // a NaN is not 0
    found[kTailTop] = sums.top;
    found[kTailInverse] = sums.total == 0.0f ? 1.0f : 1.0f / sums.total;
    found[kTailSoftInverse] = sums.soft_total == 0.0f ? 1.0f : 1.0f / sums.soft_total;
  }
}

// Grid and shared memory as above. `grad` may be `student`: a thread reads its logits before it
// writes, and the teacher's columns are written by themselves.
template <typename T, int V>
__global__ void __launch_bounds__(kTopKThreads) topk_gradient_kernel(const TopKArgs a) {
  extern __shared__ uint32_t map[];
  const int64_t row = blockIdx.x;
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride;
  const int columns = static_cast<int>(a.columns);  // at most kTopKMostColumns
  const int packs = columns / V;
  if (a.labels[row] == a.ignore_index) {
    Pack<T, V> nothing;
#pragma unroll
    for (int j = 0; j < V; ++j) from_float(nothing.item[j], 0.0f);
    for (int i = threadIdx.x; i < packs; i += kTopKThreads)
      *reinterpret_cast<Pack<T, V>*>(out + i * V) = nothing;
    for (int i = packs * V + threadIdx.x; i < columns; i += kTopKThreads)
      from_float(out[i], 0.0f);
    return;
  }
  map_columns(a, row, map);
  const bool right = a.labels[row] >= 0 && a.labels[row] < columns;
  const int label = right ? static_cast<int>(a.labels[row]) : -1;
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const float* s = a.statistics + row * kTailStatistics;
  const float scale = kLog2E / a.temperature, level = finite_level(s[kTailTop]);
  const float hard = a.tail_factor[row] * s[kTailInverse];
  const float soft = a.soft_factor[row] / a.temperature * s[kTailSoftInverse];
  const float picked = a.picked_factor[row];
  const auto gradient = [&](float raw, int column) {
    const float z = capped(raw, a.softcap);
    float grad = hard * power_of_two((z - level) * kLog2E) +
                 soft * power_of_two((z - level) * scale);
    if (column == label) grad += picked;
    if (a.softcap > 0) grad *= 1.0f - (z / a.softcap) * (z / a.softcap);
    return grad;
  };
#pragma unroll 1  // several at a time take more registers than sm_120 has for all warps
  for (int i = threadIdx.x; i < packs; i += kTopKThreads) {
    const auto z = *reinterpret_cast<const Pack<T, V>*>(student + i * V);
    Pack<T, V> grads;
#pragma unroll
    for (int j = 0; j < V; ++j) from_float(grads.item[j], gradient(to_float(z.item[j]), i * V + j));
    // V divides 32: one word has the bits of the whole pack
    const uint32_t mapped = map[i * V / 32] >> (i * V % 32) & ((1u << V) - 1u);
    if (!mapped) {
      *reinterpret_cast<Pack<T, V>*>(out + i * V) = grads;
      continue;
    }
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (!(mapped >> j & 1u)) out[i * V + j] = grads.item[j];
  }
  for (int i = packs * V + threadIdx.x; i < columns; i += kTopKThreads)
    if (!is_mapped(map, i)) from_float(out[i], gradient(to_float(student[i]), i));
  // other threads have read these columns among the neighbours that they load at once
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.k; i += kTopKThreads) {
    const int32_t id = a.ids[row * a.k + i];
    if (id >= columns) continue;
    const float z = capped(to_float(student[id]), a.softcap);
    float grad = a.top_factor[row * a.k + i] + (id == label ? picked : 0.0f);
    if (a.softcap > 0) grad *= 1.0f - (z / a.softcap) * (z / a.softcap);
    from_float(out[id], grad);
  }
}

}  // namespace clinkd
