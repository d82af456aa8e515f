// Cross-entropy and distillation over given logits on the CPU.
//
// With p the teacher's, q the student's distribution at temperature T over the columns that both
// have, and D the divergence, the gradient of T^2 D by the student's logits is T q (g - sum q g),
// g = dD/dq:
//
//   forward KL  g = -p / q, so T (q - p)      reverse KL  g = log(q / p)
//   JSD         g = (1 - beta) log(q / m)     skew KL     g = -(1 - skew) p / m

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kd_divergence_cpu.h"
#include "kd_loss.h"
#include "logit_rows.h"

namespace clinkd {
namespace {

// Powers of e at T = 1 from those at T, where T is a small integer.
template <int POWER>
CLINKD_INLINE F raised(F soft) {
  static_assert(POWER == 1 || POWER == 2);
  if constexpr (POWER == 1) return soft;
  return soft * soft;
}

// One block of both models into the sums. POWER: T, where it is 1 or 2 and the vocabularies agree.
template <int POWER>
CLINKD_INLINE void add_block(const float* z, const float* t, int count, float scale, bool reverse,
                             const Sum& student, const Sum& soft, const Sum& target,
                             double* sums) {
  F s_sum = zero(), q_sum = zero(), p_sum = zero(), weighted = zero();
  const float s_top = student.level(), q_top = soft.level(), p_top = target.level();
  for (int i = 0; i < count; i += W) {
    const F x = load<W>(z + i), y = load<W>(t + i);
    const F q_log = (x - q_top) * scale, p_log = (y - p_top) * scale;
    const F q = exp2<W>(q_log), p = exp2<W>(p_log);
    if constexpr (POWER > 0)
      s_sum += raised<POWER>(q);
    else
      s_sum += exp2<W>((x - s_top) * kLog2E);
    q_sum += q;
    p_sum += p;
    if (reverse)
      weighted += q > 0.0f ? q * (q_log - p_log) : zero();
    else
      weighted += p > 0.0f ? p * (p_log - q_log) : zero();
  }
  sums[0] = sum(s_sum), sums[1] = sum(q_sum), sums[2] = sum(p_sum), sums[3] = sum(weighted);
}

// Functions of their own: inlined into every statistics pass they took 2/5 of the compile time.
CLINKD_CLONES void divergence_float32(const KDArgs& a, int64_t row, const float* s, double* value,
                                      double* mean) {
  row_divergence<float>(a, row, s, *value, *mean);
}
CLINKD_CLONES void divergence_float16(const KDArgs& a, int64_t row, const float* s, double* value,
                                      double* mean) {
  row_divergence<Float16>(a, row, s, *value, *mean);
}
CLINKD_CLONES void divergence_bfloat16(const KDArgs& a, int64_t row, const float* s, double* value,
                                       double* mean) {
  row_divergence<BFloat16>(a, row, s, *value, *mean);
}

void divergence_of_row(const KDArgs& a, int64_t row, const float* s, double* value, double* mean) {
  if (a.type == kFloat32) return divergence_float32(a, row, s, value, mean);
  if (a.type == kFloat16) return divergence_float16(a, row, s, value, mean);
  divergence_bfloat16(a, row, s, value, mean);
}

template <typename T, int POWER>
CLINKD_INLINE void row_statistics(const KDArgs& a, int64_t row) {
  alignas(64) float z[kBlock], t[kBlock];
  float* found = a.statistics + row * kStatistics;
  const int64_t label = a.labels[row];
  if (label == a.ignore_index) {
    a.ce[row] = a.kd[row] = 0.0f;
    std::fill(found, found + kStatistics, 0.0f);
    return;
  }
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  const int64_t common = std::min(a.student_columns, a.teacher_columns);
  const float scale = kLog2E / a.temperature;
  const bool reverse = a.divergence == kReverseKL;
  Sum all, soft, target;
  double weighted = 0.0;  // of scores relative to both maxima, in powers of two
  float picked = kNaN;
  for (int64_t begin = 0; begin < a.student_columns; begin += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, a.student_columns - begin));
    const float top = fill(student + begin, count, a.softcap, z);
    if (label >= begin && label < begin + count) picked = z[label - begin];
    if (begin < common) {
      const int shared = int(std::min<int64_t>(count, common - begin));
      const float before = soft.level() - target.level();
      const double owned = reverse ? soft.total : target.total;
      const float t_top = fill(teacher + begin, shared, a.softcap, t);
      const float q_top = shared == count ? top : fill(student + begin, shared, a.softcap, z);
      const double q_keep = soft.raise(q_top, scale);
      const double p_keep = target.raise(t_top, scale);
      const double moved = (soft.level() - target.level() - before) * double(scale);
      weighted = reverse ? (weighted - owned * moved) * q_keep
                         : (weighted + owned * moved) * p_keep;
      double sums[4];
      const int padded = (shared + W - 1) / W * W;
      if (POWER > 0 || shared == count) {
        all.raise(top, kLog2E);
        add_block<POWER>(z, t, padded, scale, reverse, all, soft, target, sums);
        all.total += sums[0];
      } else {  // the border of the common columns
        add_block<0>(z, t, padded, scale, reverse, soft, soft, target, sums);
      }
      soft.total += sums[1];
      target.total += sums[2];
      weighted += sums[3];
      if (POWER > 0 || shared == count) continue;
      fill(student + begin, count, a.softcap, z);
    }
    all.raise(top, kLog2E);
    F total = zero();
    for (int i = 0; i < count; i += W)
      total += exp2<W>((load<W>(z + i) - all.level()) * kLog2E);
    all.total += sum(total);
  }
  const double owner = reverse ? soft.total : target.total;
  const double ratio = reverse ? target.log() - soft.log() : soft.log() - target.log();
  const double kl = weighted / owner * double(kLn2) + ratio;
  const bool right = label >= 0 && label < a.student_columns;
  a.ce[row] = right ? float(double(all.top) - double(picked) + all.log()) : kNaN;
  found[kTop] = all.top;
  found[kInverse] = right ? all.inverse() : kNaN;
  found[kSoftTop] = soft.top;
  found[kSoftInverse] = soft.inverse();
  found[kTargetTop] = target.top;
  found[kTargetInverse] = target.inverse();
  double value = kl, mean = kl;
  // mixtures need both distributions first; a small difference of large sums is no figure
  if (a.divergence >= kJSD || kl < kSmallKL) divergence_of_row(a, row, found, &value, &mean);
  a.kd[row] = float(double(a.temperature) * a.temperature * value);
  found[kMean] = float(mean);
}

