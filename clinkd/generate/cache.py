"""Keys and values of questions whose hypotheses share one prompt.

A question owns a slot: its prompt's keys and values, stored once, and behind them one place for every
hypothesis of every step. Hypotheses never move: which places a hypothesis may see is a row of a mask,
so that reordering beams moves bits and not tensors, and all hypotheses × query heads of a key-value
head are the rows of one attention call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "clinkd_shared_prefix"


class PrefixCache:
    """Keys and values [slots, Hkv, prefix + steps * hypotheses, D] of every layer.

    Args:
        slots: questions at a time.
        hypotheses: K, beams or samples of a question.
        prefix: most prompt tokens.
        steps: most generated tokens.
    """

    def __init__(self, slots: int, hypotheses: int, prefix: int, steps: int) -> None:
        self.slots, self.hypotheses, self.prefix, self.steps = slots, hypotheses, prefix, steps
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.visible: Tensor = torch.zeros(0)  # bool [slots, K, places]
        self.step: Tensor = torch.zeros(slots, dtype=torch.int64)  # tokens generated, of each slot
        self.active = 0  # slots in use are the first ones
        self._length = prefix  # places in use, over all slots

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for t in self.keys + self.values)

    def admit(self, slot: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Store a prompt, keys and values [Hkv, S, D] of each layer, in the next free slot."""
        length = keys[0].shape[1]
        places = self.prefix + self.steps * self.hypotheses
        if not self.keys:
            for source in keys:
                shape = (self.slots, source.shape[0], places, source.shape[2])
                self.keys.append(source.new_zeros(shape))
                self.values.append(source.new_zeros(shape))
            shape3 = (self.slots, self.hypotheses, places)
            self.visible = torch.zeros(shape3, dtype=torch.bool, device=keys[0].device)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer][slot, :, :length] = key
            self.values[layer][slot, :, :length] = value
        self.visible[slot] = False
        self.visible[slot, :, :length] = True
        self.step[slot] = 0
        self.active = max(self.active, slot + 1)

    def begin_step(self, parents: Tensor) -> None:
        """Give hypotheses the history of their parents, and a place for the token to come.

        Args:
            parents: int64 [active, K], which hypothesis each one continues.
        """
        slots, hypotheses = parents.shape
        rows = torch.arange(slots, device=parents.device)[:, None]
        seen = self.visible[:slots][rows, parents]
        own = self._places()
        seen[rows, torch.arange(hypotheses, device=parents.device)[None], own] = True
        self.visible[:slots] = seen
        self._length = int(self.prefix + (int(self.step[:slots].max()) + 1) * hypotheses)

    def end_step(self) -> None:
        """Count the token."""
        self.step[: self.active] += 1

    def _places(self) -> Tensor:
        """Where the current step's keys go: [active, K]."""
        first = self.prefix + self.step[: self.active] * self.hypotheses
        return (first[:, None] + torch.arange(self.hypotheses)).to(self.visible.device)

    def move(self, source: int, target: int) -> None:
        """Let a slot take another's place; the last slot in use becomes free."""
        if source != target:
            end = self.prefix + int(self.step[source]) * self.hypotheses
            for tensor in self.keys + self.values:
                tensor[target, :, :end] = tensor[source, :, :end]
            self.visible[target] = self.visible[source]
            self.step[target] = self.step[source]
        self.active -= 1

    # what transformers' attention layers call -----------------------------------------------

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values, [active * K, Hkv, 1, D]."""
        heads, dim = key.shape[1], key.shape[3]
        shape = (self.active, self.hypotheses, heads, dim)
        rows = torch.arange(self.active, device=key.device)[:, None]
        places = self._places()
        self.keys[layer][rows, :, places] = key.reshape(shape)
        self.values[layer][rows, :, places] = value.reshape(shape)
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks whether there is a past; there is."""
        return self._length

    def attend(self, query: Tensor, layer: int, scale: float) -> Tensor:
        """Attention of this step's queries [active * K, Hq, 1, D] → [active * K, 1, Hq, D]."""
        rows, heads, _, dim = query.shape
        key = self.keys[layer][: self.active, :, : self._length]
        value = self.values[layer][: self.active, :, : self._length]
        kv_heads = key.shape[1]
        group = heads // kv_heads
        # [slots, K, Hkv, G, D] -> [slots, Hkv, K * G, D]: one tile of rows a key-value head
        q = query.reshape(self.active, self.hypotheses, kv_heads, group, dim).transpose(1, 2)
        q = q.reshape(self.active, kv_heads, self.hypotheses * group, dim)
        mask = self.visible[: self.active, :, : self._length].repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, key, value, mask[:, None], scale=scale)
        out = out.reshape(self.active, kv_heads, self.hypotheses, group, dim).transpose(1, 2)
        return out.reshape(rows, 1, heads, dim)


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
