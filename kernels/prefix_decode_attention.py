"""Attention of hypotheses that share one prompt, in Triton.

All hypotheses × query heads of one key-value head are the rows of one tile, so that keys and values
of the prompt are read once for all of them, and by the tensor cores. The prompt and what follows it
are cut into pieces; each piece leaves its output and log-sum-exp, and a second kernel merges them
(the split of Flash-Decoding; the merge is that of Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from clinkd.kernels.common import INTERPRETED, LOG2_E, capability
from torch import Tensor


@triton.jit
def _piece_kernel(
    q_ptr,  # [B, K, Hkv * G, D]
    prefix_k_ptr,  # [B, Hkv, P, D]
    prefix_v_ptr,
    suffix_k_ptr,  # [B, Hkv, M, D]
    suffix_v_ptr,
    prefix_lengths_ptr,  # [B] int32
    suffix_lengths_ptr,  # [B] int32
    visible_ptr,  # [B, K, M] bytes
    piece_out_ptr,  # [B * Hkv, pieces, K * G, D] float32 out
    piece_lse_ptr,  # [B * Hkv, pieces, K * G] float32 out, of scores in powers of two
    q_stride_b,
    q_stride_k,
    q_stride_h,
    prefix_stride_b,  # keys and values of a part have the same strides
    prefix_stride_h,
    prefix_stride_n,
    suffix_stride_b,
    suffix_stride_h,
    suffix_stride_n,
    K,
    M,
    scale,  # softmax scale * log2(e)
    PREFIX_PIECES: tl.constexpr,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,  # places a piece
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # of B * Hkv
    piece = tl.program_id(1)
    pieces = tl.num_programs(1)
    b, h = head // Hkv, head % Hkv
    rows = tl.program_id(2) * BLOCK_R + tl.arange(
        0, BLOCK_R
    )  # row = hypothesis * G + query head of the group
    d = tl.arange(0, BLOCK_D)
    hypothesis = rows // G
    is_row = rows < K * G
    q_at = b * q_stride_b + hypothesis * q_stride_k + (h * G + rows % G) * q_stride_h
    q = tl.load(
        q_ptr + q_at[:, None] + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0
    )  # [BLOCK_R, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)

    in_prefix = piece < PREFIX_PIECES
    if in_prefix:
        k_ptr = prefix_k_ptr + b * prefix_stride_b + h * prefix_stride_h
        v_ptr = prefix_v_ptr + b * prefix_stride_b + h * prefix_stride_h
        stride_n = prefix_stride_n
        start = piece * PIECE
        end = tl.minimum(start + PIECE, tl.load(prefix_lengths_ptr + b))
    else:
        k_ptr = suffix_k_ptr + b * suffix_stride_b + h * suffix_stride_h
        v_ptr = suffix_v_ptr + b * suffix_stride_b + h * suffix_stride_h
        stride_n = suffix_stride_n
        start = (piece - PREFIX_PIECES) * PIECE
        end = tl.minimum(start + PIECE, tl.load(suffix_lengths_ptr + b))

    largest = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < end)[:, None] & (d < D)[None, :]
        at = n.to(tl.int64)[:, None] * stride_n + d[None, :]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        # rows of other hypotheses' places are masked, not skipped: shared ancestors are read once
        seen = is_row[:, None] & (n < end)[None, :]
        visible = tl.load(
            visible_ptr + (b * K + hypothesis[:, None]) * M + n[None, :],
            mask=seen & (in_prefix == 0),
            other=1,
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_R, BLOCK_N]
        scores = tl.where(seen & (visible != 0), scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # finite, so that a row without any visible place gives 0 and not NaN
        base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        p = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(largest - base)
        total = total * rescale + tl.sum(p, axis=1)
        out = out * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest

    row_at = (head * pieces + piece) * (K * G) + rows
    saw = total > 0
    divisor = tl.where(saw, total, 1.0)
    lse = tl.where(saw, largest + tl.log2(divisor), -float("inf"))
    out = out / divisor[:, None]
    tl.store(piece_lse_ptr + row_at, lse, mask=is_row)
    tl.store(
        piece_out_ptr + row_at[:, None] * D + d[None, :],
        out,
        mask=is_row[:, None] & (d < D)[None, :],
    )


@triton.jit
def _merge_kernel(
    piece_out_ptr,  # [B * Hkv, pieces, K * G, D] float32
    piece_lse_ptr,  # [B * Hkv, pieces, K * G] float32
    out_ptr,  # [B, K, Hkv * G, D] out, contiguous
    pieces,
    K,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    b, h = head // Hkv, head % Hkv
    piece = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    row_at = (head * pieces + piece) * (K * G) + row
    lse = tl.load(piece_lse_ptr + row_at, mask=piece < pieces, other=-float("inf"))
    largest = tl.max(lse, axis=0)
    saw = largest > -float("inf")
    weight = tl.exp2(lse - tl.where(saw, largest, 0.0))
    total = tl.where(saw, tl.sum(weight, axis=0), 1.0)
    out = tl.load(
        piece_out_ptr + row_at[:, None] * D + d[None, :],
        mask=(piece < pieces)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    merged = tl.where(saw, tl.sum(out * weight[:, None], axis=0) / total, float("nan"))
    out_at = ((b * K + row // G) * Hkv + h) * G + row % G
    tl.store(out_ptr + out_at * D + d, merged.to(out_ptr.dtype.element_ty), mask=d < D)


def piece_places(B: int, Hkv: int, P: int, processors: int) -> int:
    """Places a piece: enough pieces to fill the device twice, but none below 128 places."""
    wanted = max(1, 2 * processors // max(1, B * Hkv))
    return max(128, triton.next_power_of_2(triton.cdiv(P, wanted)))


def tile(rows: int, element_size: int, arch: int) -> dict[str, Any]:
    """Tile, warps and stages for K * G rows: those that compile without spills.

    Args:
        arch: as `capability` gives it.
    """
    if element_size > 2:
        # float32 as three TF32 products on tensor cores: its own FMAs spill thousands of registers;
        # more than 32 rows are cut, and read the keys more than once
        block_r = min(32, max(16, triton.next_power_of_2(rows)))
        return dict(BLOCK_R=block_r, BLOCK_N=16, PRECISION="tf32x3", num_warps=8, num_stages=2)
    block_r = min(128, max(16, triton.next_power_of_2(rows)))
    if block_r >= 64:
        block_n = 16 if block_r == 128 and arch >= 120 else 32
        return dict(BLOCK_R=block_r, BLOCK_N=block_n, PRECISION="tf32", num_warps=8, num_stages=3)
    return dict(BLOCK_R=block_r, BLOCK_N=64, PRECISION="tf32", num_warps=4, num_stages=3)


def launch(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_lengths: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """Run both kernels; nothing here waits for the device.

    Lengths are read on the device, so that a captured CUDA graph serves every step.

    Args:
        prefix_k, suffix_k: rows of D side by side, with the strides of `prefix_v`, `suffix_v`.
        prefix_lengths, suffix_lengths: [B] int32.
        visible: [B, K, M] bool, contiguous.
    """
    B, K, Hq, D = q.shape
    Hkv, P, M = prefix_k.shape[1], prefix_k.shape[2], suffix_k.shape[2]
    G = Hq // Hkv
    place = piece_places(B, Hkv, P, _processors(q.device))
    prefix_pieces = triton.cdiv(P, place)
    pieces = prefix_pieces + triton.cdiv(M, place)
    float32 = dict(dtype=torch.float32, device=q.device)
    piece_out = torch.empty(B * Hkv, pieces, K * G, D, **float32)
    piece_lse = torch.empty(B * Hkv, pieces, K * G, **float32)
    out = torch.empty(B, K, Hq, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    block_d = max(16, triton.next_power_of_2(D))
    settings = tile(K * G, q.element_size(), capability(q.device))
    _piece_kernel[(B * Hkv, pieces, triton.cdiv(K * G, settings["BLOCK_R"]))](
        q,
        prefix_k,
        prefix_v,
        suffix_k,
        suffix_v,
        prefix_lengths,
        suffix_lengths,
        visible.view(torch.uint8),
        piece_out,
        piece_lse,
        *q.stride()[:3],
        *prefix_k.stride()[:3],
        *suffix_k.stride()[:3],
        K,
        M,
        scale * LOG2_E.value,
        PREFIX_PIECES=prefix_pieces,
        Hkv=Hkv,
        G=G,
        D=D,
        PIECE=place,
        BLOCK_D=block_d,
        UPCAST=INTERPRETED,
        **settings,
    )
    _merge_kernel[(B * Hkv, K * G)](
        piece_out,
        piece_lse,
        out,
        pieces,
        K,
        Hkv=Hkv,
        G=G,
        D=D,
        BLOCK_P=triton.next_power_of_2(pieces),
        BLOCK_D=block_d,
        num_warps=1,
    )
    return out


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter few, so that tests still split."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
