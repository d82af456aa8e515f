// The divergence of a row whose sums are known, on a GPU: a walk of its own, in which no term is
// below 0. The mathematics is that of kd_divergence_cpu.h.
#pragma once

#include "kd_loss.h"
#include "kd_loss_sums.cuh"

namespace clinkd {

// p g(B (q / p - 1)), g(u) = u - log(1 + u). `up`: p / q - 1, right where p and q are `near`.
__device__ __forceinline__ float kl_term(float p, float q, float log_ratio, float up, bool near,
                                         float B) {
  if (near) {
    const float u = B * -up / (1.0f + up);
    const float s = u / (2.0f + u), z = s * s;
    const float series = 1.0f / 3.0f + z * (1.0f / 5.0f + z * (1.0f / 7.0f + z * (1.0f / 9.0f)));
    return p * (u * s - 2.0f * s * z * series);
  }
  const float m = (1.0f - B) * p + B * q;
  if (B < 1.0f) log_ratio = (log2f(fmaxf(p, kLeast)) - log2f(fmaxf(m, kLeast))) * kLn2;
  return p > 0.0f ? p * log_ratio - p + m : m;
}

// The sum of both over the block, for all threads. `shared`: one element a warp.
__device__ __forceinline__ void reduce_pair(float& a, float& b, float (*shared)[2]) {
  for (int distance = 16; distance > 0; distance /= 2) {
    a += shuffle_xor(a, distance);
    b += shuffle_xor(b, distance);
  }
  if (threadIdx.x % 32 == 0) {
    shared[threadIdx.x / 32][0] = a;
    shared[threadIdx.x / 32][1] = b;
  }
  __syncthreads();
  a = b = 0.0f;
  for (int warp = 0; warp < kKDWarps; ++warp) {
    a += shared[warp][0];
    b += shared[warp][1];
  }
}

// This thread's two sums over columns that both models have, from the statistics `s` of the whole
// row. They add up over threads and over parts of the columns.
template <typename T>
__device__ __forceinline__ float2 divergence_sums(const KDArgs& a, const float* s,
                                                  const T* student, const T* teacher,
                                                  int64_t common) {
  const float scale = kLog2E / a.temperature;
  const float tops = s[kTargetTop] - s[kSoftTop];
  const float sums = logf(s[kTargetInverse] / s[kSoftInverse]);
  const bool teacher_first = a.divergence != kReverseKL;  // KL(p || m)
  const bool student_first = a.divergence == kReverseKL || a.divergence == kJSD;  // KL(q || m)
  const float B = a.divergence == kForwardKL ? 1.0f : 1.0f - a.mix;
  const float D = a.divergence == kReverseKL ? 1.0f : a.mix;
  float first = 0.0f, second = 0.0f;
  for (int64_t i = threadIdx.x; i < common; i += kKDThreads) {
    const float x = capped(to_float(student[i]), a.softcap);
    const float y = capped(to_float(teacher[i]), a.softcap);
    const float q = exp2f((x - s[kSoftTop]) * scale) * s[kSoftInverse];
    const float p = exp2f((y - s[kTargetTop]) * scale) * s[kTargetInverse];
    const float r = ((y - x) - tops) / a.temperature + sums;
    const bool near = fabsf(r) < 0.25f;
    const float up = expm1f(r);
    if (teacher_first) first += kl_term(p, q, r, up, near, B);
    if (student_first) second += kl_term(q, p, -r, -up / (1.0f + up), near, D);
    if (a.divergence == kSkewKL) {
      const float m = a.mix * p + (1.0f - a.mix) * q;
      if (m > kLeast) second += q * p / m;
    }
  }
  return {first, second};
}

// From both over the whole row: the divergence (x) and the mean that its gradient subtracts (y).
__device__ __forceinline__ float2 divergence_of(const KDArgs& a, float2 sums) {
  const float first = sums.x, second = sums.y;
  if (a.divergence == kJSD)
    return {a.mix * first + (1.0f - a.mix) * second, (1.0f - a.mix) * second};
  if (a.divergence == kSkewKL) return {first, -(1.0f - a.mix) * second};
  return a.divergence != kReverseKL ? float2{first, first} : float2{second, second};
}

// Both of a row, by a block; for all of its threads.
template <typename T>
__device__ float2 row_divergence(const KDArgs& a, int64_t row, const float* s,
                                 float (*shared)[2]) {
  const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
  const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
  float2 sums = divergence_sums<T>(a, s, student, teacher, common_columns(a));
  reduce_pair(sums.x, sums.y, shared);
  return divergence_of(a, sums);
}

// Grid: one block a row. Statistics come in; `kd` gets the divergence, `ce` the mean.
template <typename T>
__global__ void __launch_bounds__(kKDThreads) kd_divergence_kernel(const KDArgs a) {
  __shared__ float shared[kKDWarps][2];
  const int64_t row = blockIdx.x;
  float2 found = {0.0f, 0.0f};
  if (a.labels[row] != a.ignore_index)
    found = row_divergence<T>(a, row, a.statistics + row * kStatistics, shared);
  if (threadIdx.x == 0) {
    a.kd[row] = found.x;
    a.ce[row] = found.y;
  }
}

}  // namespace clinkd
