"""The distillation loss from hidden states without a logit in memory, in Triton.

Tiles of student and teacher logits are made on tensor cores, reduced as they come and forgotten.
The backward pass makes them again, tile by tile, and stores the gradient of one band of the
vocabulary at a time, which two ordinary matrix products then consume.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from clinkd.kernels.common import INTERPRETED, LOG2_E
from torch import Tensor

SLOTS = 8  # numbers that one program leaves of each row, see `_statistics_kernel`


@triton.jit
def _logits(
    hidden_ptr,  # [N, C]
    weight_ptr,  # [V, C]
    bias_ptr,  # [V], or nothing
    rows,  # [M] int64
    N,
    columns,  # [W] int64
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
    columns = tl.minimum(columns, V - 1)
    hidden_ptrs = hidden_ptr + rows[:, None] * hidden_stride + c[None, :]
    weight_ptrs = weight_ptr + columns[:, None] * weight_stride + c[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns).to(tl.float32)
        acc += bias[None, :]
    if SOFTCAP > 0:
        x = tl.exp2(acc * (2 * LOG2_E / SOFTCAP))
        acc = SOFTCAP * (1.0 - 2.0 / (x + 1.0))  # tanh
    return acc


@triton.jit
def _level(top):
    """What is taken off before an exponential: nothing where all scores so far are -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _add_tile(top, total, scores):
    """Running maximum and sum of 2^score with one more tile; the tile's 2^(score - maximum)."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    level = _level(new_top)
    powers = tl.exp2(scores - level[:, None])
    keep = tl.exp2(top - level)
    return new_top, total * keep + tl.sum(powers, 1), powers, keep


@triton.jit
def _log2(x):
    """Of 0, where a band has no column that both vocabularies have, it is -inf."""
    return tl.where(x > 0, tl.log2(tl.where(x > 0, x, 1.0)), -float("inf"))


@triton.jit
def _statistics_kernel(
    student_ptr,  # [N, Cs]
    student_weight_ptr,  # [Vs, Cs]
    student_bias_ptr,  # [Vs], or nothing
    teacher_ptr,  # [N, Ct]
    teacher_weight_ptr,  # [Vt, Ct]
    teacher_bias_ptr,
    labels_ptr,  # [N]
    out_ptr,  # [SLOTS, bands, N] float32
    N,
    student_stride,
    student_weight_stride,
    teacher_stride,
    teacher_weight_stride,
    Cs,
    Ct,
    Vs,
    common,  # columns that both vocabularies have
    band_tiles,  # tiles of the vocabulary that one program walks over
    inverse_temperature,
    REVERSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STUDENT_WHOLE: tl.constexpr,
    TEACHER_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Of one band of the vocabulary, for each row, all in powers of two.

    Slots: the largest logit and the log of the sum of powers relative to it, apart so that neither
    rounds the other: of the student at temperature 1, then of the student and of the teacher at T
    over the common columns; the mean of (teacher - student) / T, both relative to their largest,
    under the teacher (REVERSE: of its opposite under the student); the label's logit as it is, 0
    where it is in another band.
    """
    band = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < N
    label = tl.load(labels_ptr + rows, mask=is_row, other=-1)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    soft_top = top
    soft_total = total
    target_top = top
    target_total = total
    weighted = total
    picked = total
    for tile in range(0, band_tiles):
        columns = (band * band_tiles + tile).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = columns < Vs
        z = _logits(
            student_ptr, student_weight_ptr, student_bias_ptr, rows, N, columns, Vs,
            student_stride, student_weight_stride, Cs,
            SOFTCAP, STUDENT_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
        )  # fmt: skip
        is_label = is_column[None, :] & (columns[None, :] == label[:, None])
        picked += tl.sum(tl.where(is_label, z, 0.0), 1)
        z = z * LOG2_E
        top, total, _, _ = _add_tile(top, total, tl.where(is_column[None, :], z, -float("inf")))
        shared = columns < common
        target = _logits(
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, N, columns, common,
            teacher_stride, teacher_weight_stride, Ct,
            SOFTCAP, TEACHER_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
        )  # fmt: skip
        z = tl.where(shared[None, :], z * inverse_temperature, -float("inf"))
        target = tl.where(shared[None, :], target * (LOG2_E * inverse_temperature), -float("inf"))
        # the weighted sum is of scores relative to both maxima, which are about to move
        moved = _level(soft_top) - _level(target_top)
        before = soft_total if REVERSE else target_total
        soft_top, soft_total, soft, soft_keep = _add_tile(soft_top, soft_total, z)
        target_top, target_total, mass, keep = _add_tile(target_top, target_total, target)
        moved = (_level(soft_top) - _level(target_top)) - moved
        z = z - _level(soft_top)[:, None]
        target = target - _level(target_top)[:, None]
        if REVERSE:
            gap = tl.where(soft > 0, z, 0.0) - tl.where(soft > 0, target, 0.0)
            weighted = (weighted - before * moved) * soft_keep + tl.sum(soft * gap, 1)
        else:
            gap = tl.where(mass > 0, target, 0.0) - tl.where(mass > 0, z, 0.0)
            weighted = (weighted + before * moved) * keep + tl.sum(mass * gap, 1)
    at = out_ptr + band.to(tl.int64) * N + rows
    slot = tl.num_programs(1).to(tl.int64) * N
    tl.store(at, top, mask=is_row)
    tl.store(at + slot, _log2(total), mask=is_row)
    tl.store(at + 2 * slot, soft_top, mask=is_row)
    tl.store(at + 3 * slot, _log2(soft_total), mask=is_row)
    tl.store(at + 4 * slot, target_top, mask=is_row)
    tl.store(at + 5 * slot, _log2(target_total), mask=is_row)
    share = soft_total if REVERSE else target_total
    tl.store(at + 6 * slot, weighted / tl.where(share > 0, share, 1.0), mask=is_row)
    tl.store(at + 7 * slot, picked, mask=is_row)


