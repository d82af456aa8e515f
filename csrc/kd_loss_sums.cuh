// Sums over a row of logits on a GPU, by a block of threads: what kd_loss_row.cuh needs of both
// models at once.
#pragma once

#include <cstdint>

#include "floats.cuh"
#include "kd_loss.h"

namespace clinkd {

constexpr int kKDThreads = 512;
constexpr int kKDWarps = kKDThreads / 32;

// Columns that both models have.
__device__ __forceinline__ int64_t common_columns(const KDArgs& a) {
  return a.student_columns < a.teacher_columns ? a.student_columns : a.teacher_columns;
}

// A number of columns in 0 … most.
__device__ __forceinline__ int64_t clamped(int64_t columns, int64_t most) {
  return columns < 0 ? 0 : columns < most ? columns : most;
}

// The row's sums so far, each relative to its maximum; `weighted` to the last two maxima.
struct KDSums {
  float top, total;            // student at T = 1, all columns
  float soft_top, soft_total;  // student at T, common columns
  float target_top, target_total;
  float weighted;  // of log-ratios in powers of two, under the teacher (reverse: the student)

  __device__ __forceinline__ void clear() {
    top = soft_top = target_top = -float_infinity();
    total = soft_total = target_total = weighted = 0.0f;
  }
  // Move the common columns' maxima up to these.
  __device__ __forceinline__ void raise(float new_soft, float new_target, float scale,
                                        bool reverse) {
    new_soft = fmaxf(new_soft, soft_top);
    new_target = fmaxf(new_target, target_top);
    const float moved = ((finite_level(new_soft) - finite_level(new_target)) -
                         (finite_level(soft_top) - finite_level(target_top))) * scale;
    const float soft_keep = exp2f((soft_top - finite_level(new_soft)) * scale);
    const float target_keep = exp2f((target_top - finite_level(new_target)) * scale);
    weighted = reverse ? (weighted - soft_total * moved) * soft_keep
                       : (weighted + target_total * moved) * target_keep;
    soft_total *= soft_keep;
    target_total *= target_keep;
    soft_top = new_soft;
    target_top = new_target;
  }
  __device__ __forceinline__ void raise_all(float new_top) {
    new_top = fmaxf(new_top, top);
    total *= exp2f((top - finite_level(new_top)) * kLog2E);
    top = new_top;
  }
  __device__ __forceinline__ void merge(KDSums other, float scale, bool reverse) {
    raise(other.soft_top, other.target_top, scale, reverse);
    other.raise(soft_top, target_top, scale, reverse);
    raise_all(other.top);
    other.raise_all(top);
    total += other.total;
    soft_total += other.soft_total;
    target_total += other.target_total;
    weighted += other.weighted;
  }
};

__device__ __forceinline__ float kd_shuffle(float v, int distance) {
  return __shfl_down_sync(0xffffffffu, v, distance);
}

// All threads get the block's sums. `shared`: one element a warp.
__device__ __forceinline__ KDSums reduce_sums(KDSums mine, KDSums* shared, float scale,
                                              bool reverse) {
  for (int distance = 16; distance > 0; distance /= 2) {
    KDSums other;
    other.top = kd_shuffle(mine.top, distance);
    other.total = kd_shuffle(mine.total, distance);
    other.soft_top = kd_shuffle(mine.soft_top, distance);
    other.soft_total = kd_shuffle(mine.soft_total, distance);
    other.target_top = kd_shuffle(mine.target_top, distance);
    other.target_total = kd_shuffle(mine.target_total, distance);
    other.weighted = kd_shuffle(mine.weighted, distance);
    mine.merge(other, scale, reverse);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  KDSums all = shared[0];
  for (int warp = 1; warp < kKDWarps; ++warp) all.merge(shared[warp], scale, reverse);
  return all;
}

// V logits of student and teacher into the sums. POWER: T where it is 1 or 2 and the vocabularies
// agree, so that the student's sum at 1 is that of powers of what it has at T.
template <typename T, int V, int POWER>
__device__ __forceinline__ void add_logits(KDSums& sums, const Pack<T, V>& zs,
                                           const Pack<T, V>& ts, float scale, float cap,
                                           bool reverse) {
  float z[V], t[V];
  float z_top = -float_infinity(), t_top = -float_infinity();
#pragma unroll
  for (int j = 0; j < V; ++j) {
    z[j] = capped(to_float(zs.item[j]), cap);
    t[j] = capped(to_float(ts.item[j]), cap);
    z_top = fmaxf(z_top, z[j]);
    t_top = fmaxf(t_top, t[j]);
  }
  if (z_top > sums.soft_top || t_top > sums.target_top) sums.raise(z_top, t_top, scale, reverse);
  if (z_top > sums.top) sums.raise_all(z_top);
  const float z_level = finite_level(sums.soft_top), t_level = finite_level(sums.target_top);
  const float level = finite_level(sums.top);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float q_log = (z[j] - z_level) * scale, p_log = (t[j] - t_level) * scale;
    const float q = exp2f(q_log), p = exp2f(p_log);
    sums.total += POWER == 1 ? q : POWER == 2 ? q * q : exp2f((z[j] - level) * kLog2E);
    sums.soft_total += q;
    sums.target_total += p;
    if (reverse)
      sums.weighted += q > 0 ? q * (q_log - p_log) : 0.0f;
    else
      sums.weighted += p > 0 ? p * (p_log - q_log) : 0.0f;
  }
}

}  // namespace clinkd
