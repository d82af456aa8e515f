// The one place that starts kernels.
#pragma once

#include <cuda_runtime.h>

namespace clinkd {

constexpr size_t kPlainSharedBytes = 48 << 10;  // of a launch that did not ask for more

// Start `kernel` on `stream`, blocks in clusters of `cluster` along x. Returns 0 or a CUDA error,
// which no later call reports again.
template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, void* stream, const Args& args,
           size_t shared_bytes = 0, int cluster = 1) {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute clusters;
  if (cluster > 1) {
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &clusters;
    config.numAttrs = 1;
  }
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kPlainSharedBytes)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace clinkd
