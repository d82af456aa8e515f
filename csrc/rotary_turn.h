// Turning the heads of a token on the CPU: sine and cosine of its pairs, then each head.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rotary.h"
#include "rotary_angle.h"
#include "vectors.h"

namespace clinkd {

constexpr int kMaxPairs = 128;
constexpr int kFewAxes = 3;

inline int axes_of(const RotaryArgs& a) {
  return a.pairs == 0 ? 0 : *std::max_element(a.axis, a.axis + a.pairs) + 1;
}

CLINKD_INLINE const float* positions_of(const RotaryArgs& a, int64_t batch, int64_t token) {
  return a.positions + batch * a.positions_stride[1] + token * a.positions_stride[2];
}

// Cosine and sine of every pair at `positions`, the sine with the sign of the direction. Where the
// components of a pair are neighbours they are laid out for `x * cos + swapped(x) * sin`: twice
// each, first -sin.
CLINKD_INLINE void angles(const RotaryArgs& a, const float* positions, int axes, float* all_cos,
                          float* all_sin) {
  alignas(64) float cos[kMaxPairs], sin[kMaxPairs];
  const float sign = a.inverse ? -1.0f : 1.0f;
  float* c = a.pair_stride == 1 ? cos : all_cos;
  float* s = a.pair_stride == 1 ? sin : all_sin;
  if (axes <= kFewAxes) {  // choosing among a few is cheaper than gathering
    float place[kFewAxes];
    for (int k = 0; k < kFewAxes; ++k)
      place[k] = positions[k < axes ? k * a.positions_stride[0] : 0];
#pragma omp simd
    for (int i = 0; i < a.pairs; ++i) {
      const int32_t axis = a.axis[i];
      const float position = axis == 0 ? place[0] : axis == 1 ? place[1] : place[2];
      float pair_cos, pair_sin;
      cos_sin(position, a.hi[i], a.lo[i], pair_cos, pair_sin);
      c[i] = pair_cos;
      s[i] = pair_sin * sign;
    }
  } else {
    for (int i = 0; i < a.pairs; ++i) {
      cos_sin(positions[a.axis[i] * a.positions_stride[0]], a.hi[i], a.lo[i], c[i], s[i]);
      s[i] *= sign;
    }
  }
  if (a.pair_stride != 1) return;
#pragma omp simd
  for (int i = 0; i < a.pairs; ++i) {
    all_cos[2 * i] = all_cos[2 * i + 1] = cos[i];
    all_sin[2 * i] = -sin[i];
    all_sin[2 * i + 1] = sin[i];
  }
}

// W pairs at distance n. Both components are read before one is written: `out` may be `x`.
template <int W, typename T>
CLINKD_INLINE void turn_pairs(const T* x, T* out, const float* cos, const float* sin, int n,
                              float sign) {
  const Floats<W> first = load<W>(x), second = load<W>(x + n);
  const Floats<W> c = load<W>(cos), s = load<W>(sin) * sign;
  store<W>(out, first * c - second * s);
  store<W>(out + n, first * s + second * c);
}

// W components whose neighbours are their partners.
template <int W, typename T>
CLINKD_INLINE void turn_neighbours(const T* x, T* out, const float* cos, const float* sin,
                                   float sign) {
  const Floats<W> both = load<W>(x);
  store<W>(out, both * load<W>(cos) + swap_neighbours<W>(both) * (load<W>(sin) * sign));
}

// Pairs at distance n, by the angles of `angles`; sign -1: back.
template <int W, typename T>
CLINKD_INLINE void turn_head(const T* x, T* out, const float* cos, const float* sin, int pairs,
                             int n, float sign = 1.0f) {
  if (n == 1) {
    int i = 0;
    for (; i + W <= 2 * pairs; i += W)
      turn_neighbours<W>(x + i, out + i, cos + i, sin + i, sign);
    for (; i < 2 * pairs; i += 2) turn_neighbours<2>(x + i, out + i, cos + i, sin + i, sign);
    return;
  }
  for (int i = 0; i < pairs; i += n) {
    int j = 0;
    for (; j + W <= n; j += W)
      turn_pairs<W>(x + 2 * i + j, out + 2 * i + j, cos + i + j, sin + i + j, n, sign);
    for (; j + 4 <= n; j += 4)
      turn_pairs<4>(x + 2 * i + j, out + 2 * i + j, cos + i + j, sin + i + j, n, sign);
    for (; j < n; ++j)
      turn_pairs<1>(x + 2 * i + j, out + 2 * i + j, cos + i + j, sin + i + j, n, sign);
  }
}

}  // namespace clinkd
