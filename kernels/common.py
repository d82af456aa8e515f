"""What every Triton kernel here needs."""

import torch
import triton
import triton.language as tl

# bf16 arithmetic is silently wrong in Triton's interpreter, so kernels compute in float32 there
INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def capability(device: torch.device) -> int:
    """Of the device's compiler target, such as 90; 0 under the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
