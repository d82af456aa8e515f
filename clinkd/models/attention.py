"""Attention of the language layers and of the vision tower, around the rotary op."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from clinkd.models.layout import Layout, why_not
from clinkd.ops import rotary, rotary_attention
from clinkd.ops.reference.rotary import rotate


def text_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, ...] = (),
    cache: Any = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of a language layer; the cache holds rotated keys.

    With a `layout`, of `lay_out`, by the fused op; the cache is then absent or empty.

    Shapes:
        hidden_states [B, S, C]; `position_embeddings` as `TextRotary` returns them.
    """
    cache = past_key_values if cache is None else cache  # the older name, and that since 5.24
    heads = (-1, self.head_dim)
    q = self.q_proj(hidden_states).unflatten(-1, heads)  # [B, S, Hq, D]
    k = self.k_proj(hidden_states).unflatten(-1, heads)  # [B, S, Hkv, D]
    v = self.v_proj(hidden_states).unflatten(-1, heads)
    if hasattr(self, "q_norm"):  # Qwen3-VL
        q, k = self.q_norm(q), self.k_norm(k)
    if layout is not None:
        out = _attend(self, q, k, v, position_embeddings[0], cache, layout)
        return self.o_proj(out.flatten(2)), None
    v = v.transpose(1, 2)
    q = _turn(self, q, position_embeddings).transpose(1, 2)
    k = _turn(self, k, position_embeddings).transpose(1, 2)
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    out, weights = _interface(self)(
        self,
        q,
        k,
        v,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=getattr(self, "sliding_window", None),
        position_ids=position_ids,
        **kwargs,
    )
    return self.o_proj(out.flatten(2)), weights


def _attend(
    self: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, past: Any, layout: Layout
) -> Tensor:
    """The fused op over q [B, S, Hq, D], k and v [B, S, Hkv, D], positions [A, B, S]."""
    spec, impl = self.rotary
    q, k = q.to(v.dtype), k.to(v.dtype)  # Qwen3-VL's norms give float32 under autocast
    if past is not None:
        k = rotary(k, positions, spec, impl=impl)
        past.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
    shape = q.shape
    if layout.starts is not None:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        positions = positions.flatten(1)
    out = rotary_attention(
        q,
        k,
        v,
        positions,
        spec,
        scale=self.scaling,
        cu_seqlens=layout.starts,
        window=getattr(self, "sliding_window", None),
        turned_keys=past is not None,
    )
    return out.view(shape)  # type: ignore[union-attr]


def vision_attention(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, ...] = (),
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of a block of the vision tower, each image (or window) for itself.

    Shapes:
        hidden_states [N, C]; `cu_seqlens` [images + 1]; `position_embeddings` as `VisionRotary`
        returns them.
    """
    qkv = self.qkv(hidden_states).unflatten(-1, (3 * self.num_heads, -1))  # [N, 3 H, D]
    positions, *tables = position_embeddings
    dropout = self.attention_dropout if self.training else 0.0
    if self.attention != "sdpa":
        reason = why_not(self.config, dropout, qkv.device, qkv.dtype)
        if reason is None:
            spec, _ = self.rotary
            q, k, v = qkv.chunk(3, dim=1)  # [N, H, D]
            starts = cu_seqlens.int()
            out = rotary_attention(
                q, k, v, positions.T, spec, causal=False, scale=self.scaling, cu_seqlens=starts
            )
            return self.proj(out.flatten(1))  # type: ignore[no-any-return, union-attr]
        if self.attention == "fused":
            raise RuntimeError(f"attention='fused' cannot run here: {reason}")
    # queries and keys lie side by side: one call turns both
    qk = _turn(self, qkv[:, : 2 * self.num_heads], (positions.T, *tables))
    q, k = qk.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)  # [1, H, N, D]
    v = qkv[:, 2 * self.num_heads :].transpose(0, 1).unsqueeze(0)
    settings = dict(
        attention_mask=None,
        scaling=self.scaling,
        dropout=dropout,
        is_causal=False,
        **kwargs,
    )
    if is_flash_attention_requested(self.config):
        longest = (
            int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if max_seqlen is None else max_seqlen
        )
        lengths = dict(
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        out = _interface(self)(self, q, k, v, **lengths, **settings)[0]
    else:
        sizes = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        parts = zip(*(torch.split(t, sizes, dim=2) for t in (q, k, v)), strict=True)
        out = torch.cat([_interface(self)(self, *part, **settings)[0] for part in parts], dim=1)
    projected: Tensor = self.proj(out.reshape(hidden_states.shape[0], -1))
    return projected


def _turn(self: Any, x: Tensor, embeddings: tuple[Tensor, ...]) -> Tensor:
    spec, impl = self.rotary
    positions, *tables = embeddings
    if tables:  # the reference: cosine and sine were computed once for all layers
        return rotate(x, tables[0], tables[1], spec)
    return rotary(x, positions, spec, impl=impl)


def _interface(self: Any) -> Any:
    eager = sys.modules[type(self).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
