// Of CUDA's runtime and built-in functions what the kernels use, for a plain C++ compiler.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using dim3 = simt::Dimensions;
using cudaStream_t = struct SimtStream*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// A kernel may have 48 KB of dynamic shared memory, and up to 227 KB (sm_90) when asked for.
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > 227 * 1024) return cudaErrorInvalidValue;
  simt::dynamic_limit(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;  // clusters along x, of at most 8 blocks
  unsigned numAttrs;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      config->dynamicSmemBytes > simt::dynamic_limit(reinterpret_cast<const void*>(kernel)))
    return cudaErrorInvalidConfiguration;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto size = config->attrs[i].val.clusterDim;
    cluster = size.x;
    if (cluster == 0 || cluster > 8 || size.y != 1 || size.z != 1 || grid.x % cluster)
      return cudaErrorInvalidConfiguration;
  }
  const bool done =
      simt::run_grid(grid, block, config->dynamicSmemBytes, cluster, [&] { kernel(arguments...); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

// Waiting for others; the place in the source tells two such calls apart.
#define SIMT_TEXT_(x) #x
#define SIMT_TEXT(x) SIMT_TEXT_(x)
#define SIMT_SITE __FILE__ ":" SIMT_TEXT(__LINE__)
#define __syncthreads() simt::barrier(SIMT_SITE)
#define __syncwarp(...) simt::sync_warp(SIMT_SITE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(mask, ...) simt::shuffle_index(SIMT_SITE, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) simt::shuffle_down(SIMT_SITE, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) simt::shuffle_up(SIMT_SITE, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) simt::shuffle_xor(SIMT_SITE, mask, __VA_ARGS__)
#define __ballot_sync(mask, vote) simt::ballot(SIMT_SITE, mask, vote)
#define __any_sync(mask, vote) (simt::ballot(SIMT_SITE, mask, vote) != 0)
#define __all_sync(mask, vote) (simt::ballot(SIMT_SITE, mask, !(vote)) == 0)

// One fiber runs at a time, so a plain change is an atomic one.
template <typename T>
struct SimtSame {
  using type = T;
};
template <typename T, typename F>
T simt_change(T* place, F f) {
  const simt::Atomic atomic;
  const T before = *place;
  *place = f(before);
  return before;
}
#define SIMT_ATOMIC(name, result)                             \
  template <typename T>                                       \
  T name(T* place, typename SimtSame<T>::type value) {        \
    return simt_change(place, [&](T old) -> T { return result; }); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, value > old ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
template <typename T>
T atomicCAS(T* place, typename SimtSame<T>::type expected, typename SimtSame<T>::type value) {
  return simt_change(place, [&](T old) { return old == expected ? value : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

#define SIMT_LOAD(name)        \
  template <typename T>        \
  T name(const T* place) {     \
    return *place;             \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
#define SIMT_STORE(name)              \
  template <typename T>               \
  void name(T* place, const T& value) { \
    *place = value;                   \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)

template <typename To, typename From>
To simt_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __int_as_float(int v) { return simt_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return simt_bits<float>(v); }
inline int __float_as_int(float v) { return simt_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return simt_bits<unsigned>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }

// The fast ones are exact here: their errors on a GPU (2 units in the last place and more) are not
// modelled.
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }

#define SIMT_VECTORS(T, name)                                                             \
  struct alignas(2 * sizeof(T)) name##2 {                                                 \
    T x, y;                                                                               \
  };                                                                                      \
  struct alignas(4 * sizeof(T)) name##4 {                                                 \
    T x, y, z, w;                                                                         \
  };                                                                                      \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                              \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
