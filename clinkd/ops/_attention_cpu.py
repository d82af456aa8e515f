"""Attention over turned queries and keys on the CPU: torch's flash kernel where its masks allow.

No mask is ever made of more than `CHUNK` queries. Packed sequences come one after another; their
lengths are numbers that a compiled graph has not, so that `torch.compile` sees one operator there.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # queries a mask is made for at once
LIBRARY = torch.library.Library("clinkd", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPTIONS = "bool causal, float scale, Tensor starts, Tensor key_starts, int? window"
torch.library.define(
    "clinkd::packed_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    lib=LIBRARY,
)
torch.library.define(
    "clinkd::packed_attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    lib=LIBRARY,
)


def attend_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output like q and lse; arguments and shapes as of `rotary_attention`, q and k turned."""
    if cu_seqlens is None:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = _attend(q, k, v, causal, scale, window)
        return out.transpose(1, 2), lse
    key_starts = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor] = torch.ops.clinkd.packed_attention(
            q, k, v, causal, scale, cu_seqlens, key_starts, window
        )
        return found
    return _packed(q, k, v, causal, scale, cu_seqlens, key_starts, window)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    starts, key_starts = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    parts = []
    for i in range(len(starts) - 1):
        queries, keys = slice(*starts[i : i + 2]), slice(*key_starts[i : i + 2])
        a, b, c = (t.transpose(0, 1)[None] for t in (q[queries], k[keys], v[keys]))
        parts.append(_attend(a, b, c, causal, scale, window))
    outs = [out[0] for out, _ in parts] or [q.transpose(0, 1)]
    lses = [lse[0] for _, lse in parts] or [q.new_zeros(q.shape[1], 0, dtype=torch.float32)]
    return torch.cat(outs, dim=1).transpose(0, 1), torch.cat(lses, dim=1)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _packed(q, k, v, *options)
    return out.contiguous(), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """By computing the output again: nothing of it is kept."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out, _ = _packed(q, k, v, *options)
        of_q, of_k, of_v = torch.autograd.grad(out, (q, k, v), grad)
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale, starts, key_starts, window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, starts, key_starts)
    ctx.settings = (causal, scale, window)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts, key_starts = ctx.saved_tensors
    causal, scale, window = ctx.settings
    found = torch.ops.clinkd.packed_attention_backward(
        grad, q, k, v, causal, scale, starts, key_starts, window
    )
    return (*found, *[None] * 5)


_KEY = "CompositeExplicitAutograd"
torch.library.impl("clinkd::packed_attention", _KEY, _forward, lib=LIBRARY)
torch.library.impl("clinkd::packed_attention_backward", _KEY, _backward, lib=LIBRARY)
torch.library.register_fake("clinkd::packed_attention", _fake, lib=LIBRARY)
torch.library.register_fake("clinkd::packed_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "clinkd::packed_attention", _gradient, setup_context=_save, lib=LIBRARY
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D]; no mask larger than CHUNK queries is ever made."""
    Sq, Sk = q.shape[2], k.shape[2]
    offset = Sk - Sq
    blind = min(max(0, -offset), Sq) if causal else 0
    if q.numel() == 0:
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        return q * 0 + (k.sum() + v.sum()) * 0, lse
    if Sk == 0 or blind:  # queries that see no key give 0
        blind = Sq if Sk == 0 else blind
        zero = q[:, :, :blind] * 0 + (k.sum() + v.sum()) * 0
        lse = torch.full(zero.shape[:3], -torch.inf, device=q.device)
        if blind == Sq:
            return zero, lse
        out, rest = _attend(q[:, :, blind:], k, v, causal, scale, window)
        return torch.cat([zero, out], dim=2), torch.cat([lse, rest], dim=2)
    if window is None and (not causal or Sq == 1):
        return _flash(q, k, v, scale)
    if window is None and offset == 0:
        return _flash(q, k, v, scale, is_causal=True)
    parts = []
    for begin in range(0, Sq, CHUNK):
        end = min(begin + CHUNK, Sq)
        first = 0 if window is None else max(0, begin + offset - window + 1)
        last = end + offset if causal else Sk
        i = torch.arange(begin, end, device=q.device)[:, None] + offset
        j = torch.arange(first, last, device=q.device)
        hidden = torch.zeros(end - begin, last - first, dtype=torch.bool, device=q.device)
        if causal:
            hidden |= j > i
        if window is not None:
            hidden |= j <= i - window
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        mask.masked_fill_(hidden, -torch.inf)
        keys, values = k[:, :, first:last], v[:, :, first:last]
        parts.append(_flash(q[:, :, begin:end], keys, values, scale, mask=mask))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return found
