"""Attention whose queries and keys are turned by real-valued positions: the definition."""

import torch
from torch import Tensor

from clinkd.ops.reference.rotary import rotary
from clinkd.rotary import RotarySpec


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    spec: RotarySpec,
    *,
    key_positions: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    turned_keys: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * R(q) R(k)^T + mask) v with R the rotation of `reference.rotary`.

    Query i of Sq and key j of Sk meet where both hold: `causal` is off or j <= i + Sk - Sq (the
    last query sees the last key), and `window` is None or i + Sk - Sq - window < j. Query head h
    reads key and value head h // (Hq / Hkv). A query that sees no key gives 0 and lse -inf. With
    `turned_keys`, k is R(k) already.

    Shapes:
        q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D], positions [A, B, S]; or packed, every sequence
        for itself: [N, H, D], [A, N], `cu_seqlens` int32 [n + 1].

    Returns:
        Output like q, and the log of the softmax's denominator, float32 (float64 for float64)
        [B, Hq, Sq] or [Hq, N].
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_turned = rotary(q.to(compute), positions, spec)
    k_turned = k.to(compute)
    if not turned_keys:
        key_positions = positions if key_positions is None else key_positions
        k_turned = rotary(k_turned, key_positions, spec)
    v = v.to(compute)
    if cu_seqlens is None:
        out, lse = _attend(q_turned, k_turned, v, causal, scale, window)
        return out.to(q.dtype), lse
    starts = cu_seqlens.tolist()
    key_starts = starts if cu_seqlens_k is None else cu_seqlens_k.tolist()
    # made of their inputs, so that rows outside every sequence are 0 and have gradients
    out = q_turned * 0
    lse = out.sum(-1).T - torch.inf
    for i in range(len(starts) - 1):
        queries, keys = slice(*starts[i : i + 2]), slice(*key_starts[i : i + 2])
        part, part_lse = _attend(
            q_turned[None, queries], k_turned[None, keys], v[None, keys], causal, scale, window
        )
        out[queries], lse[:, queries] = part[0], part_lse[0]
    return out.to(q.dtype), lse


def visible(
    queries: int, keys: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which key each query sees, bool [queries, keys]."""
    i = torch.arange(queries, device=device)[:, None] + keys - queries
    j = torch.arange(keys, device=device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= i - window < j
    return seen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    seen = visible(q.shape[1], k.shape[1], causal, window, q.device)
    blind = ~seen.any(-1)  # [Sq]
    scores = scores.masked_fill(~(seen | blind[:, None]), -torch.inf)
    if k.shape[1] == 0:
        empty = scores.sum(-1)
        return torch.einsum("bhij,bjhd->bihd", scores, v), empty - torch.inf
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(blind[:, None], 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse.masked_fill(blind, -torch.inf)
