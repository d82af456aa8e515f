"""What a correction must fulfil before anybody learns from it."""

import re

from clinkd.data.boxes import parse_boxes, strip_boxes

LEAST_SIMILARITY = 0.8
LONGEST = 2.0  # times the truth's length, and some words
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SIDES = ("left", "right")


def numbers(text: str) -> set[str]:
    """Numbers outside boxes."""
    return set(_NUMBER.findall(strip_boxes(text)))


def sides(text: str) -> set[str]:
    """Which of left and right a text speaks of."""
    words = set(re.findall(r"[a-z]+", strip_boxes(text).lower()))
    return {side for side in _SIDES if side in words}


def why_rejected(reply: str, truth: str, similarity: float) -> str | None:
    """The first rule that a reply breaks, or None.

    Args:
        similarity: of the reply with the truth.
    """
    if not reply.strip():
        return "empty"
    if [_rounded(b) for b in parse_boxes(reply)] != [_rounded(b) for b in parse_boxes(truth)]:
        return "boxes differ from the truth's"
    if new := numbers(reply) - numbers(truth):
        return f"numbers that the truth lacks: {', '.join(sorted(new))}"
    if sides(reply) != sides(truth):
        return "left and right differ from the truth's"
    if len(strip_boxes(reply).split()) > LONGEST * len(strip_boxes(truth).split()) + 8:
        return "too long"
    if similarity < LEAST_SIMILARITY:
        return f"similarity to the truth {similarity:.2f}, under {LEAST_SIMILARITY}"
    return None


def _rounded(box: tuple[float, float, float, float]) -> tuple[int, ...]:
    return tuple(round(c) for c in box)
