"""Keys and values of questions whose hypotheses share one prompt.

A question owns a slot: its prompt's keys and values, stored once, and behind them one place for
every hypothesis of every step. Hypotheses never move: which places a hypothesis may see is a row of
a mask, so that reordering beams moves bits and not tensors.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from clinkd.ops.prefix_decode_attention import prefix_decode_attention

ATTENTION = "clinkd_shared_prefix"


class PrefixCache:
    """Keys and values of every layer: prompts [slots, Hkv, P, D], suffixes [slots, Hkv, M, D].

    Slots in use are the first `active` ones. All that changes from step to step lies on the
    device; nothing here waits for it.

    Args:
        slots: questions at a time.
        hypotheses: K, beams or samples of a question.
        prefix: P, most prompt tokens.
        steps: most generated tokens; M = steps * K places.
    """

    def __init__(
        self, slots: int, hypotheses: int, prefix: int, steps: int, device: torch.device
    ) -> None:
        self.slots, self.hypotheses, self.prefix = slots, hypotheses, prefix
        self.places = steps * hypotheses
        self.layers: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # prefix k, v, suffix k, v
        self.prefix_lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.suffix_lengths = torch.zeros_like(self.prefix_lengths)
        self.step = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens generated
        self.visible = torch.zeros(slots, hypotheses, self.places, dtype=torch.bool, device=device)
        self.active = 0
        self._rows = torch.arange(slots, device=device)[:, None]
        self._own = torch.arange(hypotheses, device=device)
        self._at = torch.zeros(0)  # [active, K], places of the current step

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prompts' keys and values."""
        return sum(t.nbytes for layer in self.layers for t in layer[:2])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for layer in self.layers for t in layer)

    def admit(self, slot: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Store a prompt, keys and values [Hkv, S, D] of each layer, in a free slot."""
        # autocast leaves rotated keys and queries in float32, values not
        keys = [key.to(value.dtype) for key, value in zip(keys, values, strict=True)]
        length = keys[0].shape[1]
        if not self.layers:
            for key, value in zip(keys, values, strict=True):
                self.layers.append(
                    tuple(
                        each.new_zeros(self.slots, each.shape[0], room, each.shape[2])
                        for room in (self.prefix, self.places)
                        for each in (key, value)
                    )  # type: ignore[arg-type]
                )
        for layer, key, value in zip(self.layers, keys, values, strict=True):
            layer[0][slot, :, :length] = key
            layer[1][slot, :, :length] = value
        self.prefix_lengths[slot] = length
        self.suffix_lengths[slot] = 0
        self.step[slot] = 0
        self.visible[slot] = False
        self.active = max(self.active, slot + 1)

    def begin_step(self, parents: Tensor) -> None:
        """Give hypotheses the history of their parents, and a place for the token to come.

        Args:
            parents: int64 [active, K], which hypothesis each one continues.
        """
        n = self.active
        self._at = self.step[:n, None] * self.hypotheses + self._own  # [active, K]
        seen = self.visible[:n].gather(1, parents[:, :, None].expand(-1, -1, self.places))
        self.visible[:n] = seen.scatter_(2, self._at[:, :, None], True)
        self.step[:n] += 1
        self.suffix_lengths[:n] += self.hypotheses

    def move(self, source: int, target: int) -> None:
        """Let a slot take another's place; the last slot in use becomes free."""
        if source != target:
            state = (self.prefix_lengths, self.suffix_lengths, self.step, self.visible)
            for tensor in (*state, *(t for layer in self.layers for t in layer)):
                tensor[target] = tensor[source]
        self.active -= 1

    # what transformers' attention layers call -----------------------------------------------

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values, [active * K, Hkv, 1, D]."""
        shape = (self.active, self.hypotheses, key.shape[1], key.shape[3])
        rows = self._rows[: self.active]
        self.layers[layer][2][rows, :, self._at] = key.to(value.dtype).reshape(shape)
        self.layers[layer][3][rows, :, self._at] = value.reshape(shape)
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks whether there is a past; there is."""
        return self.prefix

    def attend(self, query: Tensor, layer: int, scale: float) -> Tensor:
        """Attention of this step's queries [active * K, Hq, 1, D] → [active * K, 1, Hq, D]."""
        n = self.active
        prefix_k, prefix_v, suffix_k, suffix_v = (t[:n] for t in self.layers[layer])
        out = prefix_decode_attention(
            query.to(prefix_k.dtype).reshape(n, self.hypotheses, *query.shape[1::2]),
            prefix_k,
            prefix_v,
            suffix_k,
            suffix_v,
            prefix_lengths=self.prefix_lengths[:n],
            suffix_lengths=self.suffix_lengths[:n],
            visible=self.visible[:n],
            scale=scale,
        )
        return out.flatten(0, 1).unsqueeze(1)


def _shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_cache: PrefixCache,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call instead of their attention while hypotheses decode."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return prefix_cache.attend(query, module.layer_idx, scale), None


AttentionInterface.register(ATTENTION, _shared_prefix_attention)
