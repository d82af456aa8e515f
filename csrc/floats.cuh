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

// The value of the lane `distance` away, of a power of two.
__device__ __forceinline__ float shuffle_xor(float v, int distance) {
  return __shfl_xor_sync(0xffffffffu, v, distance);
}

// V neighbouring elements, moved by one instruction.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T item[V];
};

__device__ __forceinline__ float float_infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float float_nan() { return __int_as_float(0x7fffffff); }
// 16 bytes from global to shared memory while the thread goes on; `wait_for_copies` before it reads.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(global) : "memory");
#else
  *static_cast<float4*>(shared) = *static_cast<const float4*>(global);
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
// 2^x, of which results below the least normal number are 0: one instruction, `exp2f` takes four.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
// A level to subtract: 0 where nothing is above -inf, for -inf - -inf is NaN.
__device__ __forceinline__ float finite_level(float top) {
  return top == -float_infinity() ? 0.0f : top;
}
// Powers of two that a term may be above the level of its sum: to raise the level costs as much as
// many terms, and is rarely needed so.
constexpr float kRoom = 20.0f;
__device__ __forceinline__ float capped(float x, float cap) {
  return cap > 0 ? cap * tanhf(x / cap) : x;
}

}  // namespace clinkd
