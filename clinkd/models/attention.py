"""Attention of the language layers and of the vision tower, around the rotary op."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from clinkd.ops.reference.rotary import rotate
from clinkd.ops.rotary import rotary


def text_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, ...] = (),
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of a language layer; the cache holds rotated keys.

    Shapes:
        hidden_states [B, S, C]; `position_embeddings` as `TextRotary` returns them.
    """
    heads = (-1, self.head_dim)
    q = self.q_proj(hidden_states).unflatten(-1, heads)  # [B, S, Hq, D]
    k = self.k_proj(hidden_states).unflatten(-1, heads)  # [B, S, Hkv, D]
    v = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
    if hasattr(self, "q_norm"):  # Qwen3-VL
        q, k = self.q_norm(q), self.k_norm(k)
    q = _turn(self, q, position_embeddings).transpose(1, 2)
    k = _turn(self, k, position_embeddings).transpose(1, 2)
    cache = past_key_values if cache is None else cache  # the older name, and that since 5.24
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
    # queries and keys lie side by side: one call turns both
    qk = _turn(self, qkv[:, : 2 * self.num_heads], (positions.T, *tables))
    q, k = qk.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)  # [1, H, N, D]
    v = qkv[:, 2 * self.num_heads :].transpose(0, 1).unsqueeze(0)
    settings = dict(
        attention_mask=None,
        scaling=self.scaling,
        dropout=self.attention_dropout if self.training else 0.0,
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
