"""Answers that need no look at the image: what the training split alone suggests."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from clinkd.data.boxes import Box, format_boxes
from clinkd.data.records import Record


def mean_box_rows(train: Sequence[Record], test: Sequence[Record]) -> list[dict[str, Any]]:
    """VG: the mean box of that structure in the training split; the mean of all for unseen ones."""
    seen: dict[tuple[str, int], list[Sequence[Box]]] = defaultdict(list)
    for record in train:
        if record.task == "VG" and record.boxes:
            count = len(record.boxes)
            seen[structure(record), count].append(record.boxes)
            seen["", count].append(record.boxes)
    rows = []
    for record in test:
        if record.task == "VG":
            count = len(record.boxes)
            boxes = seen.get((structure(record), count)) or seen.get(("", count)) or []
            mean = np.mean(np.array(boxes), axis=0) if boxes else np.zeros((0, 4))
            rows.append(_row(record, format_boxes(mean.tolist())))
    return rows


def structure(record: Record) -> str:
    """What a VG record asks for: its `structure`, else its question."""
    return str(record.extra.get("structure") or record.question).lower()


def most_frequent_rows(train: Sequence[Record], test: Sequence[Record]) -> list[dict[str, Any]]:
    """The most frequent answer of the task in the training split, whatever the question."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in train:
        answers[record.task][record.answer] += 1
    best = {
        task: min(counts, key=lambda answer: (-counts[answer], answer))
        for task, counts in answers.items()
    }
    return [_row(record, best.get(record.task, "")) for record in test]


def _row(record: Record, response: str) -> dict[str, Any]:
    """The part of a prediction line that evaluation reads."""
    return {
        "id": record.id,
        "modality": record.modality,
        "task": record.task,
        "group": record.group,
        "annotation": record.answer,
        "response": response,
        "boxes": [list(box) for box in record.boxes],
    }
