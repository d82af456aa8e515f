// Cross-entropy and distillation over given logits on a GPU: a block of threads for each row. One
// walk over student and teacher for all sums (a second for mixtures, which need them first), one
// that writes the gradient. The mathematics is that of kd_loss_cpu.cpp.
#pragma once

#include <cstdint>

#include "kd_divergence.cuh"
#include "kd_loss.h"
#include "kd_loss_sums.cuh"

namespace clinkd {

// Grid: one block a row.
template <typename T, int V, int POWER>
__global__ void __launch_bounds__(kKDThreads) kd_statistics_kernel(const KDArgs a) {
  __shared__ KDSums shared[kKDWarps];
  __shared__ float pairs[kKDWarps][2];
  __shared__ float s[kStatistics];
  const int64_t row = blockIdx.x;
  float* found = a.statistics + row * kStatistics;
  const int64_t label = a.labels[row];
  if (label == a.ignore_index) {
    if (threadIdx.x == 0) a.ce[row] = a.kd[row] = 0.0f;
    if (threadIdx.x < kStatistics) found[threadIdx.x] = 0.0f;
    return;
  }
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  const int64_t columns = a.student_columns;
  const int64_t common = columns < a.teacher_columns ? columns : a.teacher_columns;
  const float scale = kLog2E / a.temperature;
  const bool reverse = a.divergence == kReverseKL;
  KDSums sums;
  sums.clear();
  const int64_t packs = common / V;
  for (int64_t i = threadIdx.x; i < packs; i += kKDThreads)
    add_logits<T, V, POWER>(sums, student + i * V, teacher + i * V, scale, a.softcap, reverse);
  for (int64_t i = packs * V + threadIdx.x; i < common; i += kKDThreads)
    add_logits<T, 1, POWER>(sums, student + i, teacher + i, scale, a.softcap, reverse);
  for (int64_t i = common + threadIdx.x; i < columns; i += kKDThreads) {
    const float z = capped(to_float(student[i]), a.softcap);
    if (z > sums.top) sums.raise_all(z);
    sums.total += exp2f((z - finite_level(sums.top)) * kLog2E);
  }
  sums = reduce_sums(sums, shared, scale, reverse);
  if (threadIdx.x == 0) {
    const bool right = label >= 0 && label < columns;
    const float picked = right ? capped(to_float(student[label]), a.softcap) : float_nan();
    const float soft_log = sums.soft_total > 0 ? logf(sums.soft_total) : float_nan();
    const float target_log = sums.target_total > 0 ? logf(sums.target_total) : float_nan();
    const float ratio = reverse ? target_log - soft_log : soft_log - target_log;
    const float owner = reverse ? sums.soft_total : sums.target_total;
    const float kl = sums.weighted / owner * kLn2 + ratio;
    a.ce[row] = (sums.top - picked) + (sums.total > 0 ? logf(sums.total) : float_nan());
    s[kTop] = sums.top;
    s[kInverse] = right && sums.total > 0 ? 1.0f / sums.total : float_nan();
    s[kSoftTop] = sums.soft_top;
    s[kSoftInverse] = sums.soft_total > 0 ? 1.0f / sums.soft_total : float_nan();
    s[kTargetTop] = sums.target_top;
    s[kTargetInverse] = sums.target_total > 0 ? 1.0f / sums.target_total : float_nan();
    s[kMean] = kl;
  }
  __syncthreads();
  float2 divergence = {s[kMean], s[kMean]};
  // mixtures need both distributions first; a small difference of large sums is no figure
  if (a.divergence >= kJSD || divergence.x < kSmallKL)
    divergence = row_divergence<T>(a, row, s, pairs);
  if (threadIdx.x == 0) {
    a.kd[row] = a.temperature * a.temperature * divergence.x;
    found[kMean] = divergence.y;
  }
  if (threadIdx.x < kMean) found[threadIdx.x] = s[threadIdx.x];
}

// Gradient of one logit; t is read where `shared`.
template <int POWER>
__device__ __forceinline__ float logit_gradient(const KDArgs& a, const float* s, float raw_z,
                                                float raw_t, bool shared, bool is_label, float ce,
                                                float kd, float scale) {
  const float z = capped(raw_z, a.softcap);
  float q = 0.0f, q_log = 0.0f;
  if (shared) {
    q_log = (z - s[kSoftTop]) * scale;
    q = exp2f(q_log);
  }
  float grad = POWER == 1   ? q
               : POWER == 2 ? q * q
                            : exp2f((z - s[kTop]) * kLog2E);
  grad = ce * (grad * s[kInverse] - (is_label ? 1.0f : 0.0f));
  if (shared) {
    q *= s[kSoftInverse];
    const float p_log = (capped(raw_t, a.softcap) - s[kTargetTop]) * scale;
    const float p = exp2f(p_log) * s[kTargetInverse];
    float pull = 0.0f;
    if (a.divergence == kForwardKL) {
      pull = q - p;
    } else if (a.divergence == kReverseKL) {
      const float logs = log2f(s[kSoftInverse]) - log2f(s[kTargetInverse]);
      if (q > 0) pull = q * (((q_log - p_log) + logs) * kLn2 - s[kMean]);
    } else if (q > kLeast) {
      const float m = fmaxf(a.mix * p + (1.0f - a.mix) * q, kLeast);
      const float g = a.divergence == kJSD ? (1.0f - a.mix) * kLn2 * (log2f(q) - log2f(m))
                                           : -(1.0f - a.mix) * p / m;
      pull = q * (g - s[kMean]);
    }
    if (!(s[kSoftInverse] == s[kSoftInverse])) pull = float_nan();
    grad += kd * pull;
  }
  if (a.softcap > 0) grad *= 1.0f - (z / a.softcap) * (z / a.softcap);
  return grad;
}

// Grid: one block a row. `grad` may be `student`: a thread reads its logits before it writes.
template <typename T, int V, int POWER>
__global__ void __launch_bounds__(kKDThreads) kd_gradient_kernel(const KDArgs a) {
  const int64_t row = blockIdx.x;
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride;
  const int64_t label = a.labels[row];
  const int64_t columns = a.student_columns;
  using P = Pack<T, V>;
  const int64_t packs = columns / V;
  if (label == a.ignore_index) {
    P nothing;
#pragma unroll
    for (int j = 0; j < V; ++j) from_float(nothing.item[j], 0.0f);
    for (int64_t i = threadIdx.x; i < packs; i += kKDThreads)
      *reinterpret_cast<P*>(out + i * V) = nothing;
    for (int64_t i = packs * V + threadIdx.x; i < columns; i += kKDThreads)
      from_float(out[i], 0.0f);
    return;
  }
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  const int64_t common = columns < a.teacher_columns ? columns : a.teacher_columns;
  const float scale = kLog2E / a.temperature;
  float s[kStatistics];
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) s[i] = a.statistics[row * kStatistics + i];
  const float ce = a.ce_factor[row], kd = a.kd_factor[row] * a.temperature;
  const int64_t whole = common / V;  // packs of which the teacher has every column
  for (int64_t i = threadIdx.x; i < whole; i += kKDThreads) {
    const P zs = *reinterpret_cast<const P*>(student + i * V);
    const P ts = *reinterpret_cast<const P*>(teacher + i * V);
    P grads;
#pragma unroll
    for (int j = 0; j < V; ++j)
      from_float(grads.item[j],
             logit_gradient<POWER>(a, s, to_float(zs.item[j]), to_float(ts.item[j]), true,
                                   i * V + j == label, ce, kd, scale));
    *reinterpret_cast<P*>(out + i * V) = grads;
  }
  for (int64_t i = whole * V + threadIdx.x; i < columns; i += kKDThreads) {
    const bool shared = i < common;
    const float t = shared ? to_float(teacher[i]) : 0.0f;
    from_float(out[i], logit_gradient<POWER>(a, s, to_float(student[i]), t, shared, i == label, ce,
                                             kd, scale));
  }
}

}  // namespace clinkd
