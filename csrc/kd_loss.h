// Cross-entropy and distillation over given logits: arguments of the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "floats.h"

namespace clinkd {

enum KDDivergence { kForwardKL = 0, kReverseKL = 1, kJSD = 2, kSkewKL = 3 };

// What the statistics pass leaves of a row for the gradient pass: of the student at temperature 1
// (over its whole vocabulary), of the student and of the teacher at T (over the common columns)
// the largest logit and one over the sum of exponentials relative to it; then the sum over the
// vocabulary of q times the divergence's derivative by q, see `kd_loss_cpu.cpp`.
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
  void* grad;               // may be `student`
  int64_t grad_stride;
};

void kd_statistics_cpu(const KDArgs& args, int threads);
// Of rows whose statistics are given: the divergence into `kd`, without T^2, and the mean for
// kMean into `ce`. Each adds up over parts of the columns.
void kd_divergence_cpu(const KDArgs& args, int threads);
void kd_gradient_cpu(const KDArgs& args, int threads);
int kd_statistics_cuda(const KDArgs& args, void* stream);  // 0, or a CUDA error
int kd_divergence_cuda(const KDArgs& args, void* stream);
int kd_gradient_cuda(const KDArgs& args, void* stream);

}  // namespace clinkd
