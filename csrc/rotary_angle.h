// Sine and cosine of position * speed, for the CPU and the CUDA kernel alike.
#pragma once

#include <cmath>

#include "floats.h"

namespace clinkd {

// Cosine and sine of position * inv_freq, where hi + lo = inv_freq * 2 / pi: the product counts
// quarter turns. The nearest whole number is taken off the exact product by an fma, before anything
// is rounded, so the angle keeps an error below 5e-8 radians for positions to 131,072, where a
// float32 product has lost 1e-2. It is nearest to the rounded product, which tells it from its
// neighbours up to some million: sines are off by 3e-7 at 2 million. Non-finite positions give NaN.
CLINKD_HOST_DEVICE void cos_sin(float position, float hi, float lo, float& cos, float& sin) {
  const float whole = rintf(position * hi);
  const float t = fmaf(position, lo, fmaf(position, hi, -whole));
  // minimax polynomials of sin and cos of t * pi / 2 for |t| <= 1/2, error below 6e-9
  const float z = t * t;
  const float s =
      t * fmaf(fmaf(fmaf(-0.00460217427f, z, 0.0796802267f), z, -0.645963490f), z, 1.57079637f);
  const float c = fmaf(fmaf(fmaf(fmaf(0.000904021552f, z, -0.0208602883f), z, 0.253669232f), z,
                            -1.23370051f),
                       z, 1.0f);
  const float quarter = whole - 4.0f * floorf(whole * 0.25f);  // 0, 1, 2 or 3
  const bool odd = quarter == 1.0f || quarter == 3.0f;
  const float even_cos = odd ? s : c;
  const float even_sin = odd ? c : s;
  cos = quarter == 1.0f || quarter == 2.0f ? -even_cos : even_cos;
  sin = quarter >= 2.0f ? -even_sin : even_sin;
}

}  // namespace clinkd
