"""Rotary embeddings with several position axes, and the positions of tokens around images.

For each pair `i` of components: which position axis turns it, and how fast,

    angle[token, i] = positions[axis[i], token] * inv_freq[i]
    (a, b) -> (a cos - b sin, a sin + b cos)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Grids = Sequence[Sequence[tuple[int, int]]]  # of each row, the merged (h, w) of its images in order
Preset = Literal["paper", "warm", "mrope", "gap2"]
PRESETS: tuple[Preset, ...] = ("paper", "warm", "mrope", "gap2")


@dataclass(frozen=True)
class RotarySpec:
    """Which components turn together, by which axis, and how fast.

    Pair `i` is made of components `first = (i // n) * 2n + i % n` and `first + n`, n = `pair_stride`;
    components past `2R` pass through.

    Attributes:
        head_dim: D.
        axis: position axis of each of the R pairs.
        inv_freq: radians a unit of position, of each pair.
        pair_stride: n; 1 is the interleaved layout, D / 2 Hugging Face's half layout.
    """

    head_dim: int
    axis: tuple[int, ...]
    inv_freq: tuple[float, ...]
    pair_stride: int

    def __post_init__(self) -> None:
        pairs = len(self.axis)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {self.head_dim}")
        if len(self.inv_freq) != pairs:
            raise ValueError(
                f"axis and inv_freq must be of one length, got {pairs} and {len(self.inv_freq)}"
            )
        if 2 * pairs > self.head_dim:
            raise ValueError(f"{pairs} pairs do not fit into head_dim {self.head_dim}")
        if self.pair_stride < 1 or pairs % self.pair_stride:
            raise ValueError(
                f"pair_stride must divide the number of pairs {pairs}, got {self.pair_stride}"
            )
        if any(a < 0 for a in self.axis):
            raise ValueError(f"axis must hold numbers from 0, got {self.axis}")

    @property
    def num_axes(self) -> int:
        """A: how many position axes the spec reads."""
        return max(self.axis, default=-1) + 1

    def components(self) -> tuple[Tensor, Tensor]:
        """Indices of the first and second component of every pair, each int64 [R]."""
        i = torch.arange(len(self.axis))
        first = (i // self.pair_stride) * 2 * self.pair_stride + i % self.pair_stride
        return first, first + self.pair_stride

    @classmethod
    def split(
        cls,
        head_dim: int,
        height_dim: int | None = None,
        base: float = 10000.0,
        layout: str = "interleaved",
    ) -> "RotarySpec":
        """The paper's: the first `height_dim` components turn with height, the rest with width.

        Each part has its own ladder `base ** (-2i / d_part)`, i = 0, 1, …

        Args:
            height_dim: default half of `head_dim`.
            layout: "interleaved", or "half" inside each of two equal parts.
        """
        height_dim = head_dim // 2 if height_dim is None else height_dim
        width_dim = head_dim - height_dim
        if height_dim % 2 or width_dim % 2 or not 0 < height_dim < head_dim:
            raise ValueError(
                f"height_dim must be even and leave an even rest of {head_dim}, got {height_dim}"
            )
        if layout == "half" and height_dim != width_dim:
            raise ValueError(
                f"layout 'half' needs two equal parts, got {height_dim} and {width_dim}; "
                "use 'interleaved'"
            )
        return cls(
            head_dim,
            (0,) * (height_dim // 2) + (1,) * (width_dim // 2),
            _ladder(height_dim, base) + _ladder(width_dim, base),
            _stride(layout, height_dim // 2),
        )

    @classmethod
    def alternate(
        cls, head_dim: int, base: float = 10000.0, layout: str = "half"
    ) -> "RotarySpec":
        """One 1-D ladder, even pairs turned by axis 0, odd pairs by axis 1.

        Where the axes agree, as in text, it is the 1-D embedding.
        """
        pairs = head_dim // 2
        axis = tuple(i % 2 for i in range(pairs))
        return cls(head_dim, axis, _ladder(head_dim, base), _stride(layout, pairs))

    @classmethod
    def mrope(
        cls,
        head_dim: int,
        sections: Sequence[int] = (16, 24, 24),
        base: float = 1e6,
        interleaved: bool = False,
    ) -> "RotarySpec":
        """Qwen2-VL's and Qwen2.5-VL's axes t, h, w in sections; Qwen3-VL's with `interleaved`."""
        pairs = head_dim // 2
        if len(sections) != 3 or sum(sections) != pairs:
            raise ValueError(f"sections must be three numbers that add up to {pairs}, got {sections}")
        if interleaved:
            axis = [0] * pairs
            for a in (1, 2):
                for i in range(a, sections[a] * 3, 3):
                    axis[i] = a
        else:
            axis = [a for a, count in enumerate(sections) for _ in range(count)]
        return cls(head_dim, tuple(axis), _ladder(head_dim, base), pairs)

    @classmethod
    def axial(cls, head_dim: int, base: float = 10000.0) -> "RotarySpec":
        """Qwen2-VL's vision tower: head_dim / 4 speeds for height, the same for width."""
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        quarter = head_dim // 4
        axis = (0,) * quarter + (1,) * quarter
        return cls(head_dim, axis, _ladder(head_dim // 2, base) * 2, head_dim // 2)

    @classmethod
    def rope(
        cls,
        head_dim: int,
        base: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
    ) -> "RotarySpec":
        """The ordinary 1-D embedding; of the first `rotary_dim` components if given."""
        dim = head_dim if rotary_dim is None else rotary_dim
        if dim % 2 or not 0 < dim <= head_dim:
            raise ValueError(f"rotary_dim must be even and at most {head_dim}, got {dim}")
        return cls(head_dim, (0,) * (dim // 2), _ladder(dim, base), _stride(layout, dim // 2))


def _ladder(dim: int, base: float) -> tuple[float, ...]:
    return tuple(base ** (-2 * i / dim) for i in range(dim // 2))


def _stride(layout: str, half: int) -> int:
    if layout not in ("interleaved", "half"):
        raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")
    return 1 if layout == "interleaved" else half


@dataclass(frozen=True)
class PositionConfig:
    """How a model's tokens get their positions; saved in its config.json.

    Attributes:
        preset: `paper`, `warm`, `mrope` or `gap2`, see docs/rotary.md.
        pos_scale: (s1, s2), the paper's alpha1 and alpha2: spacing of patches by height and width.
    """

    preset: Preset = "warm"
    pos_scale: tuple[float, float] = (2.0, 2.0)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if len(self.pos_scale) != 2 or not all(s > 0 for s in self.pos_scale):
            raise ValueError(f"pos_scale must be two numbers above 0, got {self.pos_scale}")

    def to_json(self) -> dict[str, Any]:
        return {"preset": self.preset, "pos_scale": list(self.pos_scale)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "PositionConfig":
        return cls(row["preset"], tuple(row["pos_scale"]))

    def positions(
        self, image_mask: Tensor, grids: Grids, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Positions by this preset: [2, B, S] for `paper` and `warm`, else [3, B, S], and the next."""
        if self.preset in ("paper", "warm"):
            return mcg_positions(
                image_mask, grids, pos_scale=self.pos_scale, attention_mask=attention_mask
            )
        gap = 1 if self.preset == "gap2" else 0
        return qwen_positions(image_mask, grids, attention_mask=attention_mask, gap=gap)


def mcg_positions(
    image_mask: Tensor,
    grids: Grids,
    *,
    pos_scale: tuple[float, float] = (2.0, 2.0),
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions of MCG-RoPE: text counts up, an image lies centred in the room its tokens take.

    Text token t has (t, t). An image of h × w merged patches after position l has, for patch
    v1 = 1…h, v2 = 1…w,

        (s1 v1 + l + (w h + 1 - s1 (h + 1)) / 2,  s2 v2 + l + (w h + 1 - s2 (w + 1)) / 2)

    and the text after it goes on at l + w h + 1.

    Args:
        image_mask: bool [B, S], True at image tokens.
        grids: of each row, the merged (h, w) of its images in order.
        pos_scale: (s1, s2).
        attention_mask: [B, S], 0 at padding, which is not counted and gets position 0.

    Returns:
        float32 positions [2, B, S], and the next position of each row, float32 [B].

    Raises:
        ValueError: grids and mask disagree, or an image would begin before the text in front of it.
    """
    valid = _valid(image_mask, attention_mask)
    images = _Images(image_mask & valid, grids)
    index = (valid.cumsum(1) - 1).clamp(min=0).to(torch.float32)  # [B, S]
    positions = torch.stack([index, index])
    if len(images.height):
        flat = index[images.rows, images.columns]  # [image tokens]
        before = flat - images.patch - 1  # l: position of the token before the image
        room = images.height * images.width + 1
        for axis, (extent, place) in enumerate(
            ((images.height, images.patch // images.width), (images.width, images.patch % images.width))
        ):
            scale = pos_scale[axis]
            gap = (room - scale * (extent - 1)) / 2
            if bool((gap < 0).any()):
                at = int((gap < 0).nonzero()[0])
                h, w = int(images.height[at]), int(images.width[at])
                raise ValueError(
                    f"pos_scale {scale} puts an image of {h} × {w} patches before the text in front "
                    f"of it; use at most {(h * w + 1) / (max(h, w) - 1):.2f}"
                )
            offset = before + (room - scale * (extent + 1)) / 2  # lambda
            positions[axis, images.rows, images.columns] = scale * (place + 1) + offset
    return positions * valid, valid.sum(1).to(torch.float32)


def qwen_positions(
    image_mask: Tensor,
    grids: Grids,
    *,
    attention_mask: Tensor | None = None,
    gap: int = 0,
) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's own positions t, h, w, from the same inputs as `mcg_positions`.

    Args:
        gap: so many positions left empty before and after each image; 1 is the published ClinKD
            code ("last text + 2").

    Returns:
        float32 positions [3, B, S], and the next position of each row, float32 [B].
    """
    valid = _valid(image_mask, attention_mask)
    images = _Images(image_mask & valid, grids)
    step = (valid & ~image_mask).to(torch.float32)  # [B, S] how far each token moves the count
    last = images.patch == images.height * images.width - 1
    extent = torch.maximum(images.height, images.width) + 2 * gap
    step[images.rows[last], images.columns[last]] = extent[last].to(torch.float32)
    start = step.cumsum(1) - step  # [B, S] count before each token
    positions = start.repeat(3, 1, 1)
    if len(images.height):
        where = (images.rows, images.columns)
        positions[0][where] += gap
        positions[1][where] += gap + images.patch // images.width
        positions[2][where] += gap + images.patch % images.width
    return positions * valid, step.sum(1)


def _valid(image_mask: Tensor, attention_mask: Tensor | None) -> Tensor:
    if image_mask.dim() != 2 or image_mask.dtype != torch.bool:
        raise ValueError(
            f"image_mask must be bool [B, S], got {image_mask.dtype} {tuple(image_mask.shape)}"
        )
    if attention_mask is None:
        return torch.ones_like(image_mask)
    if attention_mask.shape != image_mask.shape:
        raise ValueError(
            f"attention_mask must be [B, S] = {tuple(image_mask.shape)}, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    return attention_mask.bool()


class _Images:
    """Every image token's row, column, its image's size and its number within the image."""

    def __init__(self, image_mask: Tensor, grids: Grids) -> None:
        if len(grids) != image_mask.shape[0]:
            raise ValueError(f"grids must have one entry a row, {image_mask.shape[0]}, got {len(grids)}")
        counts = image_mask.sum(1).tolist()
        for row, (count, images) in enumerate(zip(counts, grids, strict=True)):
            expected = sum(h * w for h, w in images)
            if expected != count:
                raise ValueError(
                    f"row {row} has {count} image tokens, its grids {list(images)} need {expected}"
                )
        device = image_mask.device
        sizes = torch.tensor([s for row in grids for s in row], dtype=torch.int64).reshape(-1, 2)
        sizes = sizes.to(device)
        repeats = sizes.prod(1)
        ends = repeats.cumsum(0)
        self.rows, self.columns = image_mask.nonzero(as_tuple=True)  # row-major: images in order
        self.height = sizes[:, 0].repeat_interleave(repeats)
        self.width = sizes[:, 1].repeat_interleave(repeats)
        total = torch.arange(len(self.rows), device=device)
        self.patch = total - (ends - repeats).repeat_interleave(repeats)
