// Cross-entropy and distillation over given logits on a GPU: a block of threads for each row. One
// walk over student and teacher for all sums (a second for mixtures, which need them first), one
// that writes the gradient.
#pragma once

#include <cstdint>

#include "kd_divergence.cuh"
#include "kd_loss_row.cuh"

namespace clinkd {

// Grid: one block a row.
template <typename T, int V, int KIND>
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
  const bool reverse = a.divergence == kReverseKL;
  KDSums sums = add_row<T, V, KIND>(a, student, teacher, a.student_columns, common_columns(a));
  sums = reduce_sums(sums, shared, kLog2E / a.temperature, reverse);
  if (threadIdx.x == 0) {
    const bool right = label >= 0 && label < a.student_columns;
    const float picked = right ? capped(to_float(student[label]), a.softcap) : float_nan();
    a.ce[row] = cross_entropy(sums, picked);
    row_statistics(sums, right, reverse, s);
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

// Grid: one block a row. `grad` may be `student`: a thread reads its logits before it writes. Memory is
// what it waits for, so it wants many threads (three blocks, 40 registers) where the work leaves room
// for them; 0: as the compiler likes.
template <typename T, int V, int KIND>
__global__ void __launch_bounds__(kKDThreads, V == 1 || KIND != kAnyLoss ? 3 : 0)
    kd_gradient_kernel(const KDArgs a) {
  const int64_t row = blockIdx.x;
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride;
  const int64_t label = a.labels[row];
  if (label == a.ignore_index) {
    write_zeros<T, V>(out, a.student_columns);
    return;
  }
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  const int64_t columns = a.student_columns, common = common_columns(a);
  float s[kStatistics];
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) s[i] = a.statistics[row * kStatistics + i];
  write_gradient<T, V, KIND>(a, row, s, student, teacher, columns, common, label, out);
}

}  // namespace clinkd
