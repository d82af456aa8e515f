// Launch of the top-k distillation loss's kernels.

#include "launch.cuh"
#include "topk_kd_kernel.cuh"

namespace clinkd {
namespace {

// 16 bytes at a time where every row begins on 16 bytes.
template <typename T>
bool whole_packs(const TopKArgs& a) {
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(a.student) | reinterpret_cast<uintptr_t>(a.grad);
  const int64_t strides = a.student_stride | a.grad_stride;
  return (places | static_cast<uintptr_t>(strides * sizeof(T))) % 16 == 0;
}

template <typename T, int V>
int run(const TopKArgs& a, bool gradient, void* stream) {
  const auto kernel = gradient ? topk_gradient_kernel<T, V> : topk_tails_kernel<T, V>;
  const size_t map_bytes = static_cast<size_t>((a.columns + 31) / 32) * sizeof(uint32_t);
  return launch(kernel, dim3(static_cast<unsigned>(a.rows)), kTopKThreads, stream, a, map_bytes);
}

template <typename T>
int with_width(const TopKArgs& a, bool gradient, void* stream) {
  if (whole_packs<T>(a)) return run<T, 16 / sizeof(T)>(a, gradient, stream);
  return run<T, 1>(a, gradient, stream);
}

int with_type(const TopKArgs& a, bool gradient, void* stream) {
  if (a.rows == 0) return 0;
  // more columns than fit into the shared memory that a kernel gets unasked
  if (a.rows > INT32_MAX || a.columns > kTopKMostColumns)
    return static_cast<int>(cudaErrorInvalidValue);
  switch (a.type) {
    case kFloat32:
      return with_width<float>(a, gradient, stream);
    case kFloat16:
      return with_width<__half>(a, gradient, stream);
    default:
      return with_width<__nv_bfloat16>(a, gradient, stream);
  }
}

}  // namespace

int topk_tails_cuda(const TopKArgs& args, void* stream) { return with_type(args, false, stream); }
int topk_gradient_cuda(const TopKArgs& args, void* stream) { return with_type(args, true, stream); }

}  // namespace clinkd
