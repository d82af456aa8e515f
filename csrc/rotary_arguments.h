// What Python gives of a rotation: sizes, strides and pairs once for all tensors of one form, for
// each number that comes from Python costs as much as turning a few tokens; places with each call.
#pragma once

#include <array>
#include <cstdint>

#include "rotary.h"

namespace clinkd {

using Strides = std::array<int64_t, 3>;

// tables: axis, hi and lo; without places
inline RotaryArgs rotation(const std::array<uintptr_t, 3>& tables,
                           const std::array<int64_t, 4>& shape, const Strides& x_stride,
                           const Strides& out_stride, const Strides& positions_stride, int pairs,
                           int pair_stride) {
  RotaryArgs a = {};
  a.axis = reinterpret_cast<const int32_t*>(tables[0]);
  a.hi = reinterpret_cast<const float*>(tables[1]);
  a.lo = reinterpret_cast<const float*>(tables[2]);
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
  return a;
}

// The same rotation of these tensors.
inline RotaryArgs placed(RotaryArgs rotation, uintptr_t x, uintptr_t out, uintptr_t positions,
                         bool inverse, int type) {
  rotation.x = reinterpret_cast<const void*>(x);
  rotation.out = reinterpret_cast<void*>(out);
  rotation.positions = reinterpret_cast<const float*>(positions);
  rotation.inverse = inverse;
  rotation.type = type;
  return rotation;
}

}  // namespace clinkd
