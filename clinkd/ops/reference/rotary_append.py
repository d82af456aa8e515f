"""Keys turned and put into a cache with their values, in plain torch: the definition."""

import torch
from torch import Tensor

from clinkd.ops.reference.rotary import rotary
from clinkd.rotary import RotarySpec


def rotary_append(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    spec: RotarySpec,
    key_cache: Tensor,
    value_cache: Tensor,
    starts: Tensor,
) -> None:
    """Write new tokens into the caches in place.

        key_cache[b, starts[b] + s] = rotary(k)[b, s]        value_cache[b, starts[b] + s] = v[b, s]

    A token whose slot the caches do not have is not written.

    Shapes:
        B: rows; S: new tokens; L: slots of a row; H: key-value heads; D: head dim; A: axes.

    Args:
        k: [B, S, H, D], not turned.
        v: [B, S, H, D].
        positions: [A, B, S] float32.
        key_cache: [B, L, H, D] of turned keys, changed.
        value_cache: [B, L, H, D], changed.
        starts: [B] int64, each row's slot of its first new token.
    """
    B, S = k.shape[:2]
    slots = starts[:, None] + torch.arange(S, device=k.device)  # [B, S]
    there = (slots >= 0) & (slots < key_cache.shape[1])
    rows = torch.arange(B, device=k.device)[:, None].expand(B, S)
    key_cache[rows[there], slots[there]] = rotary(k, positions, spec)[there]
    value_cache[rows[there], slots[there]] = v[there]
