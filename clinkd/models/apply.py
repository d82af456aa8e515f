"""The positions of ClinKD inside Hugging Face's Qwen-VL models."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from clinkd.rotary import PositionConfig, RotarySpec

CONFIG_KEY = "clinkd_positions"  # in config.json: a checkpoint knows its own positions
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class AxisRotaryEmbedding(nn.Module):
    """Cosines and sines for Hugging Face's attention, each pair turned by its own axis.

    The attention pairs component i with i + D / 2. For other layouts the head's channels would be
    permuted, in queries and keys alike, which changes no score: only axis and speed of a pair count.
    """

    def __init__(self, axis: Tensor, inv_freq: Tensor) -> None:
        super().__init__()
        self.axis = nn.Buffer(axis, persistent=False)  # [R]
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)  # [R] float32

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, S, D] in x's dtype; position_ids [3, B, S], rows 1 and 2 are h, w."""
        positions = position_ids[-2:].float()  # [2, B, S]
        angle = positions[self.axis].permute(1, 2, 0) * self.inv_freq.float()  # [B, S, R]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1).to(x.dtype), torch.cat([sin, sin], -1).to(x.dtype)


def apply(model: PreTrainedModel, positions: PositionConfig) -> PreTrainedModel:
    """Give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model the positions of a preset, in place.

    `mrope` leaves the model as it came. The choice is saved with the model's config.

    Raises:
        ValueError: another architecture.
    """
    if model.config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model must be one of {', '.join(MODEL_TYPES)}, got {model.config.model_type!r}"
        )
    setattr(model.config, CONFIG_KEY, positions.to_json())
    if positions.preset == "mrope":
        return model
    core = model.model
    core.get_rope_index = MethodType(_rope_index(positions), core)
    rotary = core.language_model.rotary_emb
    pairs = rotary.inv_freq.shape[0]
    if positions.preset == "paper":
        spec = RotarySpec.split(2 * pairs)
        axis, inv_freq = torch.tensor(spec.axis), torch.tensor(spec.inv_freq)
    elif positions.preset == "warm":
        axis, inv_freq = torch.arange(pairs) % 2, rotary.inv_freq.detach().clone()
    else:
        return model  # gap2 turns with the checkpoint's own axes and speeds
    embedding = AxisRotaryEmbedding(axis, inv_freq.float())
    core.language_model.rotary_emb = embedding.to(rotary.inv_freq.device)
    return model


def _rope_index(positions: PositionConfig) -> Any:
    """A `get_rope_index` that follows a preset."""

    def get_rope_index(
        self: Any,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Positions float32 [3, B, S] and next position minus token count [B, 1]."""
        if video_grid_thw is not None:
            raise ValueError(f"positions {positions.preset!r} are for images; use preset 'mrope'")
        image_mask = input_ids == self.config.image_token_id
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = None
        valid = torch.ones_like(image_mask) if attention_mask is None else attention_mask.bool()
        grids = _grids_by_row(
            (image_mask & valid).sum(1).tolist(),
            [] if image_grid_thw is None else image_grid_thw.tolist(),
            self.config.vision_config.spatial_merge_size,
        )
        where, following = positions.positions(image_mask, grids, attention_mask)
        if where.shape[0] == 2:
            where = torch.cat([where[:1], where])
        return where, (following - valid.sum(1))[:, None]

    return get_rope_index


def _grids_by_row(
    counts: list[int], grids: list[list[int]], merge: int
) -> list[list[tuple[int, int]]]:
    """Deal the batch's images out to rows by their number of image tokens."""
    images = iter(grids)
    out = []
    for row, count in enumerate(counts):
        mine: list[tuple[int, int]] = []
        while sum(h * w for h, w in mine) < count:
            grid = next(images, None)
            if grid is None:
                raise ValueError(f"row {row} has {count} image tokens, but its images have fewer")
            frames, height, width = grid
            mine += [(height // merge, width // merge)] * frames
        out.append(mine)
    return out


def load(
    path: str, *, positions: PositionConfig | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a checkpoint with the positions that it was saved with, or with these.

    Args:
        path: hub name or folder.
        positions: for a checkpoint that names none; one that does keeps its own.

    Raises:
        ValueError: an architecture that is none of Qwen2-VL, Qwen2.5-VL, Qwen3-VL.
    """
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    saved = getattr(model.config, CONFIG_KEY, None)
    chosen = PositionConfig.from_json(saved) if saved else positions
    return apply(model, chosen or PositionConfig("mrope"))
