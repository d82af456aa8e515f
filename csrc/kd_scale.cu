// A gradient times a number that the host does not know.

#include "floats.cuh"
#include "kd_loss.h"
#include "kd_loss_row.cuh"
#include "launch.cuh"

namespace clinkd {

// Grid: any; a block takes every gridDim.x-th row.
template <typename T, int V>
__global__ void __launch_bounds__(kKDThreads) kd_scale_kernel(const KDArgs a) {
  const float factor = *a.ce_factor;
  if (factor == 1.0f) return;
  using P = Pack<T, V>;
  const int64_t columns = a.student_columns, packs = columns / V;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    T* grad = static_cast<T*>(a.grad) + row * a.grad_stride;
    for (int64_t i = threadIdx.x; i < packs; i += kKDThreads) {
      P values = *reinterpret_cast<P*>(grad + i * V);
#pragma unroll
      for (int j = 0; j < V; ++j) from_float(values.item[j], to_float(values.item[j]) * factor);
      *reinterpret_cast<P*>(grad + i * V) = values;
    }
    for (int64_t i = packs * V + threadIdx.x; i < columns; i += kKDThreads)
      from_float(grad[i], to_float(grad[i]) * factor);
  }
}

namespace {

constexpr int64_t kScaleBlocks = 1024;  // several for each multiprocessor

template <typename T>
int scale(const KDArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.rows < kScaleBlocks ? a.rows : kScaleBlocks));
  const auto kernel =
      kd_whole_packs(a, sizeof(T)) ? kd_scale_kernel<T, 16 / sizeof(T)> : kd_scale_kernel<T, 1>;
  return launch(kernel, grid, kKDThreads, stream, a);
}

}  // namespace

int kd_scale_cuda(const KDArgs& args, void* stream) {
  if (args.rows == 0) return 0;
  switch (args.type) {
    case kFloat32:
      return scale<float>(args, stream);
    case kFloat16:
      return scale<__half>(args, stream);
    default:
      return scale<__nv_bfloat16>(args, stream);
  }
}

}  // namespace clinkd