@triton.jit
def _gradient_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    teacher_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    labels_ptr,
    statistics_ptr,  # [7, N] float32 in powers of two: as the first seven slots, of all columns
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
    REVERSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STUDENT_WHOLE: tl.constexpr,
    TEACHER_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of the student's logits, one tile of a band of the vocabulary."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < N
    within = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = begin + within
    is_column = columns < Vs
    shared = columns < common
    z = _logits(
        student_ptr, student_weight_ptr, student_bias_ptr, rows, N, columns, Vs,
        student_stride, student_weight_stride, Cs,
        SOFTCAP, STUDENT_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
    )  # fmt: skip
    target = _logits(
        teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, N, columns, common,
        teacher_stride, teacher_weight_stride, Ct,
        SOFTCAP, TEACHER_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
    )  # fmt: skip
    safe = tl.minimum(rows, N - 1)
    statistics_ptrs = statistics_ptr + safe
    slot = N  # 7 N fits in 32 bits
    top = tl.load(statistics_ptrs)
    total = tl.load(statistics_ptrs + slot)
    soft_top = tl.load(statistics_ptrs + 2 * slot)
    soft_total = tl.load(statistics_ptrs + 3 * slot)
    target_top = tl.load(statistics_ptrs + 4 * slot)
    target_total = tl.load(statistics_ptrs + 5 * slot)
    factor = tl.load(factor_ptr + safe)
    label = tl.load(labels_ptr + safe)
    score = z * LOG2_E
    grad = tl.exp2(score - top[:, None] - total[:, None])
    grad = grad - tl.where(columns[None, :] == label[:, None], 1.0, 0.0)
    # log2 of probabilities at T
    soft = score * inverse_temperature - soft_top[:, None] - soft_total[:, None]
    soft = tl.where(shared[None, :], soft, -float("inf"))
    target = target * (LOG2_E * inverse_temperature)
    target = target - target_top[:, None] - target_total[:, None]
    target = tl.where(shared[None, :], target, -float("inf"))
    if REVERSE:
        mean = tl.load(statistics_ptrs + 6 * slot)
        some = soft > -float("inf")
        gap = tl.where(some, soft, 0.0) - tl.where(some, target, 0.0) - mean[:, None]
        pull = tl.exp2(soft) * gap / LOG2_E
    else:
        pull = tl.exp2(soft) - tl.exp2(target)
    grad = (grad + kd_factor * pull) * factor[:, None]
    if SOFTCAP > 0:
        grad = grad * (1.0 - (z / SOFTCAP) * (z / SOFTCAP))
    tl.store(
        grad_ptr + rows[:, None] * grad_stride + within[None, :],
        tl.where(is_column[None, :], grad, 0.0).to(grad_ptr.dtype.element_ty),
        mask=is_row[:, None] & (within < grad_stride)[None, :],
    )


def blocks(element_size: int) -> dict[str, int]:
    """Tile sizes and launch options of both kernels."""
    if INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1}
    if element_size == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}


def _shared(student: Tensor, teacher: Tensor, softcap: float | None) -> dict[str, Any]:
    options = blocks(student.element_size())
    return {
        "SOFTCAP": softcap or 0.0,
        "STUDENT_WHOLE": student.shape[1] % options["BLOCK_C"] == 0,
        "TEACHER_WHOLE": teacher.shape[1] % options["BLOCK_C"] == 0,
        "PRECISION": "ieee" if student.dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRETED and student.dtype == torch.bfloat16,
        **options,
    }


def statistics(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    temperature: float,
    reverse: bool,
    softcap: float | None,
    bands: int,
) -> Tensor:
    """What `_statistics_kernel` leaves of every row, [SLOTS, bands, N]."""
    (hidden, weight, bias), (target, target_weight, target_bias) = student, teacher
    N, Vs = hidden.shape[0], weight.shape[0]
    options = _shared(hidden, target, softcap)
    tiles = triton.cdiv(Vs, options["BLOCK_N"])
    band_tiles = triton.cdiv(tiles, bands)
    bands = triton.cdiv(tiles, band_tiles)
    out = torch.empty(SLOTS, bands, N, dtype=torch.float32, device=hidden.device)
    _statistics_kernel[(triton.cdiv(N, options["BLOCK_M"]), bands)](
        hidden, weight, bias, target, target_weight, target_bias, labels, out,
        N, hidden.stride(0), weight.stride(0), target.stride(0), target_weight.stride(0),
        hidden.shape[1], target.shape[1], Vs, min(Vs, target_weight.shape[0]), band_tiles,
        1 / temperature, REVERSE=reverse, **options,
    )  # fmt: skip
    return out


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
    reverse: bool,
    softcap: float | None,
) -> None:
    """Gradient of the logits of columns `begin` to `begin + band`; 0 past the vocabulary."""
    (hidden, weight, bias), (target, target_weight, target_bias) = student, teacher
    N, Vs = hidden.shape[0], weight.shape[0]
    options = _shared(hidden, target, softcap)
    grid = (triton.cdiv(N, options["BLOCK_M"]), triton.cdiv(grad.shape[1], options["BLOCK_N"]))
    _gradient_kernel[grid](
        hidden, weight, bias, target, target_weight, target_bias, labels, merged, factor, grad,
        N, hidden.stride(0), weight.stride(0), target.stride(0), target_weight.stride(0),
        grad.stride(0), hidden.shape[1], target.shape[1], Vs, min(Vs, target_weight.shape[0]),
        begin, 1 / temperature, kd_weight * temperature, REVERSE=reverse, **options,
    )  # fmt: skip
