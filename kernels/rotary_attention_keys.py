"""Gradients of keys and values of the rotary attention, in Triton."""

import triton
import triton.language as tl
from clinkd.kernels.common import LN_2
from clinkd.kernels.rotary_tiles import (
    find_tile,
    load_piece,
    turn_back,
    turned,
)


@triton.jit
def _keys_step(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_base, grad_base, lse_base, delta_base,
    row_stride_s, row, Sq, offset, j,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a tile of keys and values."""
    i = row + tl.arange(0, BLOCK_M)
    is_row = i < Sq
    d0 = tl.arange(0, D0)
    # rows beyond the last have weight 0: reading the last in their place needs no mask
    at = tl.minimum(i, Sq - 1) * row_stride_s
    q_rows = q_base + at
    grad_rows = grad_base + at
    lse = tl.load(lse_base + i, mask=is_row, other=float("inf"))
    delta = tl.load(delta_base + i, mask=is_row, other=0.0)
    q0 = load_piece(q_rows, is_row, d0, D, UPCAST, True, True)
    grad0 = load_piece(grad_rows, is_row, d0, D, UPCAST, True, True)
    q1 = q0
    grad1 = grad0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_piece(q_rows, is_row, d1, D, UPCAST, True, D0 + D1 == D)
        grad1 = load_piece(grad_rows, is_row, d1, D, UPCAST, True, D0 + D1 == D)
    # transposed, keys by queries: the tile's own keys and values stay the left side of each product
    scores = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
    if D1 > 0:
        scores = tl.dot(k1, tl.trans(q1), acc=scores, input_precision=PRECISION)
    weights = tl.exp2(scores - lse[None, :])
    if MASKED:
        if CAUSAL:
            weights = tl.where(j[:, None] <= i[None, :] + offset, weights, 0.0)
        if WINDOW > 0:
            weights = tl.where(j[:, None] > i[None, :] + (offset - WINDOW), weights, 0.0)
    rounded = weights.to(grad0.dtype)
    dv0 = tl.dot(rounded, grad0, acc=dv0, input_precision=PRECISION)
    dweights = tl.dot(v0, tl.trans(grad0), input_precision=PRECISION)
    if D1 > 0:
        dv1 = tl.dot(rounded, grad1, acc=dv1, input_precision=PRECISION)
        dweights = tl.dot(v1, tl.trans(grad1), acc=dweights, input_precision=PRECISION)
    dscores = (weights * (dweights - delta[None, :])).to(q0.dtype)
    dk0 = tl.dot(dscores, q0, acc=dk0, input_precision=PRECISION)
    if D1 > 0:
        dk1 = tl.dot(dscores, q1, acc=dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def keys_kernel(
    q_ptr,  # turned, times scale * log2(e); contiguous, as grad, and delta and lse below
    k_ptr,  # turned
    v_ptr,
    grad_ptr,  # of the output
    lse_ptr,  # in powers of two, inf for rows that see no key
    delta_ptr,
    dk_ptr,  # [B, Sk, Hkv, D] or [N, Hkv, D]; [PARTS, ...] float32 where there are several parts
    dv_ptr,
    positions_ptr,  # of the keys
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
    dk_stride_b,  # of dv too
    dk_stride_s,
    dk_stride_h,
    part_stride,
    lse_stride_b,  # of delta too
    lse_stride_h,
    position_stride_a,
    position_stride_b,
    position_stride_s,
    Sq_all,
    Sk_all,
    sequences,
    scale,
    G: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the G heads of a tile; a divisor of G
    D: tl.constexpr,
    R: tl.constexpr,
    PAIR_STRIDE: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    NARROW: tl.constexpr,  # rows of queries are counted in 32 bits
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of a tile of keys and values, over all queries of G / PARTS heads that share them.

    Of one part they are complete, and the keys' are turned back; several are summed afterwards.
    """
    b, column, key_start, Sk, start, Sq = find_tile(
        key_starts_ptr, starts_ptr, tl.program_id(1), Sk_all, Sq_all, sequences,
        BLOCK_N, PACKED, SEQUENCES,
    )  # fmt: skip
    if b >= sequences:
        return
    h = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    b = b.to(tl.int64) * (0 if PACKED else 1)  # packed rows have no batch
    j = column + tl.arange(0, BLOCK_N)
    is_key = j < Sk
    at = (key_start + j).to(tl.int64)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if D1 > 0 else 1)
    k_rows = k_ptr + b * k_stride_b + at * k_stride_s + h * k_stride_h
    v_rows = v_ptr + b * v_stride_b + at * v_stride_s + h * v_stride_h
    k0 = load_piece(k_rows, is_key, d0, D, UPCAST, False, True)
    v0 = load_piece(v_rows, is_key, d0, D, UPCAST, False, True)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = load_piece(k_rows, is_key, d1, D, UPCAST, False, False)
        v1 = load_piece(v_rows, is_key, d1, D, UPCAST, False, False)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    for g in range(G // PARTS):
        Sk_again = Sk
        Sq_again = Sq
        start_again = start
        if PACKED and G > PARTS:  # read again: kept over the heads, they take the loops' registers
            _, _, _, Sk_again, start_again, Sq_again = find_tile(
                key_starts_ptr, starts_ptr, tl.program_id(1), Sk_all, Sq_all, sequences,
                BLOCK_N, PACKED, SEQUENCES, True,
            )  # fmt: skip
        offset = Sk_again - Sq_again
        # queries from the first that sees this tile; from `whole` on they see all of it
        first = tl.maximum(0, column - offset) // BLOCK_M * BLOCK_M if CAUSAL else 0
        last = Sq_again
        if WINDOW > 0:
            last = tl.minimum(Sq_again, tl.maximum(0, column + BLOCK_N - 1 - offset + WINDOW))
            whole = last
        elif CAUSAL:
            whole = tl.maximum(0, column + BLOCK_N - 1 - offset)
            whole = tl.minimum(Sq_again, (whole + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
        else:
            whole = 0
        head = h * G + part * (G // PARTS) + g
        stride_s = row_stride_s if NARROW else tl.cast(row_stride_s, tl.int64)
        here = b * row_stride_b + start_again.to(tl.int64) * row_stride_s + head * row_stride_h
        side = b * lse_stride_b + head * lse_stride_h + start_again
        for row in range(first, whole, BLOCK_M):
            dk0, dk1, dv0, dv1 = _keys_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr + here, grad_ptr + here,
                lse_ptr + side, delta_ptr + side, stride_s, row, Sq_again, offset, j,
                D, D0, D1, BLOCK_M, CAUSAL, WINDOW, True, PRECISION, UPCAST,
            )  # fmt: skip
        for row in range(whole, last, BLOCK_M):
            dk0, dk1, dv0, dv1 = _keys_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr + here, grad_ptr + here,
                lse_ptr + side, delta_ptr + side, stride_s, row, Sq_again, offset, j,
                D, D0, D1, BLOCK_M, CAUSAL, WINDOW, False, PRECISION, UPCAST,
            )  # fmt: skip
    if PACKED and G > PARTS:  # likewise
        _, column, key_start, Sk, _, _ = find_tile(
            key_starts_ptr, starts_ptr, tl.program_id(1), Sk_all, Sq_all, sequences,
            BLOCK_N, PACKED, SEQUENCES, True,
        )  # fmt: skip
        j = column + tl.arange(0, BLOCK_N)
        is_key = j < Sk
        at = (key_start + j).to(tl.int64)
    out_at = b * dk_stride_b + at * dk_stride_s + h * dk_stride_h + part.to(tl.int64) * part_stride
    element = dk_ptr.dtype.element_ty
    # queries carry scale * log2(e), of which the gradient wants scale
    tl.store(dk_ptr + out_at[:, None] + d0[None, :], (dk0 * LN_2).to(element), mask=is_key[:, None])
    tl.store(dv_ptr + out_at[:, None] + d0[None, :], dv0.to(element), mask=is_key[:, None])
    if D1 > 0:
        inside = is_key[:, None] & (d1 < D)[None, :]
        tl.store(dk_ptr + out_at[:, None] + d1[None, :], (dk1 * LN_2).to(element), mask=inside)
        tl.store(dv_ptr + out_at[:, None] + d1[None, :], dv1.to(element), mask=inside)
    if ROTATE and PARTS == 1:
        position_rows = positions_ptr + b * position_stride_b + at * position_stride_s
        turn_back(
            dk_ptr + out_at, is_key, position_rows, position_stride_a, axis_ptr, hi_ptr, lo_ptr,
            D, R, PAIR_STRIDE, D0, D1,
        )  # fmt: skip


@triton.jit
def sum_parts_kernel(
    parts_k_ptr,  # [PARTS, rows, D] float32: the parts' gradients of turned keys and of values
    parts_v_ptr,
    dk_ptr,  # [rows, D], a row a token and head
    dv_ptr,
    positions_ptr,
    axis_ptr,
    hi_ptr,
    lo_ptr,
    position_stride_a,
    position_stride_b,
    position_stride_s,
    rows,
    H,
    S,  # tokens of a sequence; all where packed
    PARTS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIR_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two, at least D
    BLOCK: tl.constexpr,
):
    """Sum over parts, in their order; the keys' gradient is turned back."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < rows
    d = tl.arange(0, WIDTH)
    inside = is_row[:, None] & (d < D)[None, :]
    token = row // H
    position_rows = positions_ptr + token // S * position_stride_b + token % S * position_stride_s
    dk = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        at = (part * rows.to(tl.int64) + row) * D
        dk += turned(
            parts_k_ptr + at, is_row, d, position_rows, position_stride_a, axis_ptr, hi_ptr, lo_ptr,
            D, R, PAIR_STRIDE, -1,
        )  # fmt: skip
        dv += tl.load(parts_v_ptr + at[:, None] + d[None, :], mask=inside, other=0.0)
    element = dk_ptr.dtype.element_ty
    tl.store(dk_ptr + (row * D)[:, None] + d[None, :], dk.to(element), mask=inside)
    tl.store(dv_ptr + (row * D)[:, None] + d[None, :], dv.to(element), mask=inside)
