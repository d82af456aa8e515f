// The one place that starts kernels.
#pragma once

#include <cuda_runtime.h>

namespace clinkd {

// Start `kernel` on `stream`. Returns 0 or a CUDA error, which no later call reports again.
template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, void* stream, const Args& args,
           size_t shared_bytes = 0) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace clinkd
