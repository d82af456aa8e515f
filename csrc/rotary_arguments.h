// What Python gives of a rotation: pointers, sizes and strides as integers.
#pragma once

#include <array>
#include <cstdint>

#include "rotary.h"

namespace clinkd {

using Strides = std::array<int64_t, 3>;

inline RotaryArgs rotary_arguments(uintptr_t x, uintptr_t out, uintptr_t positions, uintptr_t axis,
                                   uintptr_t hi, uintptr_t lo, const std::array<int64_t, 4>& shape,
                                   const Strides& x_stride, const Strides& out_stride,
                                   const Strides& positions_stride, int pairs, int pair_stride,
                                   bool inverse, int type) {
  RotaryArgs a;
  a.x = reinterpret_cast<const void*>(x);
  a.out = reinterpret_cast<void*>(out);
  a.positions = reinterpret_cast<const float*>(positions);
  a.axis = reinterpret_cast<const int32_t*>(axis);
  a.hi = reinterpret_cast<const float*>(hi);
  a.lo = reinterpret_cast<const float*>(lo);
  a.batch = shape[0];
  a.tokens = shape[1];
  a.heads = shape[2];
  a.head_dim = shape[3];
  for (int i = 0; i < 3; ++i) {
    a.x_stride[i] = x_stride[i];
    a.out_stride[i] = out_stride[i];
    a.positions_stride[i] = positions_stride[i];
  }
  a.pairs = pairs;
  a.pair_stride = pair_stride;
  a.inverse = inverse;
  a.type = type;
  return a;
}

}  // namespace clinkd
