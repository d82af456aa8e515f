// The student's part of the top-k distillation loss on the CPU.
//
// With m the tail's largest logit, S = sum exp(z - m) and S_T = sum exp((z - m) / T) over the tail,
// its log-sum-exps are m + log S and m / T + log S_T, with gradients exp(z - m) / S and
// exp((z - m) / T) / (T S_T).

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "logit_rows.h"
#include "topk_kd.h"
#include "widest.h"

namespace clinkd {
namespace {

// Calls `take(i)` for the teacher's columns in [begin, end), i their places in ids, which ascend.
template <typename Take>
CLINKD_INLINE void over_ids(const int32_t* ids, int64_t k, int64_t& next, int64_t end, Take take) {
  for (; next < k && ids[next] < end; ++next) take(next);
}

template <typename T, int W>
CLINKD_INLINE void row_tails(const TopKArgs& a, int64_t row) {
  using F = Floats<W>;
  alignas(64) float z[kBlock];
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const int32_t* ids = a.ids + row * a.k;
  const float scale = kLog2E / a.temperature;
  Sum hard, soft;  // with one maximum
  int64_t next = 0;
  const bool ignored = a.labels[row] == a.ignore_index;
  for (int64_t begin = 0; begin < a.columns && !ignored; begin += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, a.columns - begin));
    const int padded = (count + W - 1) / W * W;
    float top = fill<W>(student + begin, count, a.softcap, z);
    const int64_t before = next;
    over_ids(ids, a.k, next, begin + count, [&](int64_t i) { z[ids[i] - begin] = -kInfinity; });
    if (next != before) {
      F most = load<W>(z);
      for (int i = W; i < padded; i += W) most = load<W>(z + i) > most ? load<W>(z + i) : most;
      top = largest<W>(most);
    }
    hard.raise(top, kLog2E);
    soft.raise(top, scale);
    const float level = hard.level();
    F hards = zero<W>(), softs = zero<W>();
    for (int i = 0; i < padded; i += W) {
      const F above = load<W>(z + i) - level;
      hards += exp2<W>(above * kLog2E);
      softs += exp2<W>(above * scale);
    }
    hard.total += sum<W>(hards);
    soft.total += sum<W>(softs);
  }
  float* found = a.statistics + row * kTailStatistics;
  found[kTailTop] = hard.top;
  found[kTailInverse] = hard.total == 0 ? 1.0f : float(1.0 / hard.total);  // a NaN is not 0
  found[kTailSoftInverse] = soft.total == 0 ? 1.0f : float(1.0 / soft.total);
}

template <typename T, int W>
CLINKD_INLINE void row_gradient(const TopKArgs& a, int64_t row) {
  using F = Floats<W>;
  alignas(64) float z[kBlock], grad[kBlock];
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride;
  const int64_t label = a.labels[row];
  if (label == a.ignore_index) {
    std::fill(out, out + a.columns, T{});
    return;
  }
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const int32_t* ids = a.ids + row * a.k;
  const float* s = a.statistics + row * kTailStatistics;
  const float scale = kLog2E / a.temperature;
  const float level = s[kTailTop] == -kInfinity ? 0.0f : s[kTailTop];
  const float hard = a.tail_factor[row] * s[kTailInverse];
  const float soft = a.soft_factor[row] / a.temperature * s[kTailSoftInverse];
  const bool past_caches = a.grad != a.student && can_stream(out, a.rows * a.grad_stride);
  int64_t next = 0;
  for (int64_t begin = 0; begin < a.columns; begin += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, a.columns - begin));
    fill<W>(student + begin, count, a.softcap, z);
    for (int i = 0; i < count; i += W) {
      const F above = load<W>(z + i) - level;
      store<W>(grad + i, hard * exp2<W>(above * kLog2E) + soft * exp2<W>(above * scale));
    }
    over_ids(ids, a.k, next, begin + count,
             [&](int64_t i) { grad[ids[i] - begin] = a.top_factor[row * a.k + i]; });
    if (label >= begin && label < begin + count) grad[label - begin] += a.picked_factor[row];
    if (a.softcap > 0)
      for (int i = 0; i < count; i += W) {
        const F x = load<W>(z + i) * (1.0f / a.softcap);
        store<W>(grad + i, load<W>(grad + i) * (1.0f - x * x));
      }
    empty_out<W>(grad, count, out + begin, past_caches);
  }
  if (past_caches) end_streams();
}

template <typename T>
struct Tails {
  template <int W>
  static CLINKD_INLINE void run(const TopKArgs& a, int64_t row) {
    row_tails<T, W>(a, row);
  }
};

template <typename T>
struct Gradient {
  template <int W>
  static CLINKD_INLINE void run(const TopKArgs& a, int64_t row) {
    row_gradient<T, W>(a, row);
  }
};

}  // namespace

void topk_tails_cpu(const TopKArgs& args, int threads) {
  over_rows(args, args.columns, threads, widest_of<Tails, const TopKArgs&, int64_t>(args.type));
}

void topk_gradient_cpu(const TopKArgs& args, int threads) {
  over_rows(args, args.columns, threads, widest_of<Gradient, const TopKArgs&, int64_t>(args.type));
}

}  // namespace clinkd
