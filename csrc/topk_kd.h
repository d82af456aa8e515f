// What the distillation loss from a teacher's top logits needs of the student outside those
// columns: arguments of the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

namespace clinkd {

// Of the columns outside `ids` (the tail): the largest logit, one over the sum of exponentials
// relative to it at temperature 1, and at T. An empty tail has -inf, 1, 1.
enum TailStatistic { kTailTop, kTailInverse, kTailSoftInverse, kTailStatistics };

// Rows of logits lie `*_stride` elements apart, columns side by side. A row whose label is
// `ignore_index` gets statistics of an empty tail and a gradient of zero.
struct TopKArgs {
  const void* student;
  const int32_t* ids;  // [rows, k] ascending, distinct; `columns` or more: no column
  const int64_t* labels;
  int64_t rows;
  int64_t columns;
  int64_t k;
  int64_t student_stride;
  int64_t grad_stride;
  int64_t ignore_index;
  float temperature;
  float softcap;  // 0: none
  int type;       // of the logits and of the gradient
  float* statistics;           // [rows, kTailStatistics], out of the first pass
  const float* top_factor;     // [rows, k] the loss's derivative by the logits of `ids`,
  const float* tail_factor;    // [rows] by the tail's log-sum-exp,
  const float* soft_factor;    // [rows] by that of logits / T,
  const float* picked_factor;  // [rows] and by the label's logit
  void* grad;                  // may be `student`
};

void topk_tails_cpu(const TopKArgs& args, int threads);
void topk_gradient_cpu(const TopKArgs& args, int threads);
int topk_tails_cuda(const TopKArgs& args, void* stream);  // 0, or a CUDA error
int topk_gradient_cuda(const TopKArgs& args, void* stream);

}  // namespace clinkd
