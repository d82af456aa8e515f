"""What every Triton kernel here needs."""

import triton
import triton.language as tl

# bf16 arithmetic is silently wrong in Triton's interpreter, so kernels compute in float32 there
INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
