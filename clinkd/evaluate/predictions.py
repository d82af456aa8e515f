"""Prediction files: ours and BiRD's, malformed lines counted and listed."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clinkd.data.boxes import CONVENTIONS, Convention
from clinkd.data.formats import guess_task
from clinkd.data.formats_boxes import convert_boxes
from clinkd.data.records import TASKS, Record, scan_lines
from clinkd.errors import ConfigError, DataError

_TEXTS = ("annotation", "response")
_LEAST, _MOST = -1e4, 1.0  # of a mean log-probability; a hair above 0 is rounding


@dataclass(frozen=True)
class Predictions:
    """Rows that can be scored, and what cannot.

    Attributes:
        bad: lines left out: (number, why).
        missing: ids of the reference without a row, in its order.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_predictions(
    path: str | os.PathLike[str],
    *,
    reference: Sequence[Record] | None = None,
    task: str | None = None,
    skip_bad: bool = False,
    boxes: str | None = None,
) -> Predictions:
    """Read a JSON-lines file of predictions.

    BiRD's files have `id`, `image`, `question`, `annotation` and `response` only: modality is the
    image name's prefix up to "_", the group its part up to the last "--" (the volume), the task is
    `task` or told by where boxes are.

    Args:
        reference: records that give the truth by id, in place of what the file says.
        task: of all rows that name none.
        skip_bad: leave malformed lines out, and records without a row; else the first is an error.
        boxes: convention that the texts have their boxes in, which are rewritten to `qwen2`; see
            `clinkd.data.boxes`. `qwen2.5` needs the row's `size`, that of the image as the model
            saw it. None: texts stay, and a box counts thousandths of the image in every form.

    Raises:
        ConfigError: an unknown convention.
        DataError: the file and line at fault, and why.
    """
    if boxes is not None and boxes not in CONVENTIONS:
        raise ConfigError(f"boxes must be one of {', '.join(CONVENTIONS)}, got {boxes!r}")
    truth = {record.id: record for record in reference or ()}
    found = Predictions()
    seen: set[str] = set()
    for number, value in scan_lines(path):
        try:
            if isinstance(value, DataError):
                raise value
            row = _row(value, truth if reference is not None else None, task, boxes)
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
    found.missing.extend(name for name in truth if name not in seen)
    if found.missing and not skip_bad:
        shown = ", ".join(sorted(found.missing)[:3])
        raise DataError(
            f"{path}: no prediction for {len(found.missing)} records, as {shown}; "
            "--skip-bad leaves them out"
        )
    return found


def _row(
    row: Any, truth: Mapping[str, Record] | None, task: str | None, boxes: Convention | None
) -> dict[str, Any]:
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
    _check_shapes(row)
    if boxes is not None:
        for key in _TEXTS if truth is None else ("response",):  # a reference has its own form
            row[key] = _as_qwen2(row[key], boxes, row.get("size"))
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
    stem = os.path.splitext(name.partition("#")[0])[0] if isinstance(image, str) else name
    # as `clinkd data convert --from bird`: slices of one volume are one group
    row["group"] = str(row.get("group") or stem.rsplit("--", 1)[0])
    return row


def _check_shapes(row: Mapping[str, Any]) -> None:
    """Of what a line may have beside its texts.

    Raises:
        DataError: a key's value is of another form.
    """
    boxes = row.get("boxes")
    if boxes is not None and not (isinstance(boxes, list) and all(map(_is_box, boxes))):
        raise DataError(f"'boxes' must be a list of [x1, y1, x2, y2], got {boxes!r:.80}")
    candidates = row.get("candidates")
    if candidates is None:
        candidates = []
    if not isinstance(candidates, list):
        raise DataError(f"'candidates' must be a list of objects, got {candidates!r:.80}")
    for candidate in candidates:
        if not isinstance(candidate, dict) or not isinstance(candidate.get("text"), str):
            raise DataError(f"a candidate must be an object with a 'text', got {candidate!r:.80}")
        mean = candidate.get("mean_log_prob")
        if mean is not None and not (_is_number(mean) and _LEAST <= mean <= _MOST):
            raise DataError(f"'mean_log_prob' must be a log-probability, at most 0, got {mean!r}")
    selected = row.get("selected")
    if selected is None:
        return
    if type(selected) is not int or not 0 <= selected < max(1, len(candidates)):
        raise DataError(
            f"'selected' must be the place of one of {len(candidates)} candidates, counted from 0, "
            f"got {selected!r:.80}"
        )


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    """Finite, and not too large for a float."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _as_qwen2(text: str, convention: Convention, size: Any) -> str:
    """The text with its boxes of one convention as thousandths, in Qwen2-VL's form."""
    if convention == "qwen2" or (convention != "box" and "bbox_2d" not in text):
        return text
    pixels = None
    if convention == "qwen2.5":
        if (
            not isinstance(size, list)
            or len(size) != 2
            or not all(type(side) is int and side > 0 for side in size)
        ):
            raise DataError(
                "boxes in pixels need 'size', [width, height] of the image as the model saw it, "
                f"got {size!r:.80}"
            )
        pixels = (size[0], size[1])
    try:
        return convert_boxes(text, convention, "qwen2", pixels, strict=False)
    except ValueError as error:
        raise DataError(f"a box that cannot be read: {error}") from None
