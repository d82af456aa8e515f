"""Reading and writing the data formats of other projects.

| format | row | boxes in its texts |
| --- | --- | --- |
| `clinkd` | our own record, see `clinkd.data.records` | `qwen2` |
| `bird` | BiRD and Med-GRIT: `{"id", "conversations": [[question, answer], ...]}` | `box` |
| `llava`, `llava-med` | `{"id", "image", "conversations": [{"from", "value"}]}` | `qwen2` |
| `sharegpt` | LLaMA-Factory: `{"messages" or "conversations", "images"}` | `qwen2` |
| `swift` | ms-swift: as ShareGPT, boxes apart in `"objects"` | – |

Each can lie in `.jsonl`, `.json` (one list) or, but for `bird`, `.parquet`. A record's own texts
always carry boxes in the convention `qwen2`.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clinkd.data import formats_layouts as layouts
from clinkd.data.boxes import Box, Convention, parse_boxes, to_box
from clinkd.data.formats_boxes import Size, convert_boxes, resized_size, with_own_boxes
from clinkd.data.formats_files import read_rows, write_rows
from clinkd.data.images import image_size
from clinkd.data.records import TASKS, Record, Turn, record_from_json
from clinkd.errors import ConfigError, DataError

_NUMBER = re.compile(r"[0-9]+")  # the line or index is the last number of a place
# what reading a row of unexpected types or sizes runs into, wherever it does
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_SHORT = 6  # words; a longer answer about a region describes it (RC), a shorter one names it (ROC)


@dataclass(frozen=True, slots=True)
class Format:
    """One project's layout of a row."""

    read: Callable[[layouts.Row, layouts.SizeOf], layouts.Row]
    write: Callable[[Record], layouts.Row]
    boxes: Convention  # in its texts, unless the user says otherwise
    split_turns: bool = False  # its conversations mix tasks: one record a pair


def _read_clinkd(row: layouts.Row, size_of: layouts.SizeOf) -> layouts.Row:
    return row


