"""The gradient of the distillation loss from hidden states by the student's logits, in Triton.

Tiles of both models' logits are made again, from the sums of linear_kd_loss.py, and the gradient of
one band of the vocabulary at a time is stored, which two ordinary matrix products then consume.
"""

import triton
import triton.language as tl
from clinkd.kernels.common import LOG2_E
from clinkd.kernels.linear_kd_tiles import LEAST, constants, logits
from torch import Tensor


@triton.jit
def gradient_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    teacher_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    labels_ptr,
    statistics_ptr,  # [7, N] float32: as the slots of `statistics_kernel`, of all columns
    factor_ptr,  # [N] float32: what each row's loss counts
    grad_ptr,  # [N, band], out
    N,
    student_stride,
    student_weight_stride,
    teacher_stride,
    teacher_weight_stride,
    grad_stride,
    Cs,
    Ct,
    Vs,
    common,
    begin,  # first column of the band
    inverse_temperature,
    kd_factor,  # kd_weight * T
    mix,
    DIVERGENCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STUDENT_WHOLE: tl.constexpr,
    TEACHER_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of the student's logits, one tile of a band of the vocabulary.

    The last statistic is the sum over the columns of q times the divergence's derivative by q, in
    powers of two for reverse KL.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = begin + within
    z = logits(
        student_ptr, student_weight_ptr, student_bias_ptr, rows, N, columns, Vs,
        student_stride, student_weight_stride, Cs,
        SOFTCAP, STUDENT_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
    )  # fmt: skip
    target = logits(
        teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, N, columns, common,
        teacher_stride, teacher_weight_stride, Ct,
        SOFTCAP, TEACHER_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
    )  # fmt: skip
    scale = LOG2_E * inverse_temperature
    safe = tl.minimum(rows, N - 1)
    at = statistics_ptr + safe  # 7 N fits in 32 bits
    # log2 of probabilities at T
    soft = (z - tl.load(at + 2 * N)[:, None]) * scale - tl.load(at + 3 * N)[:, None]
    target = (target - tl.load(at + 4 * N)[:, None]) * scale - tl.load(at + 5 * N)[:, None]
    shared = (columns < common)[None, :]
    soft = tl.where(shared, soft, -float("inf"))
    target = tl.where(shared, target, -float("inf"))
    q = tl.exp2(soft)
    if DIVERGENCE == 0:
        pull = q - tl.exp2(target)
    elif DIVERGENCE == 1:
        some = soft > -float("inf")
        gap = tl.where(some, soft, 0.0) - tl.where(some, target, 0.0)
        pull = q * (gap - tl.load(at + 6 * N)[:, None]) / LOG2_E
    else:
        p = tl.exp2(target)
        m = tl.maximum(mix * p + (1.0 - mix) * q, LEAST)
        if DIVERGENCE == 2:
            slope = (1.0 - mix) / LOG2_E * (tl.maximum(soft, -126.0) - tl.log2(m))
        else:
            slope = (mix - 1.0) * (p / m)
        pull = q * (slope - tl.load(at + 6 * N)[:, None])
    grad = tl.exp2((z - tl.load(at)[:, None]) * LOG2_E - tl.load(at + N)[:, None])
    label = tl.load(labels_ptr + safe).to(tl.int32)
    grad = grad - tl.where(columns[None, :] == label[:, None], 1.0, 0.0)
    grad = (grad + kd_factor * pull) * tl.load(factor_ptr + safe)[:, None]
    if SOFTCAP > 0:
        grad = grad * (1.0 - (z / SOFTCAP) * (z / SOFTCAP))
    tl.store(
        grad_ptr + rows[:, None] * grad_stride + within[None, :],
        tl.where((columns < Vs)[None, :], grad, 0.0).to(grad_ptr.dtype.element_ty),
        mask=(rows < N)[:, None] & (within < grad_stride)[None, :],
    )


def gradient_band(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    merged: Tensor,  # [7, N]
    factor: Tensor,  # [N]
    grad: Tensor,  # [N, band], out
    begin: int,
    temperature: float,
    kd_weight: float,
    divergence: int,
    mix: float,
    softcap: float | None,
) -> None:
    """Gradient of the logits of columns `begin` to `begin + band`; 0 past the vocabulary."""
    N, Vs = student[0].shape[0], student[1].shape[0]
    options = constants(student, teacher, "gradient", divergence, softcap)
    grid = (triton.cdiv(N, options["BLOCK_M"]), triton.cdiv(grad.shape[1], options["BLOCK_N"]))
    gradient_kernel[grid](
        *student, *teacher, labels, merged, factor, grad, N, *(t.stride(0) for t in student[:2]),
        *(t.stride(0) for t in teacher[:2]), grad.stride(0), student[0].shape[1],
        teacher[0].shape[1], Vs, min(Vs, teacher[1].shape[0]), begin, 1 / temperature,
        kd_weight * temperature, mix, **options,
    )  # fmt: skip
