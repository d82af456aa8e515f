// The upper half of a float, conversions rounded to the nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(unsigned{v.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (isnan(v)) return {0x7fff};
  const unsigned bits = __float_as_uint(v), half = 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>((bits + half) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
