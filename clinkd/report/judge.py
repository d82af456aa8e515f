"""Is an answer right? Simple, readable rules for the gallery and for what selection gained.

These are not the metrics of the table, which are corpus-wide; they are what a reader can check by
eye: grounding by IoU, words by token F1 (harmonic mean of precision and recall over words).
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from clinkd.data.boxes import iou, parse_boxes, strip_boxes
from clinkd.report.scores import number

RIGHT_IOU = 0.5  # Recall@0.5, as in the table
RIGHT_F1 = 0.8
WRONG_F1 = 0.4  # below it an answer shares little more than filler words
MOST_JUDGED = 4_000  # characters: of dozens of candidates that were let run on all would take long

Boxes = list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Judgement:
    """`verdict` is right, partly or wrong; `value` 0…1 is the IoU (VG) or the token F1."""

    verdict: str
    value: float
    measure: str


def judge(task: str, text: str, truth: str, boxes: Boxes) -> Judgement:
    """Judge one answer.

    Args:
        text: the answer, with its boxes; its beginning, `MOST_JUDGED`, counts.
        truth: the true answer's text, likewise.
        boxes: true boxes, 0…1000 relative to the image.
    """
    text, truth = text[:MOST_JUDGED], truth[:MOST_JUDGED]
    if task == "VG":
        value = mean_iou(parse_boxes(text), boxes)
        return Judgement("right" if value >= RIGHT_IOU else "wrong", value, "IoU")
    value = token_f1(text, truth)
    verdict = "right" if value >= RIGHT_F1 else "wrong" if value < WRONG_F1 else "partly"
    return Judgement(verdict, value, "token F1")


def mean_iou(predicted: Boxes, true: Boxes) -> float:
    """IoU of each true box with its best predicted one, averaged; 0 where there is none."""
    if not predicted or not true:
        return 0.0
    return sum(max(iou(p, t) for p in predicted) for t in true) / len(true)


def token_f1(text: str, truth: str) -> float:
    """Harmonic mean of precision and recall over lower-case words, boxes left out."""
    ours, theirs = Counter(words(text)), Counter(words(truth))
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((ours & theirs).values())
    return 2 * common / (sum(ours.values()) + sum(theirs.values()))


def words(text: str) -> list[str]:
    """Lower-case words and numbers of an answer without its boxes."""
    return re.findall(r"\w+", strip_boxes(text).lower())


def as_boxes(value: Any) -> Boxes:
    """The well-formed boxes of a JSON value, others left out."""
    if not isinstance(value, list):
        return []
    return [
        (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
        for box in value
        if isinstance(box, list) and len(box) == 4 and all(number(c) is not None for c in box)
    ]
