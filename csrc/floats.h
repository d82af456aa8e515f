// Element types and constants, for the CPU and the CUDA kernels alike.
#pragma once

#ifdef __CUDACC__
#define CLINKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CLINKD_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace clinkd {

enum FloatType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };  // TYPES of clinkd/ops/_impl.py

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLeast = 1.2e-38f;  // probabilities up to this count as zero where a log is needed

}  // namespace clinkd
