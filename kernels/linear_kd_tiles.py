"""Tiles of logits for the distillation loss that stores none: what is summed, which sizes."""

from typing import Any

import torch
import triton
import triton.language as tl
from clinkd.kernels.common import INTERPRETED, LOG2_E
from torch import Tensor

LEAST = tl.constexpr(1.2e-38)  # probabilities up to this count as zero where a log is needed


@triton.jit
def logits(
    hidden_ptr,  # [N, C]
    weight_ptr,  # [V, C]
    bias_ptr,  # [V], or nothing
    rows,  # [M] int64
    N,
    columns,  # [W] int32
    V,
    hidden_stride,
    weight_stride,
    C,
    SOFTCAP: tl.constexpr,  # 0: none
    WHOLE: tl.constexpr,  # C is a multiple of BLOCK_C
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of logits, [M, W] float32; outside of them those of the last row or column."""
    c = tl.arange(0, BLOCK_C)
    rows = tl.minimum(rows, N - 1)
    columns = tl.minimum(columns, V - 1).to(tl.int64)
    hidden_ptrs = hidden_ptr + rows[:, None] * hidden_stride + c[None, :]
    weight_ptrs = weight_ptr + columns[:, None] * weight_stride + c[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias_ptr is not None:
        # into the sum before it begins: afterwards it would need registers of its own
        acc += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    for start in range(0, C, BLOCK_C):
        if WHOLE:
            h = tl.load(hidden_ptrs + start)
            w = tl.load(weight_ptrs + start)
        else:
            inside = (c < C - start)[None, :]
            h = tl.load(hidden_ptrs + start, mask=inside, other=0.0)
            w = tl.load(weight_ptrs + start, mask=inside, other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(h, tl.trans(w), acc=acc, input_precision=PRECISION)
    if SOFTCAP > 0:
        x = tl.exp2(acc * (2 * LOG2_E / SOFTCAP))
        acc = SOFTCAP * (1.0 - 2.0 / (x + 1.0))  # tanh
    return acc


@triton.jit
def level(top):
    """What is taken off before an exponential: nothing where all logits so far are -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def add_tile(top, total, z, scale):
    """Running maximum, and sum of 2^(scale (z - maximum)), with one more tile.

    The difference comes before the product: both logits may be 1e4.

    Returns:
        Both, the tile's powers [M, W], and what the sum so far was multiplied by [M].
    """
    new_top = tl.maximum(top, tl.max(z, 1))
    base = level(new_top)
    powers = tl.exp2((z - base[:, None]) * scale)
    keep = tl.exp2((top - base) * scale)
    return new_top, total * keep + tl.sum(powers, 1), powers, keep


@triton.jit
def log2(x):
    """Of 0, where a band has no column that both vocabularies have, it is -inf."""
    return tl.where(x > 0, tl.log2(tl.where(x > 0, x, 1.0)), -float("inf"))


@triton.jit
def expm1(x):
    """e^x - 1 for |x| up to 1/4, by its series."""
    up = 1.0 + x * (1.0 / 7.0)
    up = 1.0 + x * up * (1.0 / 6.0)
    up = 1.0 + x * up * (1.0 / 5.0)
    up = 1.0 + x * up * (1.0 / 4.0)
    up = 1.0 + x * up * (1.0 / 3.0)
    up = 1.0 + x * up * (1.0 / 2.0)
    return x * up


@triton.jit
def kl_term(p, m, log_p, log_m, u, near):
    """p log(p / m) - p + m, which is never below 0, of two probabilities.

    Args:
        log_p, log_m: in powers of two.
        u: m / p - 1, right where the two are `near`; the term is p (u - log(1 + u)), as in
            csrc/kd_divergence.cuh.
    """
    s = u / (2.0 + u)  # log(1 + u) = 2 atanh(s)
    z = s * s
    series = 1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0)))
    close = p * (u * s - 2.0 * s * z * series)
    far = tl.where(p > LEAST, p * ((log_p - log_m) / LOG2_E) - p, 0.0) + m
    return tl.where(near, close, far)


def blocks(element_size: int, arch: int, part: str, plain: bool) -> dict[str, int]:
    """Tile sizes and launch options: the largest that spill no register.

    Args:
        arch: of the device's compiler target, such as 90; 0 under the interpreter.
        part: "statistics", "divergence" or "gradient".
        plain: forward or reverse KL with neither softcap nor bias.
    """
    if INTERPRETED:
        return _options(16, 32, 32, 4, 1)
    if element_size == 4:
        if part == "divergence":
            return _options(32, 32, 32, 4, 2)
        if arch == 90 and part == "statistics" and not plain:
            return _options(32, 64, 32, 4, 2)
        return _options(64, 64, 32, 8, 2)
    if part == "divergence":
        return _options(32, 128, 64, 8, 3) if arch >= 120 else _options(64, 64, 64, 8, 3)
    # 128 columns were the fastest of seven tiles on an H100
    whole = arch == 90 and (plain or part == "statistics")
    return _options(128, 128 if whole else 64, 64, 8, 3)


def _options(rows: int, columns: int, width: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "BLOCK_C": width,
        "num_warps": warps,
        "num_stages": stages,
    }


def constants(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    part: str,
    divergence: int,
    softcap: float | None,
) -> dict[str, Any]:
    """Compile-time values and launch options of one kernel."""
    hidden, _, bias = student
    arch = 0
    if not INTERPRETED:
        major, minor = torch.cuda.get_device_capability(hidden.device)
        arch = 10 * major + minor
    plain = not softcap and bias is None and teacher[2] is None and divergence < 2
    options = blocks(hidden.element_size(), arch, part, plain)
    return {
        "DIVERGENCE": divergence,
        "SOFTCAP": softcap or 0.0,
        "STUDENT_WHOLE": hidden.shape[1] % options["BLOCK_C"] == 0,
        "TEACHER_WHOLE": teacher[0].shape[1] % options["BLOCK_C"] == 0,
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRETED and hidden.dtype == torch.bfloat16,
        **options,
    }
