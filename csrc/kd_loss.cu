// Launch of the distillation loss's kernels.

#include <cuda_runtime.h>

#include "kd_loss_kernel.cuh"

namespace clinkd {
namespace {

// 16 bytes at a time where every row of all three tensors begins on 16 bytes.
template <typename T>
bool whole_packs(const KDArgs& a) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(a.student) |
                           reinterpret_cast<uintptr_t>(a.teacher) |
                           reinterpret_cast<uintptr_t>(a.grad);
  const int64_t strides = a.student_stride | a.teacher_stride | a.grad_stride;
  return (places | static_cast<uintptr_t>(strides * sizeof(T))) % 16 == 0;
}

template <typename T, int V, int POWER>
int launch(const KDArgs& a, bool gradient, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.rows));
  if (gradient)
    kd_gradient_kernel<T, V, POWER><<<grid, kKDThreads, 0, stream>>>(a);
  else
    kd_statistics_kernel<T, V, POWER><<<grid, kKDThreads, 0, stream>>>(a);
  return static_cast<int>(cudaGetLastError());
}

template <typename T, int V>
int with_power(const KDArgs& a, bool gradient, cudaStream_t stream) {
  const bool same = a.student_columns == a.teacher_columns;
  if (same && a.temperature == 1.0f) return launch<T, V, 1>(a, gradient, stream);
  if (same && a.temperature == 2.0f) return launch<T, V, 2>(a, gradient, stream);
  return launch<T, V, 0>(a, gradient, stream);
}

template <typename T>
int with_width(const KDArgs& a, bool gradient, cudaStream_t stream) {
  if (whole_packs<T>(a)) return with_power<T, 16 / sizeof(T)>(a, gradient, stream);
  return with_power<T, 1>(a, gradient, stream);
}

int run(const KDArgs& a, bool gradient, void* stream) {
  if (a.rows == 0) return 0;
  if (a.rows > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.type) {
    case kKDFloat32:
      return with_width<float>(a, gradient, s);
    case kKDFloat16:
      return with_width<__half>(a, gradient, s);
    default:
      return with_width<__nv_bfloat16>(a, gradient, s);
  }
}

}  // namespace

int kd_statistics_cuda(const KDArgs& args, void* stream) { return run(args, false, stream); }
int kd_gradient_cuda(const KDArgs& args, void* stream) { return run(args, true, stream); }

}  // namespace clinkd
