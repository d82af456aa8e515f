// Cross-entropy, distillation and their gradient in one read of the logits, on sm_90: a cluster of
// blocks holds a row of both models in its shared memory. Each block sums up its share and tells all
// others, all merge the shares in the same order, and each writes the gradient of its share.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "kd_divergence.cuh"
#include "kd_loss_row.cuh"

// Code for sm_90 alone (and what is no GPU): other architectures get empty kernels, never started.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
#define CLINKD_CLUSTERS 1
#else
#define CLINKD_CLUSTERS 0
#endif

namespace clinkd {

// Grid: kKDCluster blocks a row, one cluster. `grad` may be `student`: a row is in shared memory
// before any block writes.
template <typename T, int V, int KIND>
__global__ void __launch_bounds__(kKDThreads, KIND == kAnyLoss ? 1 : 2)
    kd_cluster_kernel(const KDArgs a) {
#if CLINKD_CLUSTERS
  extern __shared__ float4 kept[];
  __shared__ KDSums of_warps[kKDWarps];
  __shared__ KDSums of_blocks[kKDCluster];
  __shared__ float pairs[kKDWarps][2];
  __shared__ float2 block_pairs[kKDCluster];
  const auto cluster = cooperative_groups::this_cluster();
  const int64_t row = blockIdx.x / kKDCluster;
  const int rank = static_cast<int>(cluster.block_rank());
  const int64_t share = kd_cluster_columns(a.student_columns, sizeof(T)), begin = rank * share;
  const int64_t columns = clamped(a.student_columns - begin, share);
  const int64_t common = clamped(common_columns(a) - begin, share);
  T* out = static_cast<T*>(a.grad) + row * a.grad_stride + begin;
  const int64_t label = a.labels[row];
  const bool first = rank == 0 && threadIdx.x == 0;
  if (label == a.ignore_index) {
    if (first) a.ce[row] = a.kd[row] = 0.0f;
    write_zeros<T, V>(out, columns);
    return;
  }
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride + begin;
  const bool right = label >= 0 && label < a.student_columns, reverse = a.divergence == kReverseKL;
  // read before any block writes over it
  const float picked = first && right ? capped(to_float(student[label]), a.softcap) : float_nan();
  T* kept_student = reinterpret_cast<T*>(kept);
  T* kept_teacher = kept_student + share;
  keep_row<T, V>(kept_student, student + begin, columns);
  keep_row<T, V>(kept_teacher, teacher, common);
  wait_for_copies();
  __syncthreads();  // columns that only the student has are read one by one, by other threads
  const float scale = kLog2E / a.temperature;
  KDSums sums = add_row<T, V, KIND>(a, kept_student, kept_teacher, columns, common);
  sums = reduce_sums(sums, of_warps, scale, reverse);
  cluster.sync();  // every block runs, so its shared memory can be written
  if (threadIdx.x < kKDCluster)
    *cluster.map_shared_rank(of_blocks + rank, static_cast<int>(threadIdx.x)) = sums;
  cluster.sync();
  sums = of_blocks[threadIdx.x % kKDCluster];
  combine<kKDCluster>(sums, scale, reverse);
  float s[kStatistics];
  row_statistics(sums, right, reverse, s);
  float2 divergence = {s[kMean], s[kMean]};
  // the same in every thread of the cluster, which has the same sums
  if (a.divergence >= kJSD || divergence.x < kSmallKL) {
    float2 pair = divergence_sums<T>(a, s, kept_student, kept_teacher, common);
    reduce_pair(pair.x, pair.y, pairs);
    if (threadIdx.x < kKDCluster)
      *cluster.map_shared_rank(block_pairs + rank, static_cast<int>(threadIdx.x)) = pair;
    cluster.sync();
    pair = block_pairs[0];
    for (int block = 1; block < kKDCluster; ++block) {
      pair.x += block_pairs[block].x;
      pair.y += block_pairs[block].y;
    }
    divergence = divergence_of(a, pair);
    s[kMean] = divergence.y;
  }
  if (first) {
    a.ce[row] = cross_entropy(sums, picked);
    a.kd[row] = a.temperature * a.temperature * divergence.x;
  }
  write_gradient<T, V, KIND>(a, row, s, kept_student, kept_teacher, columns, common,
                              label - begin, out);
#endif
}

}  // namespace clinkd