void given_divergence(const KDArgs& a, int64_t row) {
  double value = 0.0, mean = 0.0;
  if (a.labels[row] != a.ignore_index)
    divergence_of_row(a, row, a.statistics + row * kStatistics, &value, &mean);
  a.kd[row] = float(value);
  a.ce[row] = float(mean);
}

// Gradient of one block, in place of its logits.
template <int POWER>
CLINKD_INLINE void block_gradient(const KDArgs& a, const float* s, float ce, float kd, float* z,
                                  const float* t, int count, int shared) {
  const float scale = kLog2E / a.temperature;
  const float q_log_inverse = std::log2(s[kSoftInverse]);
  const float p_log_inverse = std::log2(s[kTargetInverse]);
  for (int i = 0; i < count; i += W) {
    const F x = load<W>(z + i);
    F grad = zero();
    F q = zero();
    F q_log = zero();
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
        pull = q > 0.0f ? q * (ratio - s[kMean]) : zero();
      } else {
        const F m = a.mix * p + (1.0f - a.mix) * q;
        const F least = zero() + kLeast;
        const F safe = m > least ? m : least;
        F g;
        if (a.divergence == kJSD)
          g = (1.0f - a.mix) * kLn2 * (log2<W>(q > least ? q : least) - log2<W>(safe));
        else
          g = -(1.0f - a.mix) * p / safe;
        pull = q > least ? q * (g - s[kMean]) : zero();
      }
      if (i + W > shared)  // past the border of the common columns
        for (int j = shared - i; j < W; ++j) pull[j] = 0.0f;
      grad += kd * pull;
    }
    store<W>(z + i, grad);
  }
}

