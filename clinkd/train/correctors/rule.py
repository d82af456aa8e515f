"""Correction by rules: the student's wording where it is right, the truth where it is not."""

import re
from collections.abc import Sequence

from clinkd.data.boxes import PATTERNS, format_boxes, parse_boxes, strip_boxes
from clinkd.generate.select import word_similarity
from clinkd.train.correction.verify import numbers, sides
from clinkd.train.correctors import Case

AGREES = 0.5  # word F1 at which a sentence of the student says what one of the truth says
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_SLOT = "\0"  # stands for the boxes while sentences are compared


class RuleCorrector:
    """No model: each sentence of the truth in the student's words where those agree with it.

    A sentence agrees when most words are shared and it brings no number, side or name of its own.
    Boxes are always the truth's.
    """

    name = "rule"

    def correct(self, cases: Sequence[Case]) -> list[str | None]:
        return [_correct(case) for case in cases]


def _correct(case: Case) -> str:
    if case.task == "ROC":
        return case.truth  # a name is right or wrong
    boxes = format_boxes(parse_boxes(case.truth))
    mine = [s for s in _SENTENCE.split(_without_boxes(case.answer)) if s]
    out = [_phrase(sentence, mine) for sentence in _SENTENCE.split(_without_boxes(case.truth))]
    return " ".join(out).replace(_SLOT, boxes)


def _without_boxes(text: str) -> str:
    """Boxes become one mark; several in a row one mark as well."""
    for name in ("qwen2", "box", "json", "plain"):
        text = PATTERNS[name].sub(_SLOT, text)
    return re.sub(rf"{_SLOT}+", _SLOT, text).strip()


def _phrase(truth: str, mine: Sequence[str]) -> str:
    """The student's sentence that says the same, else the truth's."""
    best = max(mine, key=lambda s: word_similarity(s, truth), default="")
    same = (
        word_similarity(best, truth) >= AGREES
        and best.count(_SLOT) == truth.count(_SLOT)
        and numbers(best) <= numbers(truth)
        and sides(best) == sides(truth)
        and _words(best) >= _content(truth)
        and _content(best) <= _words(truth) | _FRAME
    )
    return best if same else truth


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", strip_boxes(text.replace(_SLOT, " ")).lower()))


# words that frame a statement and change nothing in it
_FRAME = frozenset(
    {
        "a",
        "an",
        "the",
        "this",
        "that",
        "it",
        "is",
        "are",
        "was",
        "in",
        "of",
        "at",
        "on",
        "to",
        "and",
    }
    | {"by", "you", "can", "find", "found", "located", "image", "region", "shows", "show", "shown"}
    | {"seen", "see", "structure", "lies", "lie", "part", "there", "its"}
)


def _content(text: str) -> set[str]:
    return _words(text) - _FRAME
