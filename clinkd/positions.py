"""Positions of text tokens and image patches, for whole batches at once.

Every rule here has the same form: a text token moves on by 1, an image of h × w merged patches by
some advance, and each of its patches lies at a fixed offset from where the image starts. So a
batch is one cumulative sum and one table look-up, whatever it holds.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Grid = tuple[int, int]
Rule = Literal["mcg", "qwen", "gap"]
GAP = 1.0  # free positions between a border and the image, so that the difference there is 2


def mcg_positions(
    image_mask: Tensor,
    grids: Sequence[Sequence[Grid]],
    *,
    pos_scale: tuple[float, float] = (2.0, 2.0),
    attention_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions of MCG-RoPE (ClinKD, arXiv:2502.05928, equations of section 3).

    Text token `t` has (t, t). An image of h × w patches whose preceding token sits at `l` gets

        (s1 * v1 + lambda1, s2 * v2 + lambda2)  for v1 = 1…h, v2 = 1…w
        lambda1 = l + (w * h + 1 - s1 * (h + 1)) / 2,  lambda2 likewise with s2 and w

    which centres it in the w * h positions that it takes from the text.

    Args:
        image_mask: [B, S] bool, true at image tokens.
        grids: for each row the (h, w) of its images in merged patches, in order.
        pos_scale: (s1, s2), the paper's alpha1 and alpha2.
        attention_mask: [B, S], zero at padding, which is not counted and gets position 0.
        segments: [B, S] int, number of the sequence that a token belongs to in a packed row;
            positions restart with each.

    Returns:
        Positions [2, B, S] float32 and the next position of each row, [B] int64.

    Raises:
        ValueError: patches that would reach over the text beside them (h, w too unequal for this
            pos_scale), a pos_scale that is no number above 0, or image tokens that do not fit the
            grids or the segments.
    """
    if len(pos_scale) != 2 or not all(0 < s < math.inf for s in pos_scale):
        raise ValueError(f"pos_scale must be two finite numbers above 0, got {pos_scale}")
    flat = _check(image_mask, grids, attention_mask, segments)
    return place(image_mask, flat, "mcg", pos_scale, attention_mask, segments)


