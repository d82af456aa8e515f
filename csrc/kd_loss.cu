// Launch of the distillation loss's kernels.

#include "kd_loss_kernel.cuh"
#include "launch.cuh"

namespace clinkd {
namespace {

enum class Pass { kStatistics, kDivergence, kGradient };

int start(void (*kernel)(KDArgs), const KDArgs& a, void* stream) {
  return launch(kernel, dim3(static_cast<unsigned>(a.rows)), kKDThreads, stream, a);
}

template <typename T, int V, int KIND>
int run(const KDArgs& a, Pass pass, void* stream) {
  const auto kernel = pass == Pass::kGradient ? kd_gradient_kernel<T, V, KIND>
                                              : kd_statistics_kernel<T, V, KIND>;
  return start(kernel, a, stream);
}

template <typename T, int V>
int with_kind(const KDArgs& a, Pass pass, void* stream) {
  switch (kd_kind(a)) {
    case kKLAtOne:
      return run<T, V, kKLAtOne>(a, pass, stream);
    case kKLAtTwo:
      return run<T, V, kKLAtTwo>(a, pass, stream);
    case kKLAtAny:
      return run<T, V, kKLAtAny>(a, pass, stream);
    default:
      return run<T, V, kAnyLoss>(a, pass, stream);
  }
}

template <typename T>
int with_width(const KDArgs& a, Pass pass, void* stream) {
  if (pass == Pass::kDivergence) return start(kd_divergence_kernel<T>, a, stream);
  if (kd_whole_packs(a, sizeof(T))) return with_kind<T, 16 / sizeof(T)>(a, pass, stream);
  return run<T, 1, kAnyLoss>(a, pass, stream);
}

int with_type(const KDArgs& a, Pass pass, void* stream) {
  if (a.rows == 0) return 0;
  if (a.rows > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  switch (a.type) {
    case kFloat32:
      return with_width<float>(a, pass, stream);
    case kFloat16:
      return with_width<__half>(a, pass, stream);
    default:
      return with_width<__nv_bfloat16>(a, pass, stream);
  }
}

}  // namespace

int kd_statistics_cuda(const KDArgs& args, void* stream) {
  return with_type(args, Pass::kStatistics, stream);
}
int kd_divergence_cuda(const KDArgs& args, void* stream) {
  return with_type(args, Pass::kDivergence, stream);
}
int kd_gradient_cuda(const KDArgs& args, void* stream) {
  return with_type(args, Pass::kGradient, stream);
}

}  // namespace clinkd
