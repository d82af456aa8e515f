"""Prediction files: ours and BiRD's, malformed lines counted and listed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clinkd.data.formats import guess_task
from clinkd.data.records import TASKS, Record, scan_lines
from clinkd.errors import DataError

_TEXTS = ("annotation", "response")


@dataclass(frozen=True)
class Predictions:
    """Rows that can be scored, and the lines that cannot: (number, why)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def read_predictions(
    path: str | os.PathLike[str],
    *,
    reference: Sequence[Record] | None = None,
    task: str | None = None,
    skip_bad: bool = False,
) -> Predictions:
    """Read a JSON-lines file of predictions.

    BiRD's files have `id`, `image`, `question`, `annotation` and `response` only: modality is the
    image name's prefix up to "_", the task is `task` or told by where boxes are.

    Args:
        reference: records that give the truth by id, in place of what the file says.
        task: of all rows that name none.
        skip_bad: leave malformed lines out; else the first is an error.

    Raises:
        DataError: the file and line at fault, and why.
    """
    truth = {record.id: record for record in reference or ()}
    found = Predictions()
    seen: set[str] = set()
    for number, value in scan_lines(path):
        try:
            if isinstance(value, DataError):
                raise value
            row = _row(value, truth if reference is not None else None, task)
            if row["id"] in seen:
                raise DataError(f"duplicate id {row['id']!r}")
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{path}:{number}: {error}; --skip-bad leaves it out") from None
            found.bad.append((number, str(error)))
            continue
        seen.add(row["id"])
        found.rows.append(row)
    if not found.rows:
        raise DataError(f"{path}: holds no prediction")
    missing = sorted(set(truth) - seen)
    if missing:
        shown = ", ".join(missing[:3])
        raise DataError(f"{path}: no prediction for {len(missing)} records, as {shown}")
    return found


def _row(row: Any, truth: Mapping[str, Record] | None, task: str | None) -> dict[str, Any]:
    if not isinstance(row, dict) or "id" not in row:
        raise DataError("must be an object with an 'id'")
    row["id"] = str(row["id"])
    if truth is not None:
        record = truth.get(row["id"])
        if record is None:
            raise DataError(f"id {row['id']!r} is not in the reference")
        row |= {
            "annotation": record.answer,
            "question": record.question,
            "task": record.task,
            "modality": record.modality,
            "group": record.group,
            "boxes": [list(box) for box in record.boxes],
        }
    if isinstance(row.get("response"), list) and len(row["response"]) == 1:
        row["response"] = row["response"][0]  # as the published inference script stores it
    for key in _TEXTS:
        if not isinstance(row.get(key), str):
            raise DataError(f"'{key}' must be a text, got {row.get(key)!r}")
    turns = [
        {"from": "human", "value": str(row.get("question", ""))},
        {"from": "gpt", "value": row["annotation"]},
    ]
    row["task"] = row.get("task") or task or guess_task(turns)
    if row["task"] not in TASKS:
        raise DataError(f"unknown task {row['task']!r}; expected one of {', '.join(TASKS)}")
    image = row.get("image")
    name = os.path.basename(image) if isinstance(image, str) else row["id"]
    row["modality"] = str(row.get("modality") or name.split("_", 1)[0])
    row["group"] = str(row.get("group") or name)
    return row
