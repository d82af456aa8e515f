"""Records: one question about one or several images, with its answer, as ShareGPT JSON lines.

    {"id", "image" | "images": [...], "modality", "task": "VG|ROC|RC|MIA",
     "group": volume or patient, "conversations": [{"from": "human|gpt", "value"}],
     "boxes": [[x1, y1, x2, y2], ...], "size": [w, h]}

`boxes` are integers 0…1000 relative to the image. Keys beyond these are kept as they are.
"""

import codecs
import gc
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from sys import intern
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
_INTS = tuple(range(1001))  # coordinates, one object each: a million of them would weigh 30 MB


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
        """The human turn that `answer` answers, the last one, without image placeholders."""
        return self.conversations[-2].value.replace(IMAGE_PLACEHOLDER, "").strip()

    @property
    def answer(self) -> str:
        """The last turn of the model."""
        return self.conversations[-1].value.strip()

    @property
    def system(self) -> str | None:
        """What stands before the first turn, under the key `system`; None for the model's own."""
        value = self.extra.get("system")
        return value if isinstance(value, str) and value.strip() else None

    def answered(self, text: str) -> "Record":
        """The record with another last answer."""
        return replace(self, conversations=(*self.conversations[:-1], Turn("gpt", text)))

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
    if not isinstance(identity, str) or not identity.strip():
        raise DataError(f"'id' must be a non-empty string, got {identity!r}")
    images = _images(identity, row)
    task = row.get("task")
    if task not in TASKS:
        raise DataError(f"{identity}: unknown task {task!r}; expected one of {', '.join(TASKS)}")
    return Record(
        id=identity,
        images=images,
        modality=intern(_label(identity, row, "modality") or identity.split("_", 1)[0]),
        task=intern(task),
        group=intern(_label(identity, row, "group") or identity),
        conversations=_turns(identity, row.get("conversations"), len(images)),
        boxes=_boxes(identity, row.get("boxes")),
        size=_size(identity, row.get("size")),
        extra={} if row.keys() <= _KNOWN else {k: v for k, v in row.items() if k not in _KNOWN},
    )


def _images(identity: str, row: dict[str, Any]) -> tuple[str, ...]:
    single = row.get("image")
    if type(single) is str and single and "images" not in row:  # nearly all
        return (single,)
    if "image" in row and "images" in row:
        raise DataError(f"{identity}: has both 'image' and 'images'; write one of them")
    images = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise DataError(
            f"{identity}: 'image' must be a path and 'images' a list of paths, got {images!r:.80}"
        )
    return tuple(images)


def _label(identity: str, row: dict[str, Any], key: str) -> str | None:
    """A name; numbers are taken too, as patients often have them."""
    value = row.get(key)
    if value is None or type(value) in (str, int):
        return None if value is None else str(value)
    raise DataError(f"{identity}: {key!r} must be a string, got {value!r:.80}")


def _turns(identity: str, turns: Any, num_images: int) -> tuple[Turn, ...]:
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        raise DataError(f"{identity}: 'conversations' must be pairs of human and gpt turns")
    out = []
    marks = 0
    for index, turn in enumerate(turns):
        role = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != role:
            raise DataError(
                f"{identity}: turn {index + 1} of 'conversations' must be from {role!r}"
            )
        value = turn.get("value")
        if not isinstance(value, str) or not value or value.isspace():
            raise DataError(f"{identity}: turn {index + 1} of 'conversations' has no text")
        if IMAGE_PLACEHOLDER in value:
            if role == "gpt":
                raise DataError(
                    f"{identity}: turn {index + 1}, an answer, holds {IMAGE_PLACEHOLDER}"
                )
            marks += value.count(IMAGE_PLACEHOLDER)
        out.append(Turn(role, value))
    if marks not in (0, num_images):
        raise DataError(f"{identity}: {marks} {IMAGE_PLACEHOLDER} marks for {num_images} images")
    return tuple(out)


def _boxes(identity: str, boxes: Any) -> tuple[Box, ...]:
    if boxes is None:
        return ()
    if not isinstance(boxes, list):
        raise DataError(f"{identity}: 'boxes' must be a list, got {type(boxes).__name__}")
    out: list[Box] = []
    for box in boxes:
        whole = isinstance(box, list) and len(box) == 4
        if not whole or not int is type(box[0]) is type(box[1]) is type(box[2]) is type(box[3]):
            raise DataError(f"{identity}: a box must be four whole numbers 0…1000, got {box!r:.80}")
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000):
            if min(box) < 0 or max(box) > 1000:
                raise DataError(f"{identity}: box {box} lies outside the image (0…1000)")
            raise DataError(f"{identity}: box {box} is reversed or empty; write [x1, y1, x2, y2]")
        out.append((_INTS[x1], _INTS[y1], _INTS[x2], _INTS[y2]))
    return tuple(out)


def _size(identity: str, size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and n > 0 for n in size)
    ):
        raise DataError(f"{identity}: 'size' must be [width, height] in pixels, got {size!r:.80}")
    return size[0], size[1]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read and check a JSON-lines file; ids must be unique.

    Raises:
        DataError: the first file and line at fault, and why. `scan_records` lists them all.
    """
    records: list[Record] = []
    with collector_paused():
        for number, found in scan_records(path):
            if isinstance(found, DataError):
                raise DataError(f"{path}:{number}: {found}")
            records.append(found)
    return records


def scan_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, Record | DataError]]:
    """Read a JSON-lines file; each line yields its number and its record, or what is wrong with it.

    Raises:
        DataError: the file cannot be read at all.
    """
    seen: dict[str, int] = {}
    for number, value in scan_lines(path):
        found: Record | DataError
        if isinstance(value, DataError):
            found = value
        else:
            try:
                found = record_from_json(value)
            except DataError as error:
                found = error
        if isinstance(found, Record):
            first = seen.setdefault(found.id, number)
            if first != number:
                found = DataError(f"duplicate id {found.id!r}, first seen on line {first}")
        yield number, found


def scan_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """The JSON value of each line that is not blank, or the DataError why there is none.

    Raises:
        DataError: the file cannot be read, or a line has more than `MAX_LINE_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}: the line has over {MAX_LINE_BYTES} bytes")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.isspace() and line:
                    yield number, _value(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _value(line: bytes) -> Any:
    try:
        text = line.decode()
        value, end = _DECODER.raw_decode(text) if text.startswith("{") else (None, 0)
        if end == 0 or text[end:] not in ("\n", ""):  # not an object alone on its line
            value = _DECODER.decode(text)
        if b"\\u" in line:  # half a surrogate pair could be read, but never written again
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return DataError(f"not valid UTF-8 text: {error.reason}")
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the file ends within this line (cut in half?)"
        return DataError(f"not valid JSON at column {error.colno}: {error.msg}{cut}")
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 10,000 brackets
        return DataError(f"not usable JSON: {error}")
    return value


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles meanwhile: records have none, and it doubles the time to read them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write records as JSON lines, atomically."""
    write_jsonl(path, (record.to_json() for record in records))
