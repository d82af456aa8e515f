"""Rotary embedding in one abstraction: which axis turns each pair of components, how fast, where.

    angle[token, i] = positions[axis[i], token] * inv_freq[i]
    (a, b) -> (a cos - b sin, a sin + b cos)

`RotarySpec` says what the pairs are, `PositionConfig` which rule a model follows, and
`mcg_positions`, `qwen_positions` and `gap_positions` place text and image patches.
See docs/rotary.md.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from clinkd.errors import ConfigError
from clinkd.positions import Rule, gap_positions, mcg_positions, qwen_positions

__all__ = [
    "PositionConfig",
    "RotarySpec",
    "gap_positions",
    "mcg_positions",
    "qwen_positions",
]

Layout = Literal["interleaved", "half"]
Preset = Literal["paper", "warm", "mrope", "gap2"]
PRESETS: tuple[str, ...] = ("paper", "warm", "mrope", "gap2")
_RULES: dict[str, Rule] = {"paper": "mcg", "warm": "mcg", "mrope": "qwen", "gap2": "gap"}
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class RotarySpec:
    """Axis and speed of every rotary pair of a head.

    Pair `i` is made of components `first = (i // n) * 2n + i % n` and `second = first + n`, with
    `n = pair_stride`: 1 is the interleaved layout, `head_dim / 2` the half layout of Hugging Face.
    Components past `2R` pass through.

    Args:
        head_dim: D, even, 16 to 256.
        axis: [R] index into the first dimension of the positions.
        inv_freq: [R] radians per unit of position.
        pair_stride: distance of a pair's components; divides R.
    """

    head_dim: int
    axis: tuple[int, ...]
    inv_freq: tuple[float, ...]
    pair_stride: int
    # 63-bit digest of the four fields; equal in every process, so that compiled graphs may hold it
    key: int = field(init=False, compare=False, repr=False)

    known: ClassVar[dict[int, "RotarySpec"]] = {}

    def __post_init__(self) -> None:
        # as Python's own numbers, whatever they came as: the key is made of how they are written
        object.__setattr__(self, "axis", tuple(int(axis) for axis in self.axis))
        object.__setattr__(self, "inv_freq", tuple(float(speed) for speed in self.inv_freq))
        pairs = len(self.axis)
        _check_head_dim(self.head_dim)
        if len(self.inv_freq) != pairs:
            raise ValueError(
                f"inv_freq must have one speed a pair, {pairs} as axis has, "
                f"got {len(self.inv_freq)}"
            )
        if not 0 < 2 * pairs <= self.head_dim:
            raise ValueError(
                f"axis must have 1 to head_dim / 2 = {self.head_dim // 2} pairs, got {pairs}"
            )
        if self.pair_stride < 1 or pairs % self.pair_stride:
            raise ValueError(
                f"pair_stride must divide the number of pairs, {pairs}, got {self.pair_stride}"
            )
        if min(self.axis) < 0:
            raise ValueError(f"axis must not be negative, got {min(self.axis)}")
        if not all(math.isfinite(speed) for speed in self.inv_freq):
            raise ValueError("inv_freq must be finite")
        content = repr((self.head_dim, self.axis, self.inv_freq, self.pair_stride))
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        object.__setattr__(self, "key", int.from_bytes(digest, "big") >> 1)
        RotarySpec.known[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # made again where it is loaded, so that the ops know it there
        return RotarySpec, (self.head_dim, self.axis, self.inv_freq, self.pair_stride)

    @property
    def pairs(self) -> int:
        """R."""
        return len(self.axis)

    @property
    def axes(self) -> int:
        """A, the least number of position axes."""
        return max(self.axis) + 1

    @classmethod
    def split(
        cls,
        head_dim: int,
        height_dim: int | None = None,
        base: float = 10000.0,
        layout: Layout = "interleaved",
    ) -> "RotarySpec":
        """The first `height_dim` components turn with axis 0, the rest with axis 1 (ClinKD).

        Each part has its own ladder `base^(-2i / d_part)` with i = 0, 1, …; the paper prints
        speeds from i = 1 without saying where i starts (arXiv:2502.05928, section 3).
        """
        _check_head_dim(head_dim)
        height_dim = head_dim // 2 if height_dim is None else height_dim
        width_dim = head_dim - height_dim
        if height_dim % 2 or not 0 < height_dim < head_dim:
            raise ValueError(
                f"height_dim must be even and between 0 and head_dim = {head_dim}, got {height_dim}"
            )
        _check_layout(layout)
        if layout == "half" and (height_dim != width_dim or height_dim % 2):
            raise ValueError(
                "height_dim must be head_dim / 2 in the half layout, whose pairs have one "
                f"distance; got {height_dim} of {head_dim}: use layout='interleaved'"
            )
        return cls(
            head_dim,
            (0,) * (height_dim // 2) + (1,) * (width_dim // 2),
            _ladder(height_dim, base) + _ladder(width_dim, base),
            1 if layout == "interleaved" else height_dim // 2,
        )

    @classmethod
    def alternate(
        cls, head_dim: int, base: float = 10000.0, layout: Layout = "half"
    ) -> "RotarySpec":
        """One 1-D ladder, even pairs on axis 0 and odd pairs on axis 1.

        Where both axes agree, as at text, this is the 1-D embedding.
        """
        _check_head_dim(head_dim)
        axis = tuple(i % 2 for i in range(head_dim // 2))
        return cls(head_dim, axis, _ladder(head_dim, base), _stride(layout, head_dim // 2))

    @classmethod
    def mrope(
        cls,
        head_dim: int,
        sections: Sequence[int] = (16, 24, 24),
        base: float = 1e6,
        interleaved: bool = False,
    ) -> "RotarySpec":
        """M-RoPE of Qwen2-VL and Qwen2.5-VL; Qwen3-VL's with `interleaved`. Axes t, h, w.

        Interleaved, h and w have every third pair at most, the rest of their sections goes to t:
        so does transformers, and a checkpoint has learnt it.
        """
        _check_head_dim(head_dim)
        if len(sections) != 3 or min(sections) < 0 or sum(sections) != head_dim // 2:
            raise ValueError(
                "sections must be three numbers, none below 0, that add up to head_dim / 2 = "
                f"{head_dim // 2}, got {tuple(sections)}"
            )
        if interleaved:
            axis = [0] * (head_dim // 2)
            for a in (1, 2):
                stop = min(3 * sections[a], head_dim // 2)
                axis[a:stop:3] = [a] * len(range(a, stop, 3))
        else:
            axis = [a for a in range(3) for _ in range(sections[a])]
        return cls(head_dim, tuple(axis), _ladder(head_dim, base), head_dim // 2)

    @classmethod
    def axial(cls, head_dim: int, base: float = 10000.0) -> "RotarySpec":
        """The vision tower of Qwen2-VL: half of the pairs on axis 0 (height), half on axis 1."""
        _check_head_dim(head_dim)
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
        speeds = _ladder(head_dim // 2, base)
        axis = (0,) * len(speeds) + (1,) * len(speeds)
        return cls(head_dim, axis, speeds * 2, head_dim // 2)

    @classmethod
    def rope(
        cls,
        head_dim: int,
        base: float = 10000.0,
        layout: Layout = "half",
        rotary_dim: int | None = None,
    ) -> "RotarySpec":
        """Ordinary 1-D rotary embedding of the first `rotary_dim` (default all) components."""
        _check_head_dim(head_dim)
        dim = head_dim if rotary_dim is None else rotary_dim
        if dim % 2 or not 0 < dim <= head_dim:
            raise ValueError(
                f"rotary_dim must be even and from 2 to head_dim = {head_dim}, got {dim}"
            )
        return cls(head_dim, (0,) * (dim // 2), _ladder(dim, base), _stride(layout, dim // 2))


def _check_head_dim(head_dim: int) -> None:
    if head_dim % 2 or not 16 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be even and from 16 to {MAX_HEAD_DIM}, got {head_dim}")


def _ladder(dim: int, base: float) -> tuple[float, ...]:
    if not 0 < base < math.inf:
        raise ValueError(f"base must be a finite number above 0, got {base}")
    return tuple(base ** (-2 * i / dim) for i in range(dim // 2))


def _check_layout(layout: str) -> None:
    if layout not in ("interleaved", "half"):
        raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")


def _stride(layout: str, pairs: int) -> int:
    _check_layout(layout)
    return 1 if layout == "interleaved" else pairs


@dataclass(frozen=True)
class PositionConfig:
    """How a model places text and image patches, and which pair turns with which axis.

    Args:
        preset: `paper` (split ladders, MCG positions; for training from scratch), `warm`
            (the checkpoint's own ladder with alternating axes, MCG positions), `mrope` (the
            checkpoint as it came), `gap2` (M-RoPE with a gap of 2 at each border of text and
            image, as the authors' published code does).
        pos_scale: distance of neighbouring patches by height and width, the paper's alpha1 and
            alpha2; only `paper` and `warm` read it.
        base: of the ladders of `paper`.

    Raises:
        ConfigError: an unknown preset, or a number that is not above 0.
    """

    preset: Preset = "warm"
    pos_scale: tuple[float, float] = (2.0, 2.0)
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        try:
            scale = tuple(float(s) for s in self.pos_scale)
        except (TypeError, ValueError):
            scale = ()
        if len(scale) != 2 or not all(0 < s < math.inf for s in scale):
            raise ConfigError(f"pos_scale must be two numbers above 0, got {self.pos_scale}")
        if not 0 < self.base < math.inf:
            raise ConfigError(f"base must be above 0, got {self.base}")
        object.__setattr__(self, "pos_scale", scale)

    @property
    def rule(self) -> Rule:
        """By which `clinkd.positions` places images and text."""
        return _RULES[self.preset]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a model's config.json holds them."""
        return asdict(self) | {"pos_scale": list(self.pos_scale)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PositionConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """
        unknown = sorted(values.keys() - {"preset", "pos_scale", "base"})
        if unknown:
            raise ConfigError(f"positions have no key {unknown[0]!r}")
        return cls(**values)
