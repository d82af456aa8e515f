"""Attention of hypotheses that share one prompt, in plain torch: the definition."""

import torch
from torch import Tensor


def prefix_decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    suffix_lengths: Tensor,
    prefix_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of every hypothesis over its question's prompt and its own suffix.

        out[b, k] = softmax(scale q K^T) V   over prefix places below `prefix_lengths[b]` and suffix
                                             places below `suffix_lengths[b]` that k may see

    Shapes:
        B: questions; K: hypotheses of a question; Hq = G * Hkv query heads; P: room for prompts;
        M: room for what follows them, all hypotheses of a question together.

    Args:
        q: [B, K, Hq, D], rotated.
        prefix_k, prefix_v: [B, Hkv, P, D], rotated keys and values of the prompts.
        suffix_k, suffix_v: [B, Hkv, M, D], of all tokens generated for a question.
        suffix_lengths: [B] int, places in use.
        prefix_lengths: [B] int; default: all P.
        visible: [B, K, M] bool, which places a hypothesis descends from, its own included; default:
            every K-th one, starting with its own number.
        scale: default `D ** -0.5`.

    Returns:
        [B, K, Hq, D] in q's dtype; computed in float32, float64 for float64. A hypothesis that sees
        nothing at all gets NaN.
    """
    B, K, Hq, D = q.shape
    Hkv, P, M = prefix_k.shape[1], prefix_k.shape[2], suffix_k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    key = torch.cat([prefix_k, suffix_k], dim=2).to(compute)  # [B, Hkv, P + M, D]
    value = torch.cat([prefix_v, suffix_v], dim=2).to(compute)
    if prefix_lengths is None:
        prefix_lengths = torch.full((B,), P, device=q.device)
    if visible is None:
        visible = default_visible(B, K, M, q.device)

    in_prefix = torch.arange(P, device=q.device) < prefix_lengths[:, None]  # [B, P]
    in_suffix = torch.arange(M, device=q.device) < suffix_lengths[:, None]  # [B, M]
    seen = torch.cat(
        [in_prefix[:, None].expand(B, K, P), visible & in_suffix[:, None]], dim=2
    )  # [B, K, P + M]

    query = q.to(compute).reshape(B, K, Hkv, Hq // Hkv, D)
    scores = torch.einsum("bkhgd,bhnd->bkhgn", query, key) * (D**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen[:, :, None, None], float("-inf")).softmax(dim=-1)
    # what nobody sees may be uninitialised: 0 * NaN must not reach the sum
    value = value.masked_fill(~seen.any(dim=1)[:, None, :, None], 0.0)
    out = torch.einsum("bkhgn,bhnd->bkhgd", weights, value).reshape(B, K, Hq, D).to(q.dtype)
    return out.masked_fill(~seen.any(dim=2)[:, :, None, None], torch.nan)  # without places it is 0


def default_visible(B: int, K: int, M: int, device: torch.device) -> Tensor:
    """[B, K, M]: the places of hypothesis k are k, k + K, k + 2 K, …"""
    own = torch.arange(M, device=device) % K == torch.arange(K, device=device)[:, None]
    return own.expand(B, K, M)
