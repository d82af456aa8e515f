"""Rotary attention on the CPU: turned once, then torch's flash kernel where its masks allow.

The work is cut into blocks of queries and keys that one call of that kernel takes; no mask is ever
made of more than `CHUNK` queries. Gradients are turned back where they lie.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clinkd.ops.rotary import resolve_rotary, turn, turn_inplace

CHUNK = 256  # queries a mask is made for at once

# queries and keys of one call; whether causal, the first query seeing the first key; a mask
Block = tuple[slice, slice, bool, Tensor | None]


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
    # torch's kernel takes a head's tokens a few percent faster where they lie side by side
    q_turned = turn(q, positions, spec, False, impl, heads_first=True)
    k_turned = k
    if key_positions is not None:
        k_turned = turn(k, key_positions, spec, False, impl, heads_first=True)
    q, k, v = _heads_first(q_turned), _heads_first(k_turned), _heads_first(v)
    if _in_one(q, k, causal, cu_seqlens, window):
        out, lse = _flash(q, k, v, causal and q.shape[2] > 1, None, scale)
    else:
        out = _zeros(q)
        lse = empty_lse(q.transpose(1, 2)).fill_(-torch.inf)
        for queries, keys, square, mask in _blocks(q, k, causal, cu_seqlens, cu_seqlens_k, window):
            out[:, :, queries], lse[:, :, queries] = _flash(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], square, mask, scale
            )
    out = out.transpose(1, 2).contiguous()  # torch lays it out as q
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
    if cu_seqlens is not None:
        of_q, of_k, of_v = of_q[0], of_k[0], of_v[0]
    impl = resolve_rotary("auto", of_q.device, of_q.dtype)
    turn_inplace(of_q, positions, spec, True, impl)
    if key_positions is not None:
        turn_inplace(of_k, key_positions, spec, True, impl)
    return of_q, of_k, of_v


def empty_lse(q: Tensor) -> Tensor:
    """[B, H, S] or [H, N] for queries [B, S, H, D] or [N, H, D], laid out as the kernel does it."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:-1], dtype=dtype).transpose(-1, -2)


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
