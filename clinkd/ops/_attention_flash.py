"""Attention on the CPU by torch's flash kernel, of queries and keys that are turned already.

The work is cut into blocks of queries and keys that one call of that kernel takes; no mask is ever
made of more than `CHUNK` queries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 256  # queries a mask is made for at once

# queries and keys of one call; whether causal, the first query seeing the first key; a mask
Block = tuple[slice, slice, bool, Tensor | None]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> Tensor:
    """Output [B, S, H, D] or [N, H, D]; writes the log-sum-exp to `lse`, [B, H, S] or [H, N]."""
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    lse = lse if cu_seqlens is None else lse[None]
    if _in_one(q, k, causal, cu_seqlens, window):
        out, found = _flash(q, k, v, causal and q.shape[2] > 1, None, scale)
        lse.copy_(found)
    else:
        out = _zeros(q)
        lse.fill_(-torch.inf)
        for queries, keys, square, mask in _blocks(q, k, causal, cu_seqlens, cu_seqlens_k, window):
            out[:, :, queries], lse[:, :, queries] = _flash(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], square, mask, scale
            )
    out = out.transpose(1, 2).contiguous()  # torch lays it out as q
    return out if cu_seqlens is None else out[0]


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    q, k, v, out, grad = (_heads_first(t) for t in (q, k, v, out, grad))
    if _in_one(q, k, causal, cu_seqlens, window):
        square = causal and q.shape[2] > 1
        found = _flash_backward(grad, q, k, v, out, lse, square, None, scale)
    else:
        lse = lse if cu_seqlens is None else lse[None]
        found = _zeros(q), _zeros(k), _zeros(v)
        for queries, keys, square, mask in _blocks(q, k, causal, cu_seqlens, cu_seqlens_k, window):
            of_q, of_k, of_v = _flash_backward(
                grad[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                square,
                mask,
                scale,
            )
            found[0][:, :, queries] = of_q
            found[1][:, :, keys] += of_k
            found[2][:, :, keys] += of_v
    of_q, of_k, of_v = (t.transpose(1, 2).contiguous() for t in found)
    return (of_q, of_k, of_v) if cu_seqlens is None else (of_q[0], of_k[0], of_v[0])


def _heads_first(x: Tensor) -> Tensor:
    """[B, H, S, D] of [B, S, H, D], or of packed [N, H, D], with components side by side."""
    x = x if x.dim() == 4 else x[None]
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.transpose(1, 2)


def _zeros(x: Tensor) -> Tensor:
    """[B, H, S, D] with the heads of a token side by side."""
    return x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2)


def _in_one(q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int) -> bool:
    """Whether one call without a mask does it all."""
    queries, keys = q.shape[2], k.shape[2]
    plain = cu_seqlens is None and not window and q.numel() > 0 and keys > 0
    return plain and (not causal or queries == keys or queries == 1)


def _blocks(
    q: Tensor,
    k: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> Iterator[Block]:
    """Of all sequences; a query in none of the blocks sees no key."""
    if q.numel() == 0 or k.numel() == 0:
        return
    if cu_seqlens is None:
        starts, key_starts = [0, q.shape[2]], [0, k.shape[2]]
    else:
        starts = cu_seqlens.tolist()
        key_starts = starts if cu_seqlens_k is None else cu_seqlens_k.tolist()
    zero = q.new_zeros(())
    places = zip(starts, starts[1:], key_starts, key_starts[1:], strict=False)
    for begin, end, key_begin, key_end in places:
        yield from _blocks_of(begin, end, key_begin, key_end, causal, window, zero)


def _blocks_of(
    begin: int, end: int, key_begin: int, key_end: int, causal: bool, window: int, zero: Tensor
) -> Iterator[Block]:
    """Of one sequence: causal has its last query see its last key."""
    place = (key_end - key_begin) - (end - begin)  # of the first query among the keys
    if causal and place < 0:  # queries before the first key see none
        begin, place = begin - place, 0
    if begin >= end or key_begin == key_end:
        return
    if not window and (not causal or place == 0 or end - begin == 1):
        yield slice(begin, end), slice(key_begin, key_end), causal and end - begin > 1, None
        return
    for first in range(begin, end, CHUNK):
        last = min(first + CHUNK, end)
        here = place + first - begin
        low = max(0, here - window + 1) if window else 0
        high = place + last - begin if causal else key_end - key_begin
        i = torch.arange(here, here + last - first, device=zero.device)[:, None]
        j = torch.arange(low, high, device=zero.device)
        hidden = (j > i) & causal
        if window:
            hidden |= j <= i - window
        mask = zero.expand(hidden.shape).masked_fill(hidden, -torch.inf)
        yield slice(first, last), slice(key_begin + low, key_begin + high), False, mask


def _flash(
    q: Tensor, k: Tensor, v: Tensor, square: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, square, attn_mask=mask, scale=scale
    )
    return found


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    square: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: tuple[Tensor, Tensor, Tensor] = run(
        grad, q, k, v, out, lse, 0.0, square, attn_mask=mask, scale=scale
    )
    return found
