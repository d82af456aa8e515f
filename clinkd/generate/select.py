"""Which candidate is the answer (SASG)."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from clinkd.data.boxes import iou, parse_boxes, strip_boxes
from clinkd.generate.results import Candidate

Selection = Literal["clip", "beam", "mixed", "consensus", "oracle"]
NEEDS_SCORER = ("clip", "mixed")


def select(
    candidates: Sequence[Candidate],
    selection: Selection,
    *,
    clip: Sequence[float | None] | None = None,
    mix: float = 0.5,
    task: str = "",
    quality: Callable[[str], float] | None = None,
) -> int:
    """Index of the chosen candidate; ties go to the better beam score, then the lower index.

    Args:
        candidates: best beam first.
        selection: `clip` (the paper): highest cosine; `beam`: the search's own order; `mixed`:
            `mix` × CLIP + (1 − mix) × beam, both brought to 0…1 among the candidates; `consensus`:
            the one that agrees most with the others (boxes by IoU for VG, else words); `oracle`:
            the one closest to the truth, for analysis.
        clip: cosine of each candidate.
        quality: of an answer against the truth; needed by `oracle`.

    Raises:
        ValueError: no candidates, no usable CLIP score, or no `quality` where it is needed.
    """
    if not candidates:
        raise ValueError("there is no candidate to select from")
    beam = [c.score for c in candidates]
    if selection == "beam":
        values = beam
    elif selection in NEEDS_SCORER:
        cosines = [math.nan if c is None else c for c in clip or []]
        if len(cosines) != len(candidates) or not all(math.isfinite(c) for c in cosines):
            raise ValueError(
                f"selection {selection!r} needs a finite CLIP score of every candidate"
            )
        values = cosines
        if selection == "mixed":
            pairs = zip(_unit(cosines), _unit(beam), strict=True)
            values = [mix * a + (1 - mix) * b for a, b in pairs]
    elif selection == "consensus":
        values = _agreement([c.text for c in candidates], task)
    else:
        if quality is None:
            raise ValueError("selection 'oracle' needs the truth")
        values = [quality(c.text) for c in candidates]
    return max(range(len(candidates)), key=lambda i: (values[i], beam[i], -i))


def _unit(values: Sequence[float]) -> list[float]:
    """Least to 0, most to 1; all 0 where they are the same."""
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def _agreement(texts: Sequence[str], task: str) -> list[float]:
    """Mean similarity of each text with the others."""
    if len(texts) == 1:
        return [1.0]
    similar = box_similarity if task == "VG" else word_similarity
    return [
        sum(similar(a, b) for j, b in enumerate(texts) if j != i) / (len(texts) - 1)
        for i, a in enumerate(texts)
    ]


def box_similarity(a: str, b: str) -> float:
    """Mean over the boxes of either text of the best IoU with a box of the other."""
    first, second = parse_boxes(a), parse_boxes(b)
    if not first or not second:
        return 0.0
    best = [max(iou(x, y) for y in second) for x in first]
    best += [max(iou(x, y) for x in first) for y in second]
    return sum(best) / len(best)


def word_similarity(a: str, b: str) -> float:
    """F1 of the words that two texts share, boxes left out."""
    first, second = (Counter(strip_boxes(text).lower().split()) for text in (a, b))
    shared = sum((first & second).values())
    total = sum(first.values()) + sum(second.values())
    return 2 * shared / total if total else 0.0


def truth_quality(task: str, annotation: str) -> Callable[[str], float]:
    """How close an answer comes to the truth: boxes for VG, else words."""
    similar = box_similarity if task == "VG" else word_similarity
    return lambda text: similar(text, annotation)
