"""What a data set holds: counts, sizes of boxes and images, lengths of texts."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from clinkd.data.clusters import image_files
from clinkd.data.records import TASKS, Record

_QUANTILES = (("min", 0.0), ("p5", 0.05), ("median", 0.5), ("p95", 0.95), ("max", 1.0))


def describe(
    records: Sequence[Record], root: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Facts about records, as plain JSON values.

    Args:
        root: where the images lie, to know one under two names; None: by names alone.

    Returns:
        `records`, `images` (files), `groups`; `counts` by modality and task; `boxes` and
        `box_area_percent` (of the image, quantiles); `question_words`, `answer_words`,
        `image_width`, `image_height` (quantiles over the records that know them);
        `duplicate_questions`: records whose image, question and answer an earlier one has.
    """
    counts: dict[str, dict[str, int]] = {}
    for record in records:
        row = counts.setdefault(record.modality, dict.fromkeys(TASKS, 0))
        row[record.task] += 1
    said = Counter((record.images, record.question, record.answer) for record in records)
    boxes = [box for record in records for box in record.boxes]
    sizes = [record.size for record in records if record.size is not None]
    return {
        "records": len(records),
        "images": len(set(image_files(records, root).values())),
        "groups": len({record.group for record in records}),
        "counts": dict(sorted(counts.items())),
        "boxes": len(boxes),
        "box_area_percent": quantiles((x2 - x1) * (y2 - y1) / 1e4 for x1, y1, x2, y2 in boxes),
        "question_words": quantiles(len(record.question.split()) for record in records),
        "answer_words": quantiles(len(record.answer.split()) for record in records),
        "image_width": quantiles(width for width, _ in sizes),
        "image_height": quantiles(height for _, height in sizes),
        "duplicate_questions": sum(count - 1 for count in said.values()),
    }


def quantiles(values: Iterable[float]) -> dict[str, float] | None:
    """Least, 5 %, median, 95 %, largest and mean; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    last = len(ordered) - 1
    out = {name: round(float(ordered[round(share * last)]), 3) for name, share in _QUANTILES}
    return out | {"mean": round(sum(ordered) / len(ordered), 3)}
