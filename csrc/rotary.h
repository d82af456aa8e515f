// What a rotation reads and writes; the same for every device. Strides are in elements.
#pragma once

#include <cstdint>

#include "floats.h"

namespace clinkd {

struct RotaryArgs {
  const void* x;           // [B, S, H, D], components side by side
  void* out;               // [B, S, H, D], may be x itself
  const float* positions;  // [A, B, S]
  const int32_t* axis;     // [R]
  const float* hi;         // [R] inv_freq * 2 / pi, and what its rounding left
  const float* lo;         // [R]
  int64_t batch, tokens, heads, head_dim;
  int64_t x_stride[3], out_stride[3], positions_stride[3];  // B, S, H; A, B, S
  int pairs;                                                // R
  int pair_stride;
  int inverse;  // 1: turn back
  int type;     // FloatType
};

// Turn on the CPU with at most so many threads.
void rotary_cpu(const RotaryArgs& args, int threads);

// Turn on a GPU, on `stream`; returns a cudaError_t.
int rotary_cuda(const RotaryArgs& args, void* stream);

}  // namespace clinkd
