"""What a task's score does not say: unreadable boxes, wrong sides, misplaced confidence."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clinkd.data.boxes import find_boxes, iou, parse_boxes

Row = Mapping[str, Any]
BINS = 10  # of equal width, over confidences 0…1
_TRIES = re.compile(
    r"</?box>|<\|?box_(?:start|end)\|?>|bbox_2d|[(\[]\s*-?\d+(?:\.\d+)?\s*,\s*-?\d+", re.ASCII
)
_BOTH_SIDES = re.compile(r"\b(?:bilateral(?:ly)?|both sides)\b")


def true_boxes(row: Row) -> list[Any]:
    """The boxes of the true answer: in its text, else the record's own."""
    boxes = parse_boxes(row["annotation"])
    return list(boxes) if boxes else list(row.get("boxes") or [])


def grounding_extras(rows: Sequence[Row]) -> dict[str, float]:
    """What practitioners ask beside Recall@0.5, in percent.

    - mean_iou: of each true box with the best predicted one, 0 where there is none.
    - box_present: answers that try to give a box: a marker or a coordinate, readable or not.
    - parse_rate: answers of which a box can be read, in any convention.
    - valid_boxes: of the boxes read, those within the image whose corners are in order.
    - zero_boxes, one_box, many_boxes: answers by the number of boxes read; they make 100.
    - count_match: answers with as many boxes as the truth.
    """
    best: list[float] = []
    counts, tries, matches, valid = [], 0, 0, []
    for row in rows:
        found, targets = parse_boxes(row["response"]), true_boxes(row)
        counts.append(len(found))
        matches += len(found) == len(targets)
        tries += bool(found) or _TRIES.search(row["response"]) is not None
        valid += [_valid(box) for box in find_boxes(row["response"])]
        best += [max((iou(t, box) for box in found), default=0.0) for t in targets]
    total = max(1, len(rows))
    return {
        "mean_iou": 100 * float(np.mean(best)) if best else 0.0,
        "box_present": 100 * tries / total,
        "parse_rate": 100 * sum(n > 0 for n in counts) / total,
        "valid_boxes": 100 * sum(valid) / max(1, len(valid)),
        "zero_boxes": 100 * sum(n == 0 for n in counts) / total,
        "one_box": 100 * sum(n == 1 for n in counts) / total,
        "many_boxes": 100 * sum(n > 1 for n in counts) / total,
        "count_match": 100 * matches / total,
    }


def _valid(box: Sequence[float]) -> bool:
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000


def laterality_extras(rows: Sequence[Row]) -> dict[str, float]:
    """Left and right as whole words, where the truth names exactly one side; {} where none does.

    - laterality_n: so many records (a count).
    - laterality_errors: percent whose answer names the other side and not this one.
    - laterality_both, laterality_missing: percent that name both sides, or none.
    """
    said = [
        (_sides(row["annotation"]), _sides(row["response"]))
        for row in rows
        if len(_sides(row["annotation"])) == 1
    ]
    if not said:
        return {}
    share = 100 / len(said)
    return {
        "laterality_n": float(len(said)),
        "laterality_errors": share * sum(len(b) == 1 and a != b for a, b in said),
        "laterality_both": share * sum(len(b) == 2 for _, b in said),
        "laterality_missing": share * sum(not b for _, b in said),
    }


def _sides(text: str) -> frozenset[str]:
    text = text.lower()
    if _BOTH_SIDES.search(text):
        return frozenset(("left", "right"))
    return frozenset(side for side in ("left", "right") if re.search(rf"\b{side}\b", text))


def confidence(row: Row) -> float | None:
    """What the model thought of the chosen answer: the geometric mean of its tokens' probabilities.

    None where the line does not say: no candidates (as in BiRD's files), or none that is whole; and
    where there is an error, since the empty answer is then none of the candidates.
    """
    candidates, index = row.get("candidates"), row.get("selected") or 0
    if row.get("error") or not isinstance(candidates, list):
        return None
    if not isinstance(index, int) or not 0 <= index < len(candidates):
        return None
    chosen = candidates[index]
    mean = chosen.get("mean_log_prob") if isinstance(chosen, Mapping) else None
    if isinstance(mean, bool) or not isinstance(mean, int | float) or not math.isfinite(mean):
        return None
    return math.exp(min(0.0, mean))


def calibration(confidences: Sequence[float], right: Sequence[bool]) -> dict[str, Any]:
    """How far confidence is from the share of right answers (Guo et al. 2017).

    `ece` is the mean over answers of |share right − mean confidence| of the answer's bin, and `gap`
    the mean confidence less the share right: above 0 where the model is too sure; both in percent.
    `bins` is the reliability diagram: bins of equal width with an answer in them.

    Args:
        confidences: 0…1; 1 falls into the last bin.
        right: whether each answer is right.
    """
    sure, hit = np.asarray(confidences, float), np.asarray(right, float)
    index = np.minimum((sure * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for k in range(BINS):
        mine = index == k
        if not mine.any():
            continue
        mean, share = float(sure[mine].mean()), float(hit[mine].mean())
        error += float(mine.sum()) * abs(share - mean)
        bins.append(
            {
                "low": k / BINS,
                "high": (k + 1) / BINS,
                "n": int(mine.sum()),
                "confidence": round(100 * mean, 2),
                "right": round(100 * share, 2),
            }
        )
    count = max(1, len(sure))
    gap = float((sure - hit).mean()) if len(sure) else 0.0
    return {
        "n": len(sure),
        "ece": round(100 * error / count, 2),
        "gap": round(100 * gap, 2),
        "bins": bins,
    }