FORMATS = {
    "clinkd": Format(_read_clinkd, Record.to_json, "qwen2"),
    "bird": Format(layouts.read_bird, layouts.write_bird, "box", split_turns=True),
    "llava": Format(layouts.read_llava, layouts.write_llava, "qwen2"),
    "llava-med": Format(layouts.read_llava, layouts.write_llava, "qwen2"),
    "sharegpt": Format(layouts.read_sharegpt, layouts.write_sharegpt, "qwen2"),
    "swift": Format(layouts.read_swift, layouts.write_swift, "qwen2"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """How to read or write a format."""

    boxes: Convention | None = None  # of the texts; None: the format's own
    root: str | os.PathLike[str] | None = None  # of the images, where their size is needed
    task: str | None = None  # of rows that name none; None: guessed from where boxes stand
    pixels: str = "resized"  # qwen2.5 counts those of the "resized" or of the "original" image
    min_pixels: int = 56 * 56
    max_pixels: int = 768 * 768
    factor: int = 28

    def __post_init__(self) -> None:
        if self.pixels not in ("resized", "original"):
            raise ConfigError(f"pixels must be 'resized' or 'original', got {self.pixels!r}")
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")

    def size_of(self, name: str) -> Size:
        """Pixels of an image, read from its header."""
        if self.root is None:
            raise DataError(
                f"the size of image {name!r} is not known: the boxes are in pixels, so say where "
                "the images lie with --root FOLDER, or give each record its 'size'"
            )
        return image_size(self.root, name)

    def model_size(self, images: Any, size: Any) -> Size:
        """Pixels of a record's first image as the model of convention qwen2.5 counts them."""
        if size is None and not images:
            raise DataError("boxes in pixels, but no image")
        original = (size[0], size[1]) if size is not None else self.size_of(images[0])
        if self.pixels == "original":
            return original
        return resized_size(original, self.factor, self.min_pixels, self.max_pixels)


def known_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def scan_file(
    path: str | os.PathLike[str], name: str, options: Options | None = None
) -> Iterator[tuple[str, Record | DataError]]:
    """Each record of a file with its place, or what is wrong there: one fault for a row.

    Raises:
        ConfigError: an unknown format or suffix.
        DataError: the file cannot be read at all.
    """
    layout, options = known_format(name), options or Options()
    seen: dict[str, str] = {}
    stems: dict[str, int] = {}
    for place, row in read_rows(path):
        if isinstance(row, DataError):
            yield place, row
            continue
        try:
            for record in _records(row, layout, options, stems, Path(path).stem, place):
                if record.id in seen:
                    raise DataError(f"duplicate id {record.id!r}, first seen at {seen[record.id]}")
                seen[record.id] = place
                yield place, record
        except DataError as error:
            yield place, error
        except _MALFORMED as error:
            kind = type(error).__name__
            yield place, DataError(f"not laid out as {name!r} rows are ({kind}: {error})"[:300])


def read_file(
    path: str | os.PathLike[str], name: str, options: Options | None = None
) -> list[Record]:
    """All records of a file.

    Raises:
        DataError: the first fault, with its place.
        ConfigError: an unknown format or suffix.
    """
    records = []
    for place, found in scan_file(path, name, options):
        if isinstance(found, DataError):
            raise DataError(f"{place}: {found}")
        records.append(found)
    return records


def write_file(
    path: str | os.PathLike[str],
    records: Iterable[Record],
    name: str,
    options: Options | None = None,
) -> None:
    """Write records in a project's format, atomically.

    Raises:
        DataError: a record that the format cannot hold.
        ConfigError: an unknown format or suffix.
    """
    layout, options = known_format(name), options or Options()
    target = options.boxes or layout.boxes
    if name == "swift" and target != "qwen2":
        raise ConfigError("ms-swift keeps boxes in 'objects' and writes them itself: leave --boxes")
    if name == "clinkd" and target != "qwen2":
        raise ConfigError("our own records carry boxes as 'qwen2'; models get theirs from it")

    def rows() -> Iterator[layouts.Row]:
        for record in records:
            try:
                yield layout.write(_with_boxes(record, "qwen2", target, options))
            except DataError:
                raise
            except ValueError as error:
                raise DataError(f"{record.id}: {error}") from None

    write_rows(path, rows())


def _with_boxes(record: Record, source: Convention, target: Convention, options: Options) -> Record:
    """The record with the boxes of its texts in another convention."""
    if source == target:
        return record
    pixels = "qwen2.5" in (source, target)
    size = options.model_size(record.images, record.size) if pixels else None
    turns = tuple(
        Turn(turn.role, convert_boxes(turn.value, source, target, size))
        for turn in record.conversations
    )
    return replace(record, conversations=turns)


def _records(
    row: Any, layout: Format, options: Options, stems: dict[str, int], file: str, place: str
) -> Iterator[Record]:
    """The records of one row: one, or one for each pair of turns."""
    if not isinstance(row, dict):
        raise DataError(f"a record must be a JSON object, got {type(row).__name__}")
    if layout.read is _read_clinkd:
        yield _own(row, options)
        return
    # pairs of one row mix tasks, unless it was one record of ours
    split = layout.split_turns and layouts.OWN_ID not in row
    row = layout.read(row, options.size_of)
    if row.get("id") in (None, ""):  # ShareGPT rows need none; 0 is one
        row = row | {"id": f"{file}-{_NUMBER.findall(place)[-1]}"}
    elif type(row["id"]) is int:
        row["id"] = str(row["id"])
    turns = row["conversations"]
    pairs = [turns[i : i + 2] for i in range(0, len(turns), 2)] if split else [turns]
    for pair in pairs:
        part = row | {"conversations": pair}
        if split:
            part["id"] = _numbered(row["id"], stems)
        if len(pairs) > 1:
            part.pop("boxes", None)  # those of all pairs together
        _convert_texts(part, options.boxes or layout.boxes, options)
        yield record_from_json(part)


def _own(row: layouts.Row, options: Options) -> Record:
    """A record of ours, the boxes of its texts brought into our convention if it has another."""
    if options.task is not None and "task" not in row:
        row = row | {"task": options.task}
    record = record_from_json(row)
    source = options.boxes or "qwen2"
    if source == "qwen2.5" and not any("bbox_2d" in turn.value for turn in record.conversations):
        return record  # no pixels, so no image needed
    try:
        return _with_boxes(record, source, "qwen2", options)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{record.id}: {error}") from None


def _numbered(stem: str, stems: dict[str, int]) -> str:
    """BiRD's ids are images, which several questions share: stem, stem~2, stem~3, …"""
    stems[stem] = number = stems.get(stem, 0) + 1
    return stem if number == 1 else f"{stem}~{number}"


def _convert_texts(row: layouts.Row, source: Convention, options: Options) -> None:
    """Bring the boxes of a row's texts into our convention; fill in `boxes` and `task`."""
    turns = [turn for turn in row["conversations"] if isinstance(turn.get("value"), str)]
    images = row.get("images", [row["image"]] if "image" in row else [])
    try:
        if source == "qwen2.5" and any("bbox_2d" in turn["value"] for turn in turns):
            size = options.model_size(images, row.get("size"))
        else:
            size = None
        if source != "qwen2" and (source != "qwen2.5" or size is not None):
            for turn in turns:
                turn["value"] = convert_boxes(turn["value"], source, "qwen2", size)
                if size is not None and isinstance(row.get("boxes"), list):
                    turn["value"] = with_own_boxes(turn["value"], row["boxes"], size)
        if "boxes" not in row:
            row["boxes"] = [list(box) for box in _boxes_of(turns)]
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{row['id']}: {error}") from None
    if "task" not in row:
        row["task"] = options.task or guess_task(turns)


def _boxes_of(turns: list[dict[str, str]]) -> list[Box]:
    found = [corners for turn in turns for corners in parse_boxes(turn["value"], "qwen2")]
    return list(dict.fromkeys(to_box(corners) for corners in found))


def guess_task(turns: list[dict[str, str]]) -> str:
    """VG: a box in an answer; ROC or RC: one in a question, named or described; else MIA."""
    answers = [turn["value"] for turn in turns[1::2]]
    if any(parse_boxes(answer) for answer in answers):
        return "VG"
    if any(parse_boxes(turn["value"]) for turn in turns[::2]):
        return "ROC" if all(len(answer.split()) <= _SHORT for answer in answers) else "RC"
    return "MIA"
