// The divergence of a row whose sums are known, on the CPU: a walk of its own, in which no term is
// below 0, so that nothing cancels however close the two distributions are.
//
// KL(p || m) = sum p g(m / p - 1) with g(u) = u - log(1 + u), for sum (m - p) = 0. With
// r = log(p / q) and m = (1 - B) p + B q, m / p - 1 is B expm1(-r).
#pragma once

#include "kd_loss.h"
#include "logit_rows.h"

namespace clinkd {

// p g(B (q / p - 1)). `up`: p / q - 1, right where p and q are `near`.
template <int W, typename F = Floats<W>>
CLINKD_INLINE F kl_terms(F p, F q, F log_ratio, F up, typename Vector<W>::ints near, float B) {
  const F u = B * -up / (1.0f + up);
  const F s = u / (2.0f + u), z = s * s;  // log(1 + u) = 2 atanh(s)
  const F series = 1.0f / 3.0f + z * (1.0f / 5.0f + z * (1.0f / 7.0f + z * (1.0f / 9.0f)));
  const F close = p * (u * s - 2.0f * s * z * series);
  const F m = (1.0f - B) * p + B * q;
  F logs = log_ratio;
  if (B < 1.0f) {
    const F least = zero<W>() + kLeast;
    logs = (log2<W>(p > least ? p : least) - log2<W>(m > least ? m : least)) * kLn2;
  }
  return near ? close : p > 0.0f ? p * logs - p + m : m;
}

// The divergence over the columns that both models have, and the mean that its gradient subtracts,
// from the statistics of the whole row.
template <typename T, int W>
CLINKD_INLINE void row_divergence(const KDArgs& a, int64_t row, const float* s, double& value,
                                  double& mean) {
  using F = Floats<W>;
  alignas(64) float z[kBlock], t[kBlock];
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  const int64_t common = std::min(a.student_columns, a.teacher_columns);
  const float scale = kLog2E / a.temperature;
  const float tops = s[kTargetTop] - s[kSoftTop];
  const float sums = float(std::log(double(s[kTargetInverse]) / double(s[kSoftInverse])));
  const bool teacher_first = a.divergence != kReverseKL;  // KL(p || m)
  const bool student_first = a.divergence == kReverseKL || a.divergence == kJSD;  // KL(q || m)
  const float B = a.divergence == kForwardKL ? 1.0f : 1.0f - a.mix;
  const float D = a.divergence == kReverseKL ? 1.0f : a.mix;
  double first = 0.0, second = 0.0;
  for (int64_t begin = 0; begin < common; begin += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, common - begin));
    fill<W>(student + begin, count, a.softcap, z);
    fill<W>(teacher + begin, count, a.softcap, t);
    F firsts = zero<W>(), seconds = zero<W>();
    for (int i = 0; i < count; i += W) {
      const F x = load<W>(z + i), y = load<W>(t + i);
      const F q = exp2<W>((x - s[kSoftTop]) * scale) * s[kSoftInverse];
      const F p = exp2<W>((y - s[kTargetTop]) * scale) * s[kTargetInverse];
      const F r = ((y - x) - tops) * (1.0f / a.temperature) + sums;
      const typename Vector<W>::ints near = (r < 0.25f) & (r > -0.25f);
      F up = 1.0f + r * (1.0f / 7.0f);  // expm1(r) by its series
      for (int n = 6; n > 1; --n) up = 1.0f + r * up * (1.0f / float(n));
      up *= r;
      if (teacher_first) firsts += kl_terms<W>(p, q, r, up, near, B);
      if (student_first) seconds += kl_terms<W>(q, p, -r, -up / (1.0f + up), near, D);
      if (a.divergence == kSkewKL) {
        const F m = a.mix * p + (1.0f - a.mix) * q;
        seconds += m > kLeast ? q * p / m : zero<W>();
      }
    }
    first += sum<W>(firsts);
    second += sum<W>(seconds);
  }
  if (a.divergence == kJSD) {
    value = a.mix * first + (1.0 - a.mix) * second;
    mean = (1.0 - a.mix) * second;
  } else if (a.divergence == kSkewKL) {
    value = first;
    mean = -(1.0 - a.mix) * second;
  } else {
    value = mean = teacher_first ? first : second;
  }
}

}  // namespace clinkd