def qwen_positions(
    image_mask: Tensor,
    grids: Sequence[Sequence[Grid]],
    *,
    attention_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """M-RoPE positions of Qwen2-VL: an image at `p` has (p, p + v1 - 1, p + v2 - 1).

    The text after it goes on at p + max(h, w). Arguments as in `mcg_positions`; returns
    [3, B, S] float32 and the next position of each row.
    """
    flat = _check(image_mask, grids, attention_mask, segments)
    return place(image_mask, flat, "qwen", (1.0, 1.0), attention_mask, segments)


def gap_positions(
    image_mask: Tensor,
    grids: Sequence[Sequence[Grid]],
    *,
    attention_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`qwen_positions` with a difference of 2, not 1, at each border of text and image."""
    flat = _check(image_mask, grids, attention_mask, segments)
    return place(image_mask, flat, "gap", (1.0, 1.0), attention_mask, segments)


def place(
    image_mask: Tensor,
    grids: Sequence[Grid],
    rule: Rule,
    pos_scale: tuple[float, float],
    attention_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the three builders, from the grids of the whole batch in reading order."""
    axes = 2 if rule == "mcg" else 3
    B, S = image_mask.shape
    device = image_mask.device
    counted = (
        torch.ones(B, S, dtype=torch.bool, device=device)
        if attention_mask is None
        else attention_mask.to(device=device, dtype=torch.bool)
    )
    image_mask = image_mask & counted
    steps = counted.to(torch.float64)  # float64, so that every position below 2**52 is exact
    offset = None
    if grids:
        tables = [_table(rule, h, w, *pos_scale) for h, w in grids]
        table = torch.cat(tables, dim=1).to(device)  # [A + 2, image tokens]
        rank = image_mask.flatten().cumsum(0).view(B, S) - 1
        rank = rank.clamp(0, table.shape[1] - 1)
        _check_runs(image_mask, rank, table, segments)
        found = table[:, rank] * image_mask  # [A + 2, B, S]
        offset = found[:axes]
        steps = steps + found[axes]
    elif bool(image_mask.any()):
        raise ValueError("grids must name every image: there are image tokens but no grids")
    total = steps.cumsum(-1)  # [B, S], position after each token
    base = total - steps
    if segments is not None:
        base, total = _restart(base, total, counted, segments)
    positions = base if offset is None else base + offset
    positions = (positions * counted).to(torch.float32).expand(axes, B, S)
    following = total[:, -1] if S else total.new_zeros(B)
    return positions, following.round().to(torch.int64)


def check_grids(grids: Sequence[Grid], rule: Rule, pos_scale: tuple[float, float]) -> None:
    """Raise where a rule has no place for an image of so many merged patches (h, w).

    Raises:
        ValueError: patches would reach over the text beside them; which pos_scale would do.
    """
    for h, w in grids:
        _table(rule, h, w, *pos_scale)


@lru_cache(maxsize=1024)
def _table(rule: Rule, h: int, w: int, s1: float, s2: float) -> Tensor:
    """One image's columns, in reading order of its patches.

    Returns:
        [A + 2, h * w] float64: offset by axis from the patch's own place in reading order, extra
        step after the patch, and 1 at the first patch.
    """
    if h < 1 or w < 1:
        raise ValueError(f"grids must be at least 1 by 1, got {(h, w)}")
    area = h * w
    j = torch.arange(area, dtype=torch.float64)
    v1, v2 = j.div(w, rounding_mode="floor") + 1, j.remainder(w) + 1
    if rule == "mcg":
        gaps = ((area + 1 - s1 * (h - 1)) / 2, (area + 1 - s2 * (w - 1)) / 2)
        if min(gaps) < 0:
            raise ValueError(
                f"pos_scale {(s1, s2)} puts patches of a {h} by {w} image before the text in "
                f"front of it (gap {min(gaps):g}): use at most {_largest_scale(h, w)}"
            )
        # the image starts at l + 1, so l is at -1 from there
        rows = [
            s1 * v1 + (area + 1 - s1 * (h + 1)) / 2 - 1,
            s2 * v2 + (area + 1 - s2 * (w + 1)) / 2 - 1,
        ]
        advance = float(area)
    else:
        gap = GAP if rule == "gap" else 0.0
        rows = [torch.full_like(j, gap), v1 - 1 + gap, v2 - 1 + gap]
        advance = max(h, w) + 2 * gap
    extra = torch.zeros_like(j)
    extra[-1] = advance - area
    first = torch.zeros_like(j)
    first[0] = 1
    return torch.stack([row - j for row in rows] + [extra, first])


def _largest_scale(h: int, w: int) -> str:
    area = h * w
    limits = ((area + 1) / (n - 1) if n > 1 else float("inf") for n in (h, w))
    return f"({', '.join(f'{limit:.4g}' for limit in limits)})"


def _restart(
    base: Tensor, total: Tensor, counted: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor]:
    """Subtract from every token the position at which its segment starts."""
    owner = segments.to(base.device).masked_fill(~counted, -1)
    before = torch.nn.functional.pad(owner, (1, 0), value=-1)[:, :-1]
    starts = counted & (owner != before)
    # starts never decrease along a row, so the running maximum is the latest one
    origin = torch.where(starts, base, 0.0).cummax(-1).values
    return base - origin, total - origin


def _check_runs(image_mask: Tensor, rank: Tensor, table: Tensor, segments: Tensor | None) -> None:
    """Each image's tokens stand together in one row, and there are as many as the grids say."""
    before = torch.nn.functional.pad(image_mask, (1, 0))[:, :-1]
    if segments is not None:
        own = segments.to(image_mask.device)
        before = before & (own == torch.nn.functional.pad(own, (1, 0))[:, :-1])
    torn = (image_mask & ~before & (table[-1, rank] == 0)).any()
    tokens, is_torn = torch.stack([image_mask.sum(), torn.to(torch.int64)]).tolist()
    if tokens != table.shape[1]:
        raise ValueError(
            f"grids must cover the image tokens: {table.shape[1]} patches for {tokens} tokens"
        )
    if is_torn:
        raise ValueError(
            "image_mask must hold the tokens of each image together, in one row and one segment"
        )


def _check(
    image_mask: Tensor,
    grids: Sequence[Sequence[Grid]],
    attention_mask: Tensor | None,
    segments: Tensor | None,
) -> list[Grid]:
    """Check shapes and each row's grids; return the grids in reading order."""
    if image_mask.dtype != torch.bool:
        raise TypeError(f"image_mask must be bool, got {image_mask.dtype}")
    if image_mask.dim() != 2:
        raise ValueError(f"image_mask must be [B, S], got shape {tuple(image_mask.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("segments", segments)):
        if tensor is not None and tensor.shape != image_mask.shape:
            raise ValueError(
                f"{name} must be [B, S] = {list(image_mask.shape)}, got shape {tuple(tensor.shape)}"
            )
    if len(grids) != image_mask.shape[0]:
        raise ValueError(f"grids must have one list a row, {image_mask.shape[0]}, got {len(grids)}")
    seen = image_mask if attention_mask is None else image_mask & attention_mask.bool()
    for row, (tokens, images) in enumerate(zip(seen.sum(-1).tolist(), grids, strict=True)):
        patches = sum(h * w for h, w in images)
        if patches != tokens:
            raise ValueError(
                f"grids[{row}] must cover the row's image tokens: {patches} patches for "
                f"{tokens} tokens"
            )
    return [(int(h), int(w)) for images in grids for h, w in images]
