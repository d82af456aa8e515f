"""Rotary attention on the CPU: turned once, then torch's flash kernel where its masks allow.

The work is cut into blocks of queries and keys that one call of that kernel takes; no mask is ever
made of more than `CHUNK` queries. Gradients are turned back where they lie.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from clinkd.ops.rotary import resolve_rotary, turn, turn_inplace

CHUNK = 256  # queries a mask is made for at once


class Block(NamedTuple):
    """Queries and keys of one call, and what hides keys from queries there."""

    queries: slice
    keys: slice
    square: bool = False  # causal, the first query seeing the first key
    place: int | None = None  # of the first query among the keys; a mask is needed then


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    key_positions: Tensor | None,
    spec: int,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's outputs, see `clinkd.ops._rotary_attention`."""
    impl = resolve_rotary("auto", q.device, q.dtype)
    q_turned = turn(q, positions, spec, False, impl)
    k_turned = k if key_positions is None else turn(k, key_positions, spec, False, impl)
    q, k, v = (_heads_first(t) for t in (q_turned, k_turned, v))
    blocks = _blocks(q, k, causal, cu_seqlens, cu_seqlens_k, window)
    if whole := _whole(blocks, q, k):
        out, lse = _flash(q, k, v, whole, causal, window, scale)
    else:
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=lse_type(q.dtype))
        for block in blocks:
            rows = block.queries
            out[:, :, rows], lse[:, :, rows] = _flash(q, k, v, block, causal, window, scale)
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()
    if cu_seqlens is not None:
        out, lse = out[0], lse[0]
    # an operator's output may not be its input
    kept_k = k_turned if keep and key_positions is not None else k_turned.new_empty(0)
    return out, lse, q_turned if keep else q_turned.new_empty(0), kept_k


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q_turned: Tensor,
    k_turned: Tensor,
    v: Tensor,
    positions: Tensor,
    key_positions: Tensor | None,
    spec: int,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    q, k, v, out, grad = (_heads_first(t) for t in (q_turned, k_turned, v, out, grad))
    lse = lse if cu_seqlens is None else lse[None]
    blocks = _blocks(q, k, causal, cu_seqlens, cu_seqlens_k, window)
    kept = (grad, q, k, v, out, lse)
    if whole := _whole(blocks, q, k):
        found = _flash_backward(*kept, whole, causal, window, scale)
    else:
        found = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in blocks:
            of_q, of_k, of_v = _flash_backward(*kept, block, causal, window, scale)
            found[0][:, :, block.queries] = of_q
            found[1][:, :, block.keys] += of_k
            found[2][:, :, block.keys] += of_v
    of_q, of_k, of_v = (t.transpose(1, 2).contiguous() for t in found)
    if cu_seqlens is not None:
        of_q, of_k, of_v = of_q[0], of_k[0], of_v[0]
    impl = resolve_rotary("auto", of_q.device, of_q.dtype)
    turn_inplace(of_q, positions, spec, True, impl)
    if key_positions is not None:
        turn_inplace(of_k, key_positions, spec, True, impl)
    return of_q, of_k, of_v


def lse_type(dtype: torch.dtype) -> torch.dtype:
    """What the kernel sums in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor) -> Tensor:
    """[B, H, S, D] of [B, S, H, D], or of packed [N, H, D], with components side by side."""
    x = x if x.dim() == 4 else x[None]
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.transpose(1, 2)


def _blocks(
    q: Tensor,
    k: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> list[Block]:
    """Of all sequences; a query in none of them sees no key."""
    if q.numel() == 0 or k.numel() == 0:
        return []
    if cu_seqlens is None:
        starts, key_starts = [0, q.shape[2]], [0, k.shape[2]]
    else:
        starts = cu_seqlens.tolist()
        key_starts = starts if cu_seqlens_k is None else cu_seqlens_k.tolist()
    ends = zip(starts, starts[1:], key_starts, key_starts[1:], strict=False)
    return [block for places in ends for block in _blocks_of(*places, causal, window)]


def _blocks_of(
    begin: int, end: int, key_begin: int, key_end: int, causal: bool, window: int
) -> Iterator[Block]:
    """Of one sequence: causal has its last query see its last key."""
    place = (key_end - key_begin) - (end - begin)  # of the first query among the keys
    if causal and place < 0:  # queries before the first key see none
        begin, place = begin - place, 0
    if begin >= end or key_begin == key_end:
        return
    keys = slice(key_begin, key_end)
    if not window and (not causal or place == 0 or end - begin == 1):
        yield Block(slice(begin, end), keys, square=causal and end - begin > 1)
        return
    for first in range(begin, end, CHUNK):
        last = min(first + CHUNK, end)
        here = place + first - begin
        low = max(0, here - window + 1) if window else 0
        high = key_begin + place + last - begin if causal else key_end
        yield Block(slice(first, last), slice(key_begin + low, high), place=here - low)


def _whole(blocks: list[Block], q: Tensor, k: Tensor) -> Block | None:
    """The block of all queries and keys, where there is one."""
    everything = (slice(0, q.shape[2]), slice(0, k.shape[2]))
    return blocks[0] if blocks and blocks[0][:2] == everything else None


def _mask(block: Block, causal: bool, window: int, q: Tensor) -> Tensor | None:
    """0 where a query sees a key, -inf elsewhere."""
    if block.place is None:
        return None
    queries, keys = (s.stop - s.start for s in (block.queries, block.keys))
    i = torch.arange(block.place, block.place + queries, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        hidden |= j > i
    if window:
        hidden |= j <= i - window
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(
        hidden, -torch.inf
    )


def _flash(
    q: Tensor, k: Tensor, v: Tensor, block: Block, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    mask = _mask(block, causal, window, q)
    q, k, v = q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, block.square, attn_mask=mask, scale=scale
    )
    return found


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(block, causal, window, q)
    grad, q, out, lse = (t[:, :, block.queries] for t in (grad, q, out, lse))
    k, v = k[:, :, block.keys], v[:, :, block.keys]
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: tuple[Tensor, Tensor, Tensor] = run(
        grad, q, k, v, out, lse, 0.0, block.square, attn_mask=mask, scale=scale
    )
    return found
