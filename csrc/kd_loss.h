// Cross-entropy and distillation over given logits: arguments of the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "floats.h"

namespace clinkd {

enum KDDivergence { kForwardKL = 0, kReverseKL = 1, kJSD = 2, kSkewKL = 3 };

// What the statistics pass leaves of a row for the gradient pass: of the student at temperature 1
// (over its whole vocabulary), of the student and of the teacher at T (over the common columns)
// a level, the largest logit or one not far below it, and one over the sum of exponentials relative to
// that level; then the sum over the vocabulary of q times the divergence's derivative by q, see
// `kd_loss_cpu.cpp`.
enum KDStatistic {
  kTop,
  kInverse,
  kSoftTop,
  kSoftInverse,
  kTargetTop,
  kTargetInverse,
  kMean,
  kStatistics
};

// A KL below this is computed again from terms that do not cancel.
constexpr float kSmallKL = 0.02f;

// On sm_90 a cluster of this many blocks holds a row of both models in shared memory, each its share:
// 76 KB at 151,936 columns of 16 bits, so that two rows are at work on each multiprocessor. More
// blocks than 8 not every sm_90 need start.
constexpr int kKDCluster = 8;
// Of the 227 KB that a block may have; the kernel's own variables and the system's take the rest.
constexpr int64_t kKDClusterBytes = 224 << 10;

// Columns of a block of the cluster, whole packs of 16 bytes; `size`: bytes of an element.
CLINKD_HOST_DEVICE int64_t kd_cluster_columns(int64_t columns, int64_t size) {
  const int64_t packs = (columns * size + 15) / 16;
  return (packs + kKDCluster - 1) / kKDCluster * 16 / size;
}
// Bytes of shared memory of such a block.
inline int64_t kd_cluster_bytes(int64_t columns, int64_t size) {
  return 2 * kd_cluster_columns(columns, size) * size;
}

// Rows lie `*_stride` elements apart, columns side by side. Labels other than `ignore_index` must
// be in [0, student_columns); a row whose label is not, or whose logits have no finite maximum,
// gives NaN.
struct KDArgs {
  const void* student;
  const void* teacher;
  const int64_t* labels;
  int64_t rows;
  int64_t student_columns;
  int64_t teacher_columns;
  int64_t student_stride;
  int64_t teacher_stride;
  int64_t ignore_index;
  float temperature;
  float mix;      // JSD's beta, skew KL's skew
  float softcap;  // 0: none
  int divergence;
  int type;     // FloatType of both logits and of the gradient
  float* ce;    // [rows], out of the statistics pass
  float* kd;    // [rows], likewise
  float* statistics;        // [rows, kStatistics], likewise
  const float* ce_factor;   // [rows], what the gradient pass multiplies CE's gradient by
  const float* kd_factor;   // [rows]
  int64_t factor_stride;    // of both; 0: one number for all rows
  void* grad;               // may be `student`
  int64_t grad_stride;
};

// Whether every row of all three tensors begins on 16 bytes; `size`: bytes of an element.
inline bool kd_whole_packs(const KDArgs& a, int64_t size) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(a.student) |
                           reinterpret_cast<uintptr_t>(a.teacher) |
                           reinterpret_cast<uintptr_t>(a.grad);
  const int64_t strides = a.student_stride | a.teacher_stride | a.grad_stride;
  return (places | static_cast<uintptr_t>(strides * size)) % 16 == 0;
}

void kd_statistics_cpu(const KDArgs& args, int threads);
// Of rows whose statistics are given: the divergence into `kd`, without T^2, and the mean for
// kMean into `ce`. Each adds up over parts of the columns.
void kd_divergence_cpu(const KDArgs& args, int threads);
void kd_gradient_cpu(const KDArgs& args, int threads);
// Statistics and gradient, a row at a time, so that its logits are still in a cache.
void kd_at_once_cpu(const KDArgs& args, int threads);
int kd_statistics_cuda(const KDArgs& args, void* stream);  // 0, or a CUDA error
int kd_divergence_cuda(const KDArgs& args, void* stream);
int kd_gradient_cuda(const KDArgs& args, void* stream);
// `ce`, `kd` and `grad` in one read of the logits, `statistics` not used. For sm_90, rows that begin
// on 16 bytes, and at most kKDClusterBytes of them in a block: else an error.
int kd_cluster_cuda(const KDArgs& args, void* stream);
// `grad`, whose rows lie side by side, times the number at `ce_factor`; where that is 1, nothing is
// read or written.
int kd_scale_cuda(const KDArgs& args, void* stream);

}  // namespace clinkd
