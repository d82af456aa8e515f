// Exponential and logarithm of short vectors of float, to about 1e-7 relative.
#pragma once

#include "floats.h"
#include "vectors.h"

namespace clinkd {

// 2^y for y up to 127; 0 below -126.5; NaN stays NaN.
template <int W>
CLINKD_INLINE Floats<W> exp2(Floats<W> y) {
  y = y < -127.0f ? Floats<W>{} - 127.0f : y;
  const Floats<W> magic = Floats<W>{} + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are rint(y)
  const Floats<W> shifted = y + magic;
  const Floats<W> f = y - (shifted - magic);  // -1/2 to 1/2
  // on that interval to 4e-8 relative; the coefficients of exp2f in the Cephes library
  Floats<W> p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const Words<W> power = (bits_of<W>(shifted) + 127u) << 23;
  return p * floats_of<W>(power);
}

// log2 of finite x > 0 that is not subnormal.
template <int W>
CLINKD_INLINE Floats<W> log2(Floats<W> x) {
  const Words<W> bits = bits_of<W>(x);
  const Words<W> from = bits - 0x3f3504f3u;  // so that the mantissa is in sqrt(1/2) to sqrt(2)
  const typename Vector<W>::ints exponent = (typename Vector<W>::ints)from >> 23;
  const Floats<W> m = floats_of<W>((from & 0x007fffffu) + 0x3f3504f3u);
  const Floats<W> s = (m - 1.0f) / (m + 1.0f);  // atanh series: |s| < 0.1716
  const Floats<W> z = s * s;
  Floats<W> p = 2.0f / 9.0f + z * (2.0f / 11.0f);
  p = 2.0f / 7.0f + z * p;
  p = 2.0f / 5.0f + z * p;
  p = 2.0f / 3.0f + z * p;
  p = 2.0f + z * p;
  return __builtin_convertvector(exponent, Floats<W>) + s * p * kLog2E;
}

}  // namespace clinkd
