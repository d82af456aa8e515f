// Sums over a row of logits on a GPU, by a block of threads: what kd_loss_row.cuh needs of both
// models at once.
#pragma once

#include <cstdint>

#include "floats.cuh"
#include "kd_loss.h"

namespace clinkd {

constexpr int kKDThreads = 512;
constexpr int kKDWarps = kKDThreads / 32;

// What a kernel is made for. All but the first: forward KL without softcap, at T = 1 and T = 2 of
// equal vocabularies (then the student's exponentials at 1 are powers of those at T), or at any T.
enum KDKind { kAnyLoss, kKLAtOne, kKLAtTwo, kKLAtAny };

inline KDKind kd_kind(const KDArgs& a) {
  if (a.divergence != kForwardKL || a.softcap > 0) return kAnyLoss;
  const bool same = a.student_columns == a.teacher_columns;
  return same && a.temperature == 1.0f ? kKLAtOne : same && a.temperature == 2.0f ? kKLAtTwo : kKLAtAny;
}

// Columns that both models have.
__device__ __forceinline__ int64_t common_columns(const KDArgs& a) {
  return a.student_columns < a.teacher_columns ? a.student_columns : a.teacher_columns;
}

// A number of columns in 0 … most.
__device__ __forceinline__ int64_t clamped(int64_t columns, int64_t most) {
  return columns < 0 ? 0 : columns < most ? columns : most;
}

// The row's sums so far, each relative to its level; `weighted` to the last two levels.
struct KDSums {
  float top, total;            // student at T = 1, all columns
  float soft_top, soft_total;  // student at T, common columns
  float target_top, target_total;
  float weighted;  // of log-ratios in powers of two, under the teacher (reverse: the student)

  __device__ __forceinline__ void clear() {
    top = soft_top = target_top = -float_infinity();
    total = soft_total = target_total = weighted = 0.0f;
  }
  // Move the common columns' levels up to these.
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
};

// The sums of LANES lanes together, for all of them: first the levels, then each moves up to them.
template <int LANES>
__device__ __forceinline__ void combine(KDSums& mine, float scale, bool reverse) {
  float top = mine.top, soft_top = mine.soft_top, target_top = mine.target_top;
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    top = fmaxf(top, shuffle_xor(top, distance));
    soft_top = fmaxf(soft_top, shuffle_xor(soft_top, distance));
    target_top = fmaxf(target_top, shuffle_xor(target_top, distance));
  }
  mine.raise(soft_top, target_top, scale, reverse);
  mine.raise_all(top);
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    mine.total += shuffle_xor(mine.total, distance);
    mine.soft_total += shuffle_xor(mine.soft_total, distance);
    mine.target_total += shuffle_xor(mine.target_total, distance);
    mine.weighted += shuffle_xor(mine.weighted, distance);
  }
}

// All threads get the block's sums. `shared`: one element a warp.
__device__ __forceinline__ KDSums reduce_sums(KDSums mine, KDSums* shared, float scale,
                                              bool reverse) {
  combine<32>(mine, scale, reverse);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  mine = shared[threadIdx.x % kKDWarps];
  combine<kKDWarps>(mine, scale, reverse);
  return mine;
}

// V logits of student and teacher into the sums.
template <typename T, int V, int KIND>
__device__ __forceinline__ void add_logits(KDSums& sums, const Pack<T, V>& zs,
                                           const Pack<T, V>& ts, float scale, float cap,
                                           bool reverse) {
  constexpr bool powers = KIND == kKLAtOne || KIND == kKLAtTwo;
  float z[V], t[V];
  float z_top = -float_infinity(), t_top = -float_infinity();
#pragma unroll
  for (int j = 0; j < V; ++j) {
    z[j] = KIND ? to_float(zs.item[j]) : capped(to_float(zs.item[j]), cap);
    t[j] = KIND ? to_float(ts.item[j]) : capped(to_float(ts.item[j]), cap);
    z_top = fmaxf(z_top, z[j]);
    t_top = fmaxf(t_top, t[j]);
  }
  const float room = kRoom / scale;
  if (z_top > sums.soft_top + room || t_top > sums.target_top + room) {
    sums.raise(z_top, t_top, scale, reverse);
    if (powers) sums.raise_all(z_top);
  }
  if (!powers && z_top > sums.top + kRoom / kLog2E) sums.raise_all(z_top);
  const float z_level = finite_level(sums.soft_top), t_level = finite_level(sums.target_top);
  const float level = finite_level(sums.top);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float q_log = (z[j] - z_level) * scale, p_log = (t[j] - t_level) * scale;
    const float q = power_of_two(q_log), p = power_of_two(p_log);
    sums.total += KIND == kKLAtOne   ? q
                  : KIND == kKLAtTwo ? q * q
                                     : power_of_two((z[j] - level) * kLog2E);
    sums.soft_total += q;
    sums.target_total += p;
    if (KIND == kAnyLoss && reverse)
      sums.weighted += q > 0 ? q * (q_log - p_log) : 0.0f;
    else
      sums.weighted += p > 0 ? p * (p_log - q_log) : 0.0f;
  }
}

}  // namespace clinkd
