"""Backward of the rotary attention: no rotation in any loop, gradients turned back at the end.

Forward kept turned queries (times the softmax's factor) and keys instead of plain ones, so scores
are recomputed from them alone. One kernel owns tiles of keys and sums over the query heads that
share them, another owns tiles of queries; nothing is added atomically, so runs repeat bit by bit.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from clinkd.kernels.common import INTERPRETED, LOG2_E, capability
from clinkd.kernels.rotary_attention_keys import keys_kernel, sum_parts_kernel
from clinkd.kernels.rotary_blocks import (
    constants,
    count_tiles,
    is_narrow,
    keys_blocks,
    queries_blocks,
    walk,
)
from clinkd.kernels.rotary_tiles import (
    find_tile,
    load_piece,
    softmax_weights,
    tile_rows,
    turn_back,
)
from torch import Tensor

WAVES = 4  # programs a multiprocessor that the keys' kernel wants, since causal tiles differ
SUM_ROWS = 16  # rows that a program of the parts' sum takes


@triton.jit
def _queries_step(
    dq0, dq1, q0, q1, grad0, grad1, lse, delta, k_base, v_base, k_stride_s, v_stride_s,
    column, i, Sk, offset,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a tile of queries."""
    j = column + tl.arange(0, BLOCK_N)
    is_key = j < Sk
    d0 = tl.arange(0, D0)
    k_rows = tile_rows(k_base, column, k_stride_s, BLOCK_N)
    v_rows = tile_rows(v_base, column, v_stride_s, BLOCK_N)
    k0 = load_piece(k_rows, is_key, d0, D, UPCAST, not MASKED, True)
    v0 = load_piece(v_rows, is_key, d0, D, UPCAST, not MASKED, True)
    k1 = k0
    v1 = v0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k1 = load_piece(k_rows, is_key, d1, D, UPCAST, not MASKED, D0 + D1 == D)
        v1 = load_piece(v_rows, is_key, d1, D, UPCAST, not MASKED, D0 + D1 == D)
    weights = softmax_weights(
        q0, q1, k0, k1, i, j, Sk, offset, lse, D1, CAUSAL, WINDOW, MASKED, PRECISION
    )
    dweights = tl.dot(grad0, tl.trans(v0), input_precision=PRECISION)
    if D1 > 0:
        dweights = tl.dot(grad1, tl.trans(v1), acc=dweights, input_precision=PRECISION)
    dscores = (weights * (dweights - delta[:, None])).to(k0.dtype)
    dq0 = tl.dot(dscores, k0, acc=dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(dscores, k1, acc=dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit
def _queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # strides of q, as grad and dq
    grad_ptr,
    lse_ptr,
    delta_ptr,  # out: sum of output times gradient over each row's components
    level_ptr,  # out: lse in powers of two, inf for rows that see no key
    dq_ptr,
    positions_ptr,  # of the queries
    axis_ptr,
    hi_ptr,
    lo_ptr,
    starts_ptr,
    key_starts_ptr,
    row_stride_b,
    row_stride_s,
    row_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    lse_stride_b,
    lse_stride_h,
    position_stride_a,
    position_stride_b,
    position_stride_s,
    Sq_all,
    Sk_all,
    sequences,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIR_STRIDE: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    NARROW: tl.constexpr,  # rows of keys are counted in 32 bits
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of a tile of queries over all keys that they see, and the rows' delta and level."""
    b, row, start, Sq, key_start, Sk = find_tile(
        starts_ptr, key_starts_ptr, tl.num_programs(1) - 1 - tl.program_id(1), Sq_all, Sk_all,
        sequences, BLOCK_M, PACKED, SEQUENCES,
    )  # fmt: skip
    if b >= sequences:
        return
    h = tl.program_id(0).to(tl.int64)
    b = b.to(tl.int64)
    i = row + tl.arange(0, BLOCK_M)
    is_row = i < Sq
    at = (start + i).to(tl.int64)
    here = b * row_stride_b + at * row_stride_s + h * row_stride_h
    side = b * lse_stride_b + h * lse_stride_h + at
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if D1 > 0 else 1)
    lse = tl.load(lse_ptr + side, mask=is_row, other=float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E)
    q0 = load_piece(q_ptr + here, is_row, d0, D, UPCAST, False, True)
    grad0 = load_piece(grad_ptr + here, is_row, d0, D, UPCAST, False, True)
    out0 = load_piece(out_ptr + here, is_row, d0, D, UPCAST, False, True)
    delta = tl.sum(out0.to(tl.float32) * grad0.to(tl.float32), 1)
    q1 = q0
    grad1 = grad0
    if D1 > 0:
        q1 = load_piece(q_ptr + here, is_row, d1, D, UPCAST, False, False)
        grad1 = load_piece(grad_ptr + here, is_row, d1, D, UPCAST, False, False)
        out1 = load_piece(out_ptr + here, is_row, d1, D, UPCAST, False, False)
        delta += tl.sum(out1.to(tl.float32) * grad1.to(tl.float32), 1)
    tl.store(delta_ptr + side, delta, mask=is_row)
    tl.store(level_ptr + side, lse, mask=is_row)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    k_base = k_ptr + b * k_stride_b + key_start.to(tl.int64) * k_stride_s + h // G * k_stride_h
    v_base = v_ptr + b * v_stride_b + key_start.to(tl.int64) * v_stride_s + h // G * v_stride_h
    if not NARROW:
        k_stride_s = tl.cast(k_stride_s, tl.int64)
        v_stride_s = tl.cast(v_stride_s, tl.int64)
    offset = Sk - Sq
    last = Sk
    if CAUSAL:
        last = tl.minimum(Sk, tl.minimum(row + BLOCK_M, Sq) + offset)
    if WINDOW > 0:
        begin = tl.maximum(0, row + offset - WINDOW + 1) // BLOCK_N * BLOCK_N
    else:
        whole = tl.minimum(Sk, tl.maximum(0, row + offset + 1)) if CAUSAL else Sk
        begin = whole // BLOCK_N * BLOCK_N
        for column in range(0, begin, BLOCK_N):
            dq0, dq1 = _queries_step(
                dq0, dq1, q0, q1, grad0, grad1, lse, delta, k_base, v_base, k_stride_s, v_stride_s,
                column, i, Sk, offset,
                D, D0, D1, BLOCK_N, CAUSAL, WINDOW, False, PRECISION, UPCAST,
            )  # fmt: skip
    for column in range(begin, last, BLOCK_N):
        dq0, dq1 = _queries_step(
            dq0, dq1, q0, q1, grad0, grad1, lse, delta, k_base, v_base, k_stride_s, v_stride_s,
            column, i, Sk, offset,
            D, D0, D1, BLOCK_N, CAUSAL, WINDOW, True, PRECISION, UPCAST,
        )  # fmt: skip
    element = dq_ptr.dtype.element_ty
    dq_rows = dq_ptr + here
    tl.store(dq_rows[:, None] + d0[None, :], (dq0 * scale).to(element), mask=is_row[:, None])
    if D1 > 0:
        inside = is_row[:, None] & (d1 < D)[None, :]
        tl.store(dq_rows[:, None] + d1[None, :], (dq1 * scale).to(element), mask=inside)
    if ROTATE:
        position_rows = positions_ptr + b * position_stride_b + at * position_stride_s
        turn_back(
            dq_rows, is_row, position_rows, position_stride_a, axis_ptr, hi_ptr, lo_ptr,
            D, R, PAIR_STRIDE, D0, D1,
        )  # fmt: skip


def launch_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q_turned: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    key_positions: Tensor | None,
    tables: tuple[Tensor, Tensor, Tensor],
    spec: Any,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    key_starts: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of unrotated q, k and of v, contiguous; k comes in turned.

    Without positions of the keys, the gradient is that of turned k.
    """
    packed = out.dim() == 3
    dq = torch.empty_like(out)
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    if out.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad = grad.contiguous()
    D, Hq, Hkv = out.shape[-1], out.shape[-2], k.shape[-2]
    delta, level = torch.empty_like(lse), torch.empty_like(lse)
    sequences = len(starts) - 1 if starts is not None else out.shape[0]
    rows, keys = out.shape[-3], k.shape[-3]
    sides = (0, lse.stride(0)) if packed else lse.stride()[:2]
    shared = {
        "G": Hq // Hkv,
        "CAUSAL": causal,
        "WINDOW": window,
        "PACKED": packed,
        "SEQUENCES": triton.next_power_of_2(max(1, sequences)) if packed else 1,
        "ROTATE": True,
    }

    def places(p: Tensor) -> tuple[int, int, int]:
        return (p.stride(0), 0, p.stride(1)) if packed else p.stride()

    sizes = (rows, keys, sequences, scale)
    arch = capability(out.device)
    blocks = queries_blocks(D, out.element_size(), arch)
    # first, since it writes delta and level
    _queries_kernel[(Hq, count_tiles(rows, blocks.rows, sequences, packed))](
        q_turned, k, v, out, grad, lse, delta, level, dq, positions, *tables, starts, key_starts,
        *walk(out), *walk(k), *walk(v), *sides, *places(positions), *sizes,
        BLOCK_M=blocks.rows, BLOCK_N=blocks.columns, NARROW=is_narrow(blocks, k, v),
        **shared, **constants(out, spec, blocks),
    )  # fmt: skip
    blocks = keys_blocks(D, out.element_size(), arch)
    shared |= constants(out, spec, blocks)
    if key_positions is None:  # never read
        key_positions = positions
        shared |= {"ROTATE": False, "R": 0}
    tiles = count_tiles(keys, blocks.rows, sequences, packed)
    parts = count_parts(tiles * Hkv, Hq // Hkv, out.device)
    sums = (
        (dk, dv)
        if parts == 1
        else (
            dk.new_empty(parts, *dk.shape, dtype=torch.float32),
            dv.new_empty(parts, *dv.shape, dtype=torch.float32),
        )
    )
    keys_kernel[(Hkv * parts, tiles)](
        q_turned, k, v, grad, level, delta, *sums, key_positions, *tables, starts, key_starts,
        *walk(out), *walk(k), *walk(v), *walk(dk), dk.numel(), *sides, *places(key_positions),
        *sizes, BLOCK_M=blocks.columns, BLOCK_N=blocks.rows, PARTS=parts,
        NARROW=is_narrow(blocks, out), **shared,
    )  # fmt: skip
    if parts > 1:
        flat = dk.numel() // D
        names = ("D", "R", "PAIR_STRIDE")
        sum_parts_kernel[(triton.cdiv(flat, SUM_ROWS),)](
            *sums, dk, dv, key_positions, *tables, *places(key_positions), flat, Hkv, keys,
            PARTS=parts, WIDTH=triton.next_power_of_2(D), BLOCK=SUM_ROWS, num_warps=4,
            **{name: shared[name] for name in names},
        )  # fmt: skip
    return dq, dk, dv


def count_parts(programs: int, G: int, device: torch.device) -> int:
    """Programs that share the query heads of one tile of keys: the fewest that fill the device.

    A few tiles would leave most of it idle; many need no division, so that the memory of the
    parts, 8 bytes for each component of a key, is bounded by the size of the device.
    """
    wanted = WAVES * (2 if INTERPRETED else multiprocessors(device))
    return next((p for p in range(1, G) if G % p == 0 and programs * p >= wanted), G)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
