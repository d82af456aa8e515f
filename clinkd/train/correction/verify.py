"""What a correction must fulfil before anybody learns from it."""

import re
import unicodedata

from clinkd.data.boxes import stated_boxes, strip_boxes
from clinkd.train.correction.facts import (
    MARKUP,
    contradiction,
    new_numbers,
    plain,
    without_boxes,
)

LEAST_SIMILARITY = 0.8
LONGEST = 2.0  # times the truth's words, and 8 words
SHORTEST = 0.5  # times the truth's words, less 2
# words of somebody who speaks about the correction instead of making it
_TALK = re.compile(
    r"\b(?:corrected|correct answer|student(?:'s)?|ground truth|the truth|language model|"
    r"sorry|apolog\w+|as requested|here is the|instructions?)\b"
)
_INVISIBLE = {"Cc", "Cf", "Co", "Cs", "Cn"}  # Unicode categories: control, format, surrogates, …


def why_rejected(
    reply: str, truth: str, similarity: float, least_similarity: float = LEAST_SIMILARITY
) -> str | None:
    """The first rule that a reply breaks, or None.

    A reply comes from a model that has read a text it should not trust, so the rules look at what
    it is, not at how it came about: the truth's boxes in their order and form and no other; no
    other markup, as a `<|im_end|>` would cut the training text; no invisible characters; no talk
    about the correction; no number, side, opposite or negation that the truth lacks; neither far
    longer nor far shorter.

    Args:
        similarity: of the reply with the truth.
    """
    if not reply.strip():
        return "empty"
    if odd := _invisible(reply) - _invisible(truth):
        return f"characters that cannot be seen: {', '.join(sorted(map(ascii, odd)))}"
    folded = unicodedata.normalize("NFKC", reply)  # finds boxes in full-width digits as well
    if _boxes(folded) != _boxes(truth):
        return "boxes differ from the truth's"
    if odd := set(MARKUP.findall(without_boxes(folded))) - set(
        MARKUP.findall(without_boxes(truth))
    ):
        return f"markup that the truth lacks: {', '.join(sorted(odd))}"
    if talk := set(_TALK.findall(plain(reply))) - set(_TALK.findall(plain(truth))):
        return f"speaks about the correction: {', '.join(sorted(talk))}"
    if new := new_numbers(reply, truth):
        return f"numbers that the truth lacks: {', '.join(sorted(new))}"
    if (wrong := contradiction(reply, truth)) is not None:
        return wrong
    length, true_length = len(strip_boxes(reply).split()), len(strip_boxes(truth).split())
    if length > LONGEST * true_length + 8:
        return f"too long: {length} words, the truth has {true_length}"
    if length < SHORTEST * true_length - 2:
        return f"too short: {length} words, the truth has {true_length}"
    if similarity < least_similarity:
        return f"similarity to the truth {similarity:.2f}, under {least_similarity}"
    return None


def _boxes(text: str) -> list[tuple[str, tuple[float, ...]]]:
    return [(box.form, box.corners) for box in stated_boxes(text)]


def _invisible(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in _INVISIBLE and c not in "\n\t"}
