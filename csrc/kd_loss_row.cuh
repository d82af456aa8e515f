// What the kernels of kd_loss do with a row, or a stretch of one: sum it up, read its statistics off
// the sums, write its gradient. The mathematics is that of kd_loss_cpu.cpp.
#pragma once

#include <cstdint>

#include "kd_loss.h"
#include "kd_loss_sums.cuh"

namespace clinkd {

// `columns` of a row into shared memory, where each thread waits for its own with `wait_for_copies`.
// Both begin on 16 bytes.
template <typename T, int V>
__device__ __forceinline__ void keep_row(T* kept, const T* row, int64_t columns) {
  static_assert(V * sizeof(T) == 16);
  const int64_t packs = columns / V;
  for (int64_t i = threadIdx.x; i < packs; i += kKDThreads)
    copy_16_bytes(kept + i * V, row + i * V);
  for (int64_t i = packs * V + threadIdx.x; i < columns; i += kKDThreads) kept[i] = row[i];
}

// This thread's sums over `columns` of the student, of which the teacher has the first `common`.
template <typename T, int V, int KIND>
__device__ __forceinline__ KDSums add_row(const KDArgs& a, const T* student, const T* teacher,
                                          int64_t columns, int64_t common) {
  using P = Pack<T, V>;
  const float scale = kLog2E / a.temperature;
  const bool reverse = a.divergence == kReverseKL;
  KDSums sums;
  sums.clear();
  const int64_t packs = common / V;
  for (int64_t i = threadIdx.x; i < packs; i += kKDThreads) {
    const P z = *reinterpret_cast<const P*>(student + i * V);
    const P t = *reinterpret_cast<const P*>(teacher + i * V);
    add_logits<T, V, KIND>(sums, z, t, scale, a.softcap, reverse);
  }
  for (int64_t i = packs * V + threadIdx.x; i < common; i += kKDThreads) {
    const Pack<T, 1> z = {student[i]}, t = {teacher[i]};
    add_logits<T, 1, KIND>(sums, z, t, scale, a.softcap, reverse);
  }
  for (int64_t i = common + threadIdx.x; i < columns; i += kKDThreads) {
    const float z = capped(to_float(student[i]), a.softcap);
    if (z > sums.top + kRoom / kLog2E) sums.raise_all(z);
    sums.total += power_of_two((z - finite_level(sums.top)) * kLog2E);
  }
  return sums;
}

// All of a row's statistics from its sums; kMean is the KL divergence, by difference.
__device__ __forceinline__ void row_statistics(const KDSums& sums, bool right_label, bool reverse,
                                               float* s) {
  const float soft_log = sums.soft_total > 0 ? logf(sums.soft_total) : float_nan();
  const float target_log = sums.target_total > 0 ? logf(sums.target_total) : float_nan();
  const float ratio = reverse ? target_log - soft_log : soft_log - target_log;
  const float owner = reverse ? sums.soft_total : sums.target_total;
  s[kTop] = sums.top;
  s[kInverse] = right_label && sums.total > 0 ? 1.0f / sums.total : float_nan();
  s[kSoftTop] = sums.soft_top;
  s[kSoftInverse] = sums.soft_total > 0 ? 1.0f / sums.soft_total : float_nan();
  s[kTargetTop] = sums.target_top;
  s[kTargetInverse] = sums.target_total > 0 ? 1.0f / sums.target_total : float_nan();
  s[kMean] = sums.weighted / owner * kLn2 + ratio;
}

// Cross-entropy of a row by the label's logit, a NaN where there is no such label.
__device__ __forceinline__ float cross_entropy(const KDSums& sums, float picked) {
  return (sums.top - picked) + (sums.total > 0 ? logf(sums.total) : float_nan());
}

// Gradient of one logit, but for the label's one; t is read where `shared`.
__device__ __forceinline__ float logit_gradient(const KDArgs& a, const float* s, float raw_z,
                                                float raw_t, bool shared, float ce, float kd,
                                                float scale) {
  const float z = capped(raw_z, a.softcap);
  float grad = ce * power_of_two((z - s[kTop]) * kLog2E) * s[kInverse];
  if (shared) {
    const float q_log = (z - s[kSoftTop]) * scale;
    const float q = power_of_two(q_log) * s[kSoftInverse];
    const float p_log = (capped(raw_t, a.softcap) - s[kTargetTop]) * scale;
    const float p = power_of_two(p_log) * s[kTargetInverse];
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
  return grad;
}

// What the softcap makes of the gradient of one capped logit.
__device__ __forceinline__ float through_cap(const KDArgs& a, float raw_z, float grad) {
  if (!(a.softcap > 0)) return grad;
  const float share = capped(raw_z, a.softcap) / a.softcap;
  return grad * (1.0f - share * share);
}

// Gradient of `columns` of a row; `label`: the label's column among them, if it is one.
template <typename T, int V, int KIND>
__device__ __forceinline__ void write_gradient(const KDArgs& a, int64_t row, const float* s,
                                               const T* student, const T* teacher, int64_t columns,
                                               int64_t common, int64_t label, T* out) {
  using P = Pack<T, V>;
  const float scale = kLog2E / a.temperature;
  const int64_t at = row * a.factor_stride;
  const float ce = a.ce_factor[at], kd = a.kd_factor[at] * a.temperature;
  const float of_all = ce * s[kInverse];
  const float of_soft = kd * s[kSoftInverse], of_target = kd * s[kTargetInverse];
  const int64_t whole = common / V;  // packs of which the teacher has every column
  const int64_t label_pack = label < 0 ? -1 : label / V;
  const int label_item = static_cast<int>(label - label_pack * V);
  for (int64_t i = threadIdx.x; i < whole; i += kKDThreads) {
    const P zs = *reinterpret_cast<const P*>(student + i * V);
    const P ts = *reinterpret_cast<const P*>(teacher + i * V);
    float grads[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float z = to_float(zs.item[j]), t = to_float(ts.item[j]);
      if (KIND == kAnyLoss) {
        grads[j] = logit_gradient(a, s, z, t, true, ce, kd, scale);
      } else {
        const float q = power_of_two((z - s[kSoftTop]) * scale);
        const float all = KIND == kKLAtOne   ? q
                          : KIND == kKLAtTwo ? q * q
                                             : power_of_two((z - s[kTop]) * kLog2E);
        const float p = power_of_two((t - s[kTargetTop]) * scale);
        grads[j] = all * of_all + (q * of_soft - p * of_target);
      }
    }
    if (i == label_pack) {
#pragma unroll
      for (int j = 0; j < V; ++j) grads[j] -= j == label_item ? ce : 0.0f;
    }
    P rounded;
#pragma unroll
    for (int j = 0; j < V; ++j)
      from_float(rounded.item[j],
                 KIND == kAnyLoss ? through_cap(a, to_float(zs.item[j]), grads[j]) : grads[j]);
    *reinterpret_cast<P*>(out + i * V) = rounded;
  }
  for (int64_t i = whole * V + threadIdx.x; i < columns; i += kKDThreads) {
    const bool shared = i < common;
    const float z = to_float(student[i]), t = shared ? to_float(teacher[i]) : 0.0f;
    float grad = logit_gradient(a, s, z, t, shared, ce, kd, scale);
    if (i == label) grad -= ce;
    from_float(out[i], through_cap(a, z, grad));
  }
}

template <typename T, int V>
__device__ __forceinline__ void write_zeros(T* out, int64_t columns) {
  using P = Pack<T, V>;
  P nothing;
#pragma unroll
  for (int j = 0; j < V; ++j) from_float(nothing.item[j], 0.0f);
  const int64_t packs = columns / V;
  for (int64_t i = threadIdx.x; i < packs; i += kKDThreads)
    *reinterpret_cast<P*>(out + i * V) = nothing;
  for (int64_t i = packs * V + threadIdx.x; i < columns; i += kKDThreads) from_float(out[i], 0.0f);
}

}  // namespace clinkd
