// Launch of the distillation loss's kernels for clusters of blocks, sm_90.

#include "kd_loss_cluster.cuh"
#include "launch.cuh"

namespace clinkd {
namespace {

template <typename T, int KIND>
int run(const KDArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.rows * kKDCluster));
  const size_t bytes = static_cast<size_t>(kd_cluster_bytes(a.student_columns, sizeof(T)));
  return launch(kd_cluster_kernel<T, 16 / sizeof(T), KIND>, grid, kKDThreads, stream, a, bytes,
                kKDCluster);
}

template <typename T>
int with_kind(const KDArgs& a, void* stream) {
  if (!kd_whole_packs(a, sizeof(T)) || a.rows > INT32_MAX / kKDCluster ||
      kd_cluster_bytes(a.student_columns, sizeof(T)) > kKDClusterBytes)
    return static_cast<int>(cudaErrorInvalidValue);
  switch (kd_kind(a)) {
    case kKLAtOne:
      return run<T, kKLAtOne>(a, stream);
    case kKLAtTwo:
      return run<T, kKLAtTwo>(a, stream);
    case kKLAtAny:
      return run<T, kKLAtAny>(a, stream);
    default:
      return run<T, kAnyLoss>(a, stream);
  }
}

}  // namespace

int kd_cluster_cuda(const KDArgs& args, void* stream) {
  if (args.rows == 0) return 0;
  switch (args.type) {
    case kFloat32:
      return with_kind<float>(args, stream);
    case kFloat16:
      return with_kind<__half>(args, stream);
    default:
      return with_kind<__nv_bfloat16>(args, stream);
  }
}

}  // namespace clinkd
