"""FlashAttention (Dao 2023, arXiv:2307.08691) with the queries' rotation inside, in Triton.

Keys come in turned, once, by the pre-pass. A program turns its tile of queries while it loads them,
with the softmax's scale in the same factors; the loop over keys knows nothing of positions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from clinkd.kernels.common import LN_2, LOG2_E, capability
from clinkd.kernels.rotary_blocks import constants, count_tiles, forward_blocks, is_narrow, walk
from clinkd.kernels.rotary_tiles import find_tile, load_piece, tile_rows, turned_and_rounded
from torch import Tensor


@triton.jit
def _step(
    acc0,
    acc1,
    top,  # [M] largest score so far, in powers of two
    total,  # [M]
    q0,
    q1,
    k_base,
    v_base,
    k_stride_s,
    v_stride_s,
    column,  # first key of the block
    seen_to,  # [M] last key that each row sees
    Sk,
    D,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of keys: scores, running maximum and sum, output."""
    j = column + tl.arange(0, BLOCK_N)
    is_key = j < Sk
    d0 = tl.arange(0, D0)
    k_rows = tile_rows(k_base, column, k_stride_s, BLOCK_N)
    v_rows = tile_rows(v_base, column, v_stride_s, BLOCK_N)
    k0 = load_piece(k_rows, is_key, d0, D, UPCAST, not MASKED, True)
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k1 = load_piece(k_rows, is_key, d1, D, UPCAST, not MASKED, D0 + D1 == D)
        scores = tl.dot(q1, tl.trans(k1), acc=scores, input_precision=PRECISION)
    if MASKED:
        seen = is_key[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= seen_to[:, None])
        if WINDOW > 0:
            seen = seen & (j[None, :] > seen_to[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet must not compute -inf - -inf
    level = tl.where(new_top == -float("inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.exp2(scores - level[:, None])  # [M, N]
    keep = tl.exp2(top - level)
    total = total * keep + tl.sum(weights, 1)
    v0 = load_piece(v_rows, is_key, d0, D, UPCAST, not MASKED, True)
    weights = weights.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc=acc0 * keep[:, None], input_precision=PRECISION)
    if D1 > 0:
        v1 = load_piece(v_rows, is_key, d1, D, UPCAST, not MASKED, D0 + D1 == D)
        acc1 = tl.dot(weights, v1, acc=acc1 * keep[:, None], input_precision=PRECISION)
    return acc0, acc1, new_top, total


@triton.jit
def _forward_kernel(
    q_ptr,  # [B, Sq, Hq, D] or [N, Hq, D], as all below
    k_ptr,  # turned
    v_ptr,
    out_ptr,
    q_turned_ptr,  # out, times scale * log2(e); only where KEEP
    lse_ptr,  # [B, Hq, Sq] or [Hq, N]
    positions_ptr,  # [A, B, Sq] or [A, N]
    axis_ptr,
    hi_ptr,
    lo_ptr,
    starts_ptr,
    key_starts_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,  # of q_turned too
    out_stride_s,
    out_stride_h,
    lse_stride_b,
    lse_stride_h,
    position_stride_a,
    position_stride_b,
    position_stride_s,
    Sq_all,
    Sk_all,
    sequences,
    factor,  # scale * log2(e)
    G: tl.constexpr,  # query heads of one key head
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
    KEEP: tl.constexpr,
    NARROW: tl.constexpr,  # rows of keys are counted in 32 bits
    ROTATE: tl.constexpr,  # False: q comes in turned; to count what rotation costs
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # last tiles first: under a causal mask they see the most keys and take longest
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
    at = (start + i).to(tl.int64)  # row in memory
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if D1 > 0 else 1)
    q_rows = q_ptr + b * q_stride_b + at * q_stride_s + h * q_stride_h
    out_at = b * out_stride_b + at * out_stride_s + h * out_stride_h
    position_rows = positions_ptr + b * position_stride_b + at * position_stride_s

    # rounded as the stored copy is, so that backward sees the very scores of forward
    if ROTATE:
        q0 = turned_and_rounded(
            q_rows, is_row, d0, position_rows, position_stride_a, axis_ptr, hi_ptr, lo_ptr, factor,
            D, R, PAIR_STRIDE, D0,
        )  # fmt: skip
    else:
        q0 = load_piece(q_rows, is_row, d0, D, False, False, True).to(tl.float32)
        q0 = (q0 * factor).to(q_ptr.dtype.element_ty)
    if KEEP:
        tl.store(q_turned_ptr + out_at[:, None] + d0[None, :], q0, mask=is_row[:, None])
    q1 = q0
    if D1 > 0:
        if ROTATE:
            q1 = turned_and_rounded(
                q_rows, is_row, d1, position_rows, position_stride_a, axis_ptr, hi_ptr, lo_ptr,
                factor, D, R, PAIR_STRIDE, D1,
            )  # fmt: skip
        else:
            q1 = load_piece(q_rows, is_row, d1, D, False, False, False).to(tl.float32)
            q1 = (q1 * factor).to(q_ptr.dtype.element_ty)
        if KEEP:
            inside = is_row[:, None] & (d1 < D)[None, :]
            tl.store(q_turned_ptr + out_at[:, None] + d1[None, :], q1, mask=inside)
    if UPCAST:
        q0 = q0.to(tl.float32)
        q1 = q1.to(tl.float32)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    k_base = k_ptr + b * k_stride_b + key_start.to(tl.int64) * k_stride_s + h // G * k_stride_h
    v_base = v_ptr + b * v_stride_b + key_start.to(tl.int64) * v_stride_s + h // G * v_stride_h
    if not NARROW:
        k_stride_s = tl.cast(k_stride_s, tl.int64)
        v_stride_s = tl.cast(v_stride_s, tl.int64)
    offset = Sk - Sq
    seen_to = i + offset
    last = Sk
    if CAUSAL:
        last = tl.minimum(Sk, tl.minimum(row + BLOCK_M, Sq) + offset)
    if WINDOW > 0:
        begin = tl.maximum(0, row + offset - WINDOW + 1) // BLOCK_N * BLOCK_N
    else:
        # blocks of which every row sees every key
        whole = tl.minimum(Sk, tl.maximum(0, row + offset + 1)) if CAUSAL else Sk
        begin = whole // BLOCK_N * BLOCK_N
        for column in range(0, begin, BLOCK_N):
            acc0, acc1, top, total = _step(
                acc0, acc1, top, total, q0, q1, k_base, v_base, k_stride_s, v_stride_s,
                column, seen_to, Sk, D, D0, D1, BLOCK_N, CAUSAL, WINDOW, False, PRECISION, UPCAST,
            )  # fmt: skip
    for column in range(begin, last, BLOCK_N):
        acc0, acc1, top, total = _step(
            acc0, acc1, top, total, q0, q1, k_base, v_base, k_stride_s, v_stride_s,
            column, seen_to, Sk, D, D0, D1, BLOCK_N, CAUSAL, WINDOW, True, PRECISION, UPCAST,
        )  # fmt: skip

    is_blind = total == 0.0
    share = 1.0 / tl.where(is_blind, 1.0, total)
    element = out_ptr.dtype.element_ty
    tl.store(
        out_ptr + out_at[:, None] + d0[None, :],
        (acc0 * share[:, None]).to(element),
        mask=is_row[:, None],
    )
    if D1 > 0:
        inside = is_row[:, None] & (d1 < D)[None, :]
        out1 = (acc1 * share[:, None]).to(element)
        tl.store(out_ptr + out_at[:, None] + d1[None, :], out1, mask=inside)
    lse = tl.where(is_blind, -float("inf"), (top + tl.log2(tl.where(is_blind, 1.0, total))) * LN_2)
    tl.store(lse_ptr + b * lse_stride_b + h * lse_stride_h + at, lse, mask=is_row)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    spec: Any,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    key_starts: Tensor | None,
    window: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q with turned keys k.

    Returns:
        Output like q; lse float32 [B, Hq, Sq] or [Hq, N]; turned q times scale * log2(e), empty
        unless `keep`.
    """
    packed = q.dim() == 3
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q_turned = torch.empty_like(out) if keep else out.new_empty(0)
    Hq = q.shape[-2]
    lse_shape = (Hq, q.shape[0]) if packed else (q.shape[0], Hq, q.shape[1])
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse, q_turned
    sequences = len(starts) - 1 if starts is not None else q.shape[0]
    blocks = forward_blocks(q.shape[-1], q.element_size(), capability(q.device))
    rows = q.shape[-3]
    grid = (Hq, count_tiles(rows, blocks.rows, sequences, packed))
    _forward_kernel[grid](
        q,
        k,
        v,
        out,
        q_turned,
        lse,
        positions,
        *tables,
        starts,
        key_starts,
        *walk(q),
        *walk(k),
        *walk(v),
        *walk(out),
        *((0, lse.stride(0)) if packed else lse.stride()[:2]),
        *((positions.stride(0), 0, positions.stride(1)) if packed else positions.stride()),
        rows,
        k.shape[-3],
        sequences,
        scale * LOG2_E.value,
        G=Hq // k.shape[-2],
        BLOCK_M=blocks.rows,
        BLOCK_N=blocks.columns,
        CAUSAL=causal,
        WINDOW=window,
        PACKED=packed,
        SEQUENCES=triton.next_power_of_2(max(1, sequences)) if packed else 1,
        KEEP=keep,
        NARROW=is_narrow(blocks, k, v),
        ROTATE=True,
        **constants(q, spec, blocks),
    )
    return out, lse, q_turned
