// The gradient of the distillation loss by a row of logits, on the CPU.
//
// With p the teacher's, q the student's distribution at temperature T over the columns that both
// have, and D the divergence, the gradient of T^2 D by the student's logits is T q (g - sum q g),
// g = dD/dq:
//
//   forward KL  g = -p / q, so T (q - p)      reverse KL  g = log(q / p)
//   JSD         g = (1 - beta) log(q / m)     skew KL     g = -(1 - skew) p / m
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kd_loss.h"
#include "logit_rows.h"

namespace clinkd {

// Powers of e at T = 1 from those at T, where T is a small integer.
template <int POWER, typename F>
CLINKD_INLINE F raised(F soft) {
  static_assert(POWER == 1 || POWER == 2);
  if constexpr (POWER == 1) return soft;
  return soft * soft;
}

// T, where powers of e at T give those at 1 in every column; else 0.
inline int power_of(const KDArgs& a) {
  if (a.student_columns != a.teacher_columns) return 0;
  return a.temperature == 1.0f ? 1 : a.temperature == 2.0f ? 2 : 0;
}

// exp((logit - top) / T) of a block of columns, relative to the largest logit up to its end; `hard`
// is the student's at T = 1, where `power_of` is 0.
struct Exponentials {
  alignas(64) float student[kBlock], teacher[kBlock], hard[kBlock];
  float student_top, teacher_top;
};

// Gradient of one block, in place of its logits.
template <int POWER, int W>
CLINKD_INLINE void block_gradient(const KDArgs& a, const float* s, float ce, float kd, float* z,
                                  const float* t, int count, int shared) {
  using F = Floats<W>;
  const float scale = kLog2E / a.temperature;
  const float q_log_inverse = std::log2(s[kSoftInverse]);
  const float p_log_inverse = std::log2(s[kTargetInverse]);
  for (int i = 0; i < count; i += W) {
    const F x = load<W>(z + i);
    F grad = zero<W>();
    F q = zero<W>();
    F q_log = zero<W>();
    if (i < shared) {
      q_log = (x - s[kSoftTop]) * scale;
      q = exp2<W>(q_log);
    }
    if constexpr (POWER > 0)
      grad = raised<POWER>(q) * (ce * s[kInverse]);
    else
      grad = exp2<W>((x - s[kTop]) * kLog2E) * (ce * s[kInverse]);
    if (i < shared) {
      q *= s[kSoftInverse];
      const F p_log = (load<W>(t + i) - s[kTargetTop]) * scale;
      const F p = exp2<W>(p_log) * s[kTargetInverse];
      F pull;
      if (a.divergence == kForwardKL) {
        pull = q - p;
      } else if (a.divergence == kReverseKL) {
        const F ratio = ((q_log + q_log_inverse) - (p_log + p_log_inverse)) * kLn2;
        pull = q > 0.0f ? q * (ratio - s[kMean]) : zero<W>();
      } else {
        const F m = a.mix * p + (1.0f - a.mix) * q;
        const F least = zero<W>() + kLeast;
        const F safe = m > least ? m : least;
        F g;
        if (a.divergence == kJSD)
          g = (1.0f - a.mix) * kLn2 * (log2<W>(q > least ? q : least) - log2<W>(safe));
        else
          g = -(1.0f - a.mix) * p / safe;
        pull = q > least ? q * (g - s[kMean]) : zero<W>();
      }
      if (i + W > shared)  // past the border of the common columns
        for (int j = shared - i; j < W; ++j) pull[j] = 0.0f;
      grad += kd * pull;
    }
    store<W>(z + i, grad);
  }
}

template <typename T, int POWER, int W>
CLINKD_INLINE void row_gradient(const KDArgs& a, int64_t row) {
  using F = Floats<W>;
  alignas(64) float z[kBlock], t[kBlock], slope[kBlock];
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride;
  const int64_t label = a.labels[row];
  if (label == a.ignore_index) {
    std::fill(out, out + a.student_columns, T{});
    return;
  }
  const float* s = a.statistics + row * kStatistics;
  const int64_t at = row * a.factor_stride;
  const float ce = a.ce_factor[at], kd = a.kd_factor[at] * a.temperature;
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  const int64_t common = std::min(a.student_columns, a.teacher_columns);
  const bool past_caches = a.grad != a.student && can_stream(out, a.rows * a.grad_stride);
  for (int64_t begin = 0; begin < a.student_columns; begin += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, a.student_columns - begin));
    const int shared = int(std::clamp<int64_t>(common - begin, 0, count));
    fill<W>(student + begin, count, a.softcap, z);
    if (a.softcap > 0)
      for (int i = 0; i < count; i += W) {
        const F x = load<W>(z + i) * (1.0f / a.softcap);
        store<W>(slope + i, 1.0f - x * x);
      }
    if (shared > 0) fill<W>(teacher + begin, shared, a.softcap, t);
    block_gradient<POWER, W>(a, s, ce, kd, z, t, count, shared);
    if (label >= begin && label < begin + count) z[label - begin] -= ce;
    if (a.softcap > 0)
      for (int i = 0; i < count; i += W) store<W>(z + i, load<W>(z + i) * load<W>(slope + i));
    empty_out<W>(z, count, out + begin, past_caches);
  }
  if (past_caches) end_streams();
}

// The same of the forward KL from exponentials that the statistics kept, one for each block.
template <typename T, int W>
CLINKD_INLINE void row_gradient_of(const KDArgs& a, int64_t row, const Exponentials* kept) {
  using F = Floats<W>;
  alignas(64) float grad[kBlock];
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride;
  const int64_t label = a.labels[row];
  if (label == a.ignore_index) {
    std::fill(out, out + a.student_columns, T{});
    return;
  }
  const float* s = a.statistics + row * kStatistics;
  const int64_t at = row * a.factor_stride;
  const float ce = a.ce_factor[at], kd = a.kd_factor[at] * a.temperature;
  const float scale = kLog2E / a.temperature;
  const int power = power_of(a);
  const bool past_caches = a.grad != a.student && can_stream(out, a.rows * a.grad_stride);
  for (int64_t begin = 0; begin < a.student_columns; begin += kBlock, ++kept) {
    const int count = int(std::min<int64_t>(kBlock, a.student_columns - begin));
    // a block of -inf alone has no top, and nothing but zeros
    const float q_keep = std::exp2((kept->student_top - s[kSoftTop]) * scale);
    const float p_keep = std::exp2((kept->teacher_top - s[kTargetTop]) * scale);
    const float hard_keep = std::exp2((kept->student_top - s[kTop]) * kLog2E);
    const float hard = ce * s[kInverse] * (power == 0 ? hard_keep : 1.0f);
    const float soft = kd * s[kSoftInverse] * q_keep, target = kd * s[kTargetInverse] * p_keep;
    for (int i = 0; i < count; i += W) {
      const F q = load<W>(kept->student + i), p = load<W>(kept->teacher + i);
      F from_labels;
      if (power == 0)
        from_labels = load<W>(kept->hard + i) * hard;
      else if (power == 1)
        from_labels = q * (hard * q_keep);
      else
        from_labels = q * q * (hard * q_keep * q_keep);
      store<W>(grad + i, from_labels + (q * soft - p * target));
    }
    if (label >= begin && label < begin + count) grad[label - begin] -= ce;
    empty_out<W>(grad, count, out + begin, past_caches);
  }
  if (past_caches) end_streams();
}

}  // namespace clinkd
