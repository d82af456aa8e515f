// What the kernels of kd_loss do with a row, or a stretch of one: sum it up, read its statistics off
// the sums, write its gradient. The mathematics is that of kd_loss_cpu.cpp.
#pragma once

#include <cstdint>

#include "kd_loss.h"
#include "kd_loss_sums.cuh"

namespace clinkd {

// This thread's sums over `columns` of the student, of which the teacher has the first `common`.
// KEEP: what is read is also written to `kept_student` and `kept_teacher`.
template <typename T, int V, int POWER, bool KEEP>
__device__ __forceinline__ KDSums add_row(const KDArgs& a, const T* student, const T* teacher,
                                          int64_t columns, int64_t common, T* kept_student,
                                          T* kept_teacher) {
  using P = Pack<T, V>;
  const float scale = kLog2E / a.temperature;
  const bool reverse = a.divergence == kReverseKL;
  KDSums sums;
  sums.clear();
  const int64_t packs = common / V;
  for (int64_t i = threadIdx.x; i < packs; i += kKDThreads) {
    const P z = *reinterpret_cast<const P*>(student + i * V);
    const P t = *reinterpret_cast<const P*>(teacher + i * V);
    if (KEEP) {
      *reinterpret_cast<P*>(kept_student + i * V) = z;
      *reinterpret_cast<P*>(kept_teacher + i * V) = t;
    }
    add_logits<T, V, POWER>(sums, z, t, scale, a.softcap, reverse);
  }
  for (int64_t i = packs * V + threadIdx.x; i < common; i += kKDThreads) {
    const Pack<T, 1> z = {student[i]}, t = {teacher[i]};
    if (KEEP) kept_student[i] = z.item[0], kept_teacher[i] = t.item[0];
    add_logits<T, 1, POWER>(sums, z, t, scale, a.softcap, reverse);
  }
  for (int64_t i = common + threadIdx.x; i < columns; i += kKDThreads) {
    const T logit = student[i];
    if (KEEP) kept_student[i] = logit;
    const float z = capped(to_float(logit), a.softcap);
    if (z > sums.top) sums.raise_all(z);
    sums.total += exp2f((z - finite_level(sums.top)) * kLog2E);
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

// Gradient of `columns` of a row; `label`: the label's column among them, if it is one.
template <typename T, int V, int POWER>
__device__ __forceinline__ void write_gradient(const KDArgs& a, int64_t row, const float* s,
                                               const T* student, const T* teacher, int64_t columns,
                                               int64_t common, int64_t label, T* out) {
  using P = Pack<T, V>;
  const float scale = kLog2E / a.temperature;
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
