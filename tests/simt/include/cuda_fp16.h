// 16-bit IEEE floats, conversions rounded to the nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const float sign = v.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  if (exponent == 31) return mantissa ? __uint_as_float(0x7fc00000) : sign * INFINITY;
  if (exponent == 0) return sign * ldexpf(static_cast<float>(mantissa), -24);
  return sign * ldexpf(static_cast<float>(1024 + mantissa), exponent - 25);
}

inline __half __float2half_rn(float v) {
  const int sign = signbit(v) ? 0x8000 : 0;
  const float size = fabsf(v);
  if (isnan(v)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -24;
  if (size > 0) frexpf(size, &exponent);               // size < 2^exponent
  const int last = exponent > -13 ? exponent - 11 : -24;  // power of two of the last place
  const int places = static_cast<int>(nearbyintf(ldexpf(size, -last)));  // the one rounding
  // places has the leading 1 of a normal number, which adds 1 to the exponent
  return {static_cast<uint16_t>(sign | (((last + 24) << 10) + places))};
}
inline __half __float2half(float v) { return __float2half_rn(v); }