template <typename T, int POWER>
CLINKD_INLINE void row_gradient(const KDArgs& a, int64_t row) {
  alignas(64) float z[kBlock], t[kBlock], slope[kBlock];
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride;
  const int64_t label = a.labels[row];
  if (label == a.ignore_index) {
    std::fill(out, out + a.student_columns, T{});
    return;
  }
  const float* s = a.statistics + row * kStatistics;
  const float ce = a.ce_factor[row], kd = a.kd_factor[row] * a.temperature;
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  const int64_t common = std::min(a.student_columns, a.teacher_columns);
  for (int64_t begin = 0; begin < a.student_columns; begin += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, a.student_columns - begin));
    const int shared = int(std::clamp<int64_t>(common - begin, 0, count));
    fill(student + begin, count, a.softcap, z);
    if (a.softcap > 0)
      for (int i = 0; i < count; i += W) {
        const F x = load<W>(z + i) * (1.0f / a.softcap);
        store<W>(slope + i, 1.0f - x * x);
      }
    if (shared > 0) fill(teacher + begin, shared, a.softcap, t);
    block_gradient<POWER>(a, s, ce, kd, z, t, count, shared);
    if (label >= begin && label < begin + count) z[label - begin] -= ce;
    if (a.softcap > 0)
      for (int i = 0; i < count; i += W) store<W>(z + i, load<W>(z + i) * load<W>(slope + i));
    empty_out(z, count, out + begin);
  }
}

template <typename T>
CLINKD_INLINE void any_statistics(const KDArgs& a, int64_t row) {
  const bool same = a.student_columns == a.teacher_columns;
  if (same && a.temperature == 1.0f) return row_statistics<T, 1>(a, row);
  if (same && a.temperature == 2.0f) return row_statistics<T, 2>(a, row);
  row_statistics<T, 0>(a, row);
}
template <typename T>
CLINKD_INLINE void any_gradient(const KDArgs& a, int64_t row) {
  const bool same = a.student_columns == a.teacher_columns;
  if (same && a.temperature == 1.0f) return row_gradient<T, 1>(a, row);
  if (same && a.temperature == 2.0f) return row_gradient<T, 2>(a, row);
  row_gradient<T, 0>(a, row);
}

CLINKD_CLONES void statistics_float32(const KDArgs& a, int64_t row) {
  any_statistics<float>(a, row);
}
CLINKD_CLONES void statistics_float16(const KDArgs& a, int64_t row) {
  any_statistics<Float16>(a, row);
}
CLINKD_CLONES void statistics_bfloat16(const KDArgs& a, int64_t row) {
  any_statistics<BFloat16>(a, row);
}
CLINKD_CLONES void gradient_float32(const KDArgs& a, int64_t row) {
  any_gradient<float>(a, row);
}
CLINKD_CLONES void gradient_float16(const KDArgs& a, int64_t row) {
  any_gradient<Float16>(a, row);
}
CLINKD_CLONES void gradient_bfloat16(const KDArgs& a, int64_t row) {
  any_gradient<BFloat16>(a, row);
}

}  // namespace

void kd_statistics_cpu(const KDArgs& args, int threads) {
  over_rows(args, threads, args.type == kFloat32   ? statistics_float32
                           : args.type == kFloat16 ? statistics_float16
                                                   : statistics_bfloat16);
}

void kd_divergence_cpu(const KDArgs& args, int threads) {
  over_rows(args, threads, given_divergence);
}

void kd_gradient_cpu(const KDArgs& args, int threads) {
  if (args.grad != args.student) {
    const int64_t size = args.type == kFloat32 ? 4 : 2;
    ask_for_large_pages(args.grad, args.rows * args.grad_stride * size);
  }
  over_rows(args, threads, args.type == kFloat32   ? gradient_float32
                           : args.type == kFloat16 ? gradient_float16
                                                   : gradient_bfloat16);
}

}  // namespace clinkd
