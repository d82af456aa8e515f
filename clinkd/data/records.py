"""Records: one question about one or several images, with its answer, as ShareGPT JSON lines.

    {"id", "image" | "images": [...], "modality", "task": "VG|ROC|RC|MIA", "group": volume or patient,
     "conversations": [{"from": "human|gpt", "value"}], "boxes": [[x1, y1, x2, y2], ...], "size": [w, h]}

`boxes` are integers 0…1000 relative to the image. Keys beyond these are kept as they are.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clinkd.data.boxes import Box
from clinkd.data.files import write_jsonl
from clinkd.data.prompt import IMAGE_PLACEHOLDER
from clinkd.errors import DataError

TASKS = ("VG", "ROC", "RC", "MIA")
_KNOWN = {
    "id", "image", "images", "modality", "task", "group", "conversations", "boxes", "size"
}  # fmt: skip
MAX_LINE_BYTES = 4 << 20  # no question and answer is longer; guards against a file without newlines


@dataclass(frozen=True, slots=True)
class Turn:
    role: str  # "human" or "gpt"
    value: str


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a data set; image paths are relative to the data root."""

    id: str
    images: tuple[str, ...]
    modality: str
    task: str
    group: str
    conversations: tuple[Turn, ...]
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None  # width, height in pixels
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The first human turn without image placeholders."""
        return self.conversations[0].value.replace(IMAGE_PLACEHOLDER, "").strip()

    @property
    def answer(self) -> str:
        """The last turn of the model."""
        return self.conversations[-1].value.strip()

    def to_json(self) -> dict[str, Any]:
        """The record as its JSON object."""
        row: dict[str, Any] = {"id": self.id}
        if len(self.images) == 1:
            row["image"] = self.images[0]
        elif self.images:
            row["images"] = list(self.images)
        row |= {"modality": self.modality, "task": self.task, "group": self.group}
        row["conversations"] = [{"from": t.role, "value": t.value} for t in self.conversations]
        row["boxes"] = [list(box) for box in self.boxes]
        if self.size is not None:
            row["size"] = list(self.size)
        return row | self.extra


def record_from_json(row: Any) -> Record:
    """Check one JSON object and make a record of it.

    Raises:
        DataError: what is wrong with which key.
    """
    if not isinstance(row, dict):
        raise DataError(f"a record must be a JSON object, got {type(row).__name__}")
    identity = row.get("id")
    if not isinstance(identity, str) or not identity:
        raise DataError(f"'id' must be a non-empty string, got {identity!r}")
    images = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise DataError(f"{identity}: 'image' must be a path and 'images' a list of paths")
    task = row.get("task")
    if task not in TASKS:
        raise DataError(f"{identity}: unknown task {task!r}; expected one of {', '.join(TASKS)}")
    return Record(
        id=identity,
        images=tuple(images),
        modality=str(row.get("modality") or identity.split("_", 1)[0]),
        task=task,
        group=str(row.get("group") or identity),
        conversations=_turns(identity, row.get("conversations"), len(images)),
        boxes=_boxes(identity, row.get("boxes", [])),
        size=_size(identity, row.get("size")),
        extra={key: value for key, value in row.items() if key not in _KNOWN},
    )


def _turns(identity: str, turns: Any, num_images: int) -> tuple[Turn, ...]:
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        raise DataError(f"{identity}: 'conversations' must be pairs of human and gpt turns")
    out = []
    for index, turn in enumerate(turns):
        role = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != role:
            raise DataError(
                f"{identity}: turn {index + 1} of 'conversations' must be from {role!r}"
            )
        value = turn.get("value")
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{identity}: turn {index + 1} of 'conversations' has no text")
        out.append(Turn(role, value))
    marks = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in out)
    if marks not in (0, num_images):
        raise DataError(f"{identity}: {marks} {IMAGE_PLACEHOLDER} marks for {num_images} images")
    return tuple(out)


def _boxes(identity: str, boxes: Any) -> tuple[Box, ...]:
    if not isinstance(boxes, list):
        raise DataError(f"{identity}: 'boxes' must be a list, got {type(boxes).__name__}")
    out: list[Box] = []
    for box in boxes:
        whole = isinstance(box, list) and len(box) == 4 and all(type(c) is int for c in box)
        if not whole:
            raise DataError(f"{identity}: a box must be four whole numbers 0…1000, got {box!r}")
        x1, y1, x2, y2 = box
        if not all(0 <= c <= 1000 for c in box):
            raise DataError(f"{identity}: box {box} lies outside the image (0…1000)")
        if x1 >= x2 or y1 >= y2:
            raise DataError(f"{identity}: box {box} is reversed or empty; write [x1, y1, x2, y2]")
        out.append((x1, y1, x2, y2))
    return tuple(out)


def _size(identity: str, size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and n > 0 for n in size)
    ):
        raise DataError(f"{identity}: 'size' must be [width, height] in pixels, got {size!r}")
    return size[0], size[1]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read and check a JSON-lines file; ids must be unique.

    Raises:
        DataError: the file and line at fault, and why.
    """
    path = Path(path)
    records: list[Record] = []
    seen: dict[str, int] = {}
    try:
        file = open(path, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                record = record_from_json(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON (cut in half?): {error.msg}"
                ) from None
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            if record.id in seen:
                raise DataError(
                    f"{path}:{number}: duplicate id {record.id!r}, first seen on line {seen[record.id]}"
                )
            seen[record.id] = number
            records.append(record)
    return records


def _lines(file: Any, path: Path) -> Iterable[str]:
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) >= MAX_LINE_BYTES:
            raise DataError(f"{path}: a line is longer than {MAX_LINE_BYTES} bytes")
        yield line


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write records as JSON lines, atomically."""
    write_jsonl(path, (record.to_json() for record in records))
