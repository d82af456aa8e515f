// Cross-entropy and distillation over given logits on the CPU.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kd_divergence_cpu.h"
#include "kd_gradient_cpu.h"
#include "kd_loss.h"
#include "logit_rows.h"
#include "widest.h"

namespace clinkd {
namespace {

// One block of both models into the sums. POWER: T, where it is 1 or 2 and the vocabularies agree.
// `kept`: where the exponentials at T stay, or nullptr. `next_z`, `next_t`: logits of the blocks to
// come, fetched meanwhile; the processor's own prefetch ends with a page, as a block does.
template <int POWER, int W, typename T>
CLINKD_INLINE void add_block(const float* z, const float* t, int count, float scale, bool reverse,
                             const Sum& student, const Sum& soft, const Sum& target, double* sums,
                             Exponentials* kept, const T* next_z, const T* next_t) {
  using F = Floats<W>;
  F s_sum = zero<W>(), q_sum = zero<W>(), p_sum = zero<W>(), weighted = zero<W>();
  const float s_top = student.level(), q_top = soft.level(), p_top = target.level();
  for (int i = 0; i < count; i += W) {
    __builtin_prefetch(next_z + i);
    __builtin_prefetch(next_t + i);
    const F x = load<W>(z + i), y = load<W>(t + i);
    const F q_log = (x - q_top) * scale, p_log = (y - p_top) * scale;
    const F q = exp2<W>(q_log), p = exp2<W>(p_log);
    if (kept != nullptr) {
      store<W>(kept->student + i, q);
      store<W>(kept->teacher + i, p);
    }
    if constexpr (POWER > 0) {
      s_sum += raised<POWER>(q);
    } else {
      const F hard = exp2<W>((x - s_top) * kLog2E);
      if (kept != nullptr) store<W>(kept->hard + i, hard);
      s_sum += hard;
    }
    q_sum += q;
    p_sum += p;
    if (reverse)
      weighted += q > 0.0f ? q * (q_log - p_log) : zero<W>();
    else
      weighted += p > 0.0f ? p * (p_log - q_log) : zero<W>();
  }
  sums[0] = sum<W>(s_sum), sums[1] = sum<W>(q_sum), sums[2] = sum<W>(p_sum);
  sums[3] = sum<W>(weighted);
}

// A function of its own: inlined into every statistics pass it took 2/5 of the compile time.
template <typename T>
struct Divergence {
  template <int W>
  static CLINKD_INLINE void run(const KDArgs& a, int64_t row, const float* s, double* value,
                                double* mean) {
    row_divergence<T, W>(a, row, s, *value, *mean);
  }
};

void divergence_of_row(const KDArgs& a, int64_t row, const float* s, double* value, double* mean) {
  widest_of<Divergence, const KDArgs&, int64_t, const float*, double*, double*>(a.type)(
      a, row, s, value, mean);
}

// `kept`: a place for each block of columns, where the vocabularies agree; or nullptr.
template <typename T, int POWER, int W>
CLINKD_INLINE void row_statistics(const KDArgs& a, int64_t row, Exponentials* kept) {
  using F = Floats<W>;
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
    const float top = fill<W>(student + begin, count, a.softcap, z);
    if (label >= begin && label < begin + count) picked = z[label - begin];
    if (begin < common) {
      const int shared = int(std::min<int64_t>(count, common - begin));
      const float before = soft.level() - target.level();
      const double owned = reverse ? soft.total : target.total;
      const float t_top = fill<W>(teacher + begin, shared, a.softcap, t);
      const float q_top = shared == count ? top : fill<W>(student + begin, shared, a.softcap, z);
      const double q_keep = soft.raise(q_top, scale);
      const double p_keep = target.raise(t_top, scale);
      const double moved = (soft.level() - target.level() - before) * double(scale);
      weighted = reverse ? (weighted - owned * moved) * q_keep
                         : (weighted + owned * moved) * p_keep;
      double sums[4];
      const int padded = (shared + W - 1) / W * W;
      const T *next_z = student + begin + kBlock, *next_t = teacher + begin + kBlock;
      if (POWER > 0 || shared == count) {
        all.raise(top, kLog2E);
        add_block<POWER, W>(z, t, padded, scale, reverse, all, soft, target, sums, kept, next_z,
                            next_t);
        if (kept != nullptr) kept->student_top = soft.top, kept++->teacher_top = target.top;
        all.total += sums[0];
      } else {  // the border of the common columns
        add_block<0, W>(z, t, padded, scale, reverse, soft, soft, target, sums, nullptr, next_z,
                        next_t);
      }
      soft.total += sums[1];
      target.total += sums[2];
      weighted += sums[3];
      if (POWER > 0 || shared == count) continue;
      fill<W>(student + begin, count, a.softcap, z);
    }
    all.raise(top, kLog2E);
    F total = zero<W>();
    for (int i = 0; i < count; i += W)
      total += exp2<W>((load<W>(z + i) - all.level()) * kLog2E);
    all.total += sum<W>(total);
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

template <typename T>
struct Statistics {
  template <int W>
  static CLINKD_INLINE void run(const KDArgs& a, int64_t row, Exponentials* kept) {
    const int power = power_of(a);
    if (power == 1) return row_statistics<T, 1, W>(a, row, kept);
    if (power == 2) return row_statistics<T, 2, W>(a, row, kept);
    row_statistics<T, 0, W>(a, row, kept);
  }
};

template <typename T>
struct Gradient {
  template <int W>
  static CLINKD_INLINE void run(const KDArgs& a, int64_t row, const Exponentials* kept) {
    if (kept != nullptr) return row_gradient_of<T, W>(a, row, kept);
    const int power = power_of(a);
    if (power == 1) return row_gradient<T, 1, W>(a, row);
    if (power == 2) return row_gradient<T, 2, W>(a, row);
    row_gradient<T, 0, W>(a, row);
  }
};

auto statistics_of(int type) {
  return widest_of<Statistics, const KDArgs&, int64_t, Exponentials*>(type);
}
auto gradient_of(int type) {
  return widest_of<Gradient, const KDArgs&, int64_t, const Exponentials*>(type);
}

}  // namespace

void kd_statistics_cpu(const KDArgs& args, int threads) {
  const auto run = statistics_of(args.type);
  over_rows(args, args.student_columns, threads,
            [=](const KDArgs& a, int64_t row) { run(a, row, nullptr); });
}

void kd_divergence_cpu(const KDArgs& args, int threads) {
  over_rows(args, args.student_columns, threads, given_divergence);
}

void kd_gradient_cpu(const KDArgs& args, int threads) {
  const auto run = gradient_of(args.type);
  over_rows(args, args.student_columns, threads,
            [=](const KDArgs& a, int64_t row) { run(a, row, nullptr); });
}

void kd_at_once_cpu(const KDArgs& args, int threads) {
  const auto statistics = statistics_of(args.type);
  const auto gradient = gradient_of(args.type);
  const bool keep = args.divergence == kForwardKL && args.softcap == 0 &&
                    args.student_columns == args.teacher_columns;
  over_rows(args, args.student_columns, threads, [=](const KDArgs& a, int64_t row) {
    thread_local std::vector<Exponentials> place;  // as large as a row of both models in float32
    if (keep) place.resize((a.student_columns + kBlock - 1) / kBlock);
    Exponentials* kept = keep ? place.data() : nullptr;
    statistics(a, row, kept);
    gradient(a, row, kept);
  });
}

}  // namespace clinkd
