// What CUDA kernels do with elements of every type: load packs of them, compute in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "floats.h"

namespace clinkd {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void from_float(float& out, float v) { out = v; }
__device__ __forceinline__ void from_float(__half& out, float v) { out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(__nv_bfloat16& out, float v) {
  out = __float2bfloat16_rn(v);
}

// V neighbouring elements, moved by one instruction.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T item[V];
};

__device__ __forceinline__ float float_infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float float_nan() { return __int_as_float(0x7fffffff); }
// A maximum to subtract: 0 where nothing is above -inf, for -inf - -inf is NaN.
__device__ __forceinline__ float finite_level(float top) {
  return top == -float_infinity() ? 0.0f : top;
}
__device__ __forceinline__ float capped(float x, float cap) {
  return cap > 0 ? cap * tanhf(x / cap) : x;
}

}  // namespace clinkd
