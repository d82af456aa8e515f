"""The distillation loss from hidden states without a logit in memory, in Triton: its sums.

Tiles of student and teacher logits are made on tensor cores, reduced as they come and forgotten.
Mixtures of both distributions need the sums of both first, and make the tiles once more for the
divergence. The backward pass makes them again, see linear_kd_gradient.py.
"""

import torch
import triton
import triton.language as tl
from clinkd.kernels.common import LOG2_E
from clinkd.kernels.linear_kd_tiles import (
    LEAST,
    add_tile,
    constants,
    expm1,
    kl_term,
    level,
    log2,
    logits,
)
from torch import Tensor

SLOTS = 7  # numbers that one program leaves of each row, see `statistics_kernel`


@triton.jit
def statistics_kernel(
    student_ptr,  # [N, Cs]
    student_weight_ptr,  # [Vs, Cs]
    student_bias_ptr,  # [Vs], or nothing
    teacher_ptr,  # [N, Ct]
    teacher_weight_ptr,  # [Vt, Ct]
    teacher_bias_ptr,
    labels_ptr,  # [N]
    out_ptr,  # [SLOTS, bands, N] float32
    picked_ptr,  # [N] float32, out: the logit of the label where it is a column
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
    """Of one band of the vocabulary, for each row.

    Slots: the largest logit and the log in powers of two of the sum of exponentials relative to
    it, apart so that neither rounds the other: of the student at temperature 1, then of the student
    and of the teacher at T over the common columns; the mean in powers of two of (teacher -
    student) / T, both relative to their largest, under the teacher (reverse KL: of its opposite
    under the student; mixtures: 0).
    """
    band = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < N
    # one out of range, which wraps here, is NaN afterwards
    label = tl.load(labels_ptr + rows, mask=is_row, other=-1).to(tl.int32)
    scale = LOG2_E * inverse_temperature
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    soft_top = top
    soft_total = total
    target_top = top
    target_total = total
    weighted = total
    for tile in range(0, band_tiles):
        first = (band * band_tiles + tile) * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        z = logits(
            student_ptr, student_weight_ptr, student_bias_ptr, rows, N, columns, Vs,
            student_stride, student_weight_stride, Cs,
            SOFTCAP, STUDENT_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
        )  # fmt: skip
        here = label - first
        if tl.max(((here >= 0) & (here < BLOCK_N)).to(tl.int32), 0) > 0:
            is_label = is_row[:, None] & (columns[None, :] == label[:, None])
            place = picked_ptr + rows[:, None] + tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            tl.store(place, z, mask=is_label & (columns < Vs)[None, :])
        z = tl.where((columns < Vs)[None, :], z, -float("inf"))
        top, total, _, _ = add_tile(top, total, z, LOG2_E)
        shared = (columns < common)[None, :]
        z = tl.where(shared, z, -float("inf"))
        if DIVERGENCE >= 2:
            soft_top, soft_total, _, _ = add_tile(soft_top, soft_total, z, scale)
        target = logits(
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, N, columns, common,
            teacher_stride, teacher_weight_stride, Ct,
            SOFTCAP, TEACHER_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
        )  # fmt: skip
        target = tl.where(shared, target, -float("inf"))
        if DIVERGENCE >= 2:
            target_top, target_total, _, _ = add_tile(target_top, target_total, target, scale)
        else:
            # the weighted sum is of logits relative to both maxima, which are about to move
            moved = level(soft_top) - level(target_top)
            before = soft_total if DIVERGENCE == 1 else target_total
            soft_top, soft_total, q, q_keep = add_tile(soft_top, soft_total, z, scale)
            target_top, target_total, p, p_keep = add_tile(target_top, target_total, target, scale)
            moved = ((level(soft_top) - level(target_top)) - moved) * scale
            z = z - level(soft_top)[:, None]
            target = target - level(target_top)[:, None]
            if DIVERGENCE == 1:
                gap = (tl.where(q > 0, z, 0.0) - tl.where(q > 0, target, 0.0)) * scale
                weighted = (weighted - before * moved) * q_keep + tl.sum(q * gap, 1)
            else:
                gap = (tl.where(p > 0, target, 0.0) - tl.where(p > 0, z, 0.0)) * scale
                weighted = (weighted + before * moved) * p_keep + tl.sum(p * gap, 1)
    at = out_ptr + band.to(tl.int64) * N + rows
    slot = tl.num_programs(1).to(tl.int64) * N
    tl.store(at, top, mask=is_row)
    tl.store(at + slot, log2(total), mask=is_row)
    tl.store(at + 2 * slot, soft_top, mask=is_row)
    tl.store(at + 3 * slot, log2(soft_total), mask=is_row)
    tl.store(at + 4 * slot, target_top, mask=is_row)
    tl.store(at + 5 * slot, log2(target_total), mask=is_row)
    share = soft_total if DIVERGENCE == 1 else target_total
    tl.store(at + 6 * slot, weighted / tl.where(share > 0, share, 1.0), mask=is_row)


@triton.jit
def divergence_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    teacher_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    statistics_ptr,  # [6, N] float32: the first slots of `statistics_kernel`, of all columns
    out_ptr,  # [2, bands, N] float32
    N,
    student_stride,
    student_weight_stride,
    teacher_stride,
    teacher_weight_stride,
    Cs,
    Ct,
    common,
    band_tiles,
    inverse_temperature,
    mix,  # JSD's beta, skew KL's skew
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
    """Of one band of the columns that both have: a mixture's divergence, from terms above 0.

    Slots: KL(p || m) with p the teacher's and m = mix p + (1 - mix) q; of JSD KL(q || m), of skew
    KL the sum of q p / m, which its gradient needs.
    """
    band = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < N
    scale = LOG2_E * inverse_temperature
    one = tl.zeros([BLOCK_M], tl.float32)
    other = one
    for tile in range(0, band_tiles):
        columns = (band * band_tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        z = logits(
            student_ptr, student_weight_ptr, student_bias_ptr, rows, N, columns, common,
            student_stride, student_weight_stride, Cs,
            SOFTCAP, STUDENT_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
        )  # fmt: skip
        target = logits(
            teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, rows, N, columns, common,
            teacher_stride, teacher_weight_stride, Ct,
            SOFTCAP, TEACHER_WHOLE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION, UPCAST,
        )  # fmt: skip
        found = statistics_ptr + tl.minimum(rows, N - 1)
        soft_top = tl.load(found + 2 * N)[:, None]
        soft_log = tl.load(found + 3 * N)[:, None]
        target_top = tl.load(found + 4 * N)[:, None]
        target_log = tl.load(found + 5 * N)[:, None]
        # of two logits that are close the difference is exact
        ratio = ((target - z) - (target_top - soft_top)) * scale + (soft_log - target_log)
        q_log = (z - soft_top) * scale - soft_log
        p_log = (target - target_top) * scale - target_log
        q = tl.exp2(q_log)
        p = tl.exp2(p_log)
        m = mix * p + (1.0 - mix) * q
        m_log = tl.log2(tl.maximum(m, LEAST))
        near = tl.abs(ratio) < 0.36  # a quarter, in natural logarithms
        ratio = tl.where(near, ratio, 0.0) / LOG2_E
        first = kl_term(p, m, p_log, m_log, (1.0 - mix) * expm1(-ratio), near)
        if DIVERGENCE == 2:
            second = kl_term(q, m, q_log, m_log, mix * expm1(ratio), near)
        else:
            second = q * (p / tl.maximum(m, LEAST))
        shared = (columns < common)[None, :]
        one += tl.sum(tl.where(shared, first, 0.0), 1)
        other += tl.sum(tl.where(shared, second, 0.0), 1)
    at = out_ptr + band.to(tl.int64) * N + rows
    tl.store(at, one, mask=is_row)
    tl.store(at + tl.num_programs(1).to(tl.int64) * N, other, mask=is_row)


Side = tuple[Tensor, Tensor, Tensor | None]  # hidden [N, C], weight [V, C], bias [V]


def _bands(columns: int, block: int, bands: int) -> tuple[int, int]:
    """Into how many bands the columns are cut, and the tiles of each."""
    tiles = triton.cdiv(columns, block)
    each = triton.cdiv(tiles, bands)
    return triton.cdiv(tiles, each), each


def statistics(
    student: Side,
    teacher: Side,
    labels: Tensor,
    temperature: float,
    divergence: int,
    softcap: float | None,
    bands: int,
) -> tuple[Tensor, Tensor]:
    """What `statistics_kernel` leaves of every row, [SLOTS, bands, N], and the labels' logits."""
    N, Vs = student[0].shape[0], student[1].shape[0]
    options = constants(student, teacher, "statistics", divergence, softcap)
    bands, band_tiles = _bands(Vs, options["BLOCK_N"], bands)
    out = torch.empty(SLOTS, bands, N, dtype=torch.float32, device=labels.device)
    picked = torch.zeros(N, dtype=torch.float32, device=labels.device)
    statistics_kernel[(triton.cdiv(N, options["BLOCK_M"]), bands)](
        *student, *teacher, labels, out, picked, N, *(t.stride(0) for t in student[:2]),
        *(t.stride(0) for t in teacher[:2]), student[0].shape[1], teacher[0].shape[1], Vs,
        min(Vs, teacher[1].shape[0]), band_tiles, 1 / temperature, **options,
    )  # fmt: skip
    return out, picked


def mixture(
    student: Side,
    teacher: Side,
    merged: Tensor,  # [6 or more, N]
    temperature: float,
    divergence: int,
    mix: float,
    softcap: float | None,
    bands: int,
) -> Tensor:
    """What `divergence_kernel` leaves of every row, [2, bands, N]."""
    N = student[0].shape[0]
    options = constants(student, teacher, "divergence", divergence, softcap)
    common = min(student[1].shape[0], teacher[1].shape[0])
    bands, band_tiles = _bands(common, options["BLOCK_N"], bands)
    out = torch.empty(2, bands, N, dtype=torch.float32, device=merged.device)
    divergence_kernel[(triton.cdiv(N, options["BLOCK_M"]), bands)](
        *student, *teacher, merged, out, N, *(t.stride(0) for t in student[:2]),
        *(t.stride(0) for t in teacher[:2]), student[0].shape[1], teacher[0].shape[1],
        common, band_tiles, 1 / temperature, mix, **options,
    )  # fmt: skip
    return out
