"""Looking for faults before any work starts: every one, each with its file and line."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from clinkd.data.boxes import Box, stated_boxes, to_box
from clinkd.data.images import image_size, load_image, resolve_image
from clinkd.data.records import Record, collector_paused, scan_records
from clinkd.data.split import leaks
from clinkd.errors import DataError, SetupError

ImageCheck = Literal["exists", "header", "decode"]
IMAGE_CHECKS: tuple[ImageCheck, ...] = get_args(ImageCheck)
DECODE_AT_MOST = 2000  # images; above, `require_sound` reads headers only
MAX_ASPECT = 200  # Qwen-VL image processors refuse images longer than this many times their width
_SHOWN = 5  # faults in one error message
# forms of boxes that `clinkd data convert` reads, by the name that it has for them
_CONVERTED = {"box": "box", "json": "qwen2.5, or qwen3"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one record."""

    place: str  # file and line, or the record's id where no file is known
    message: str

    def __str__(self) -> str:
        known = self.message.startswith(f"{self.place}: ")  # its id
        return self.message if known else f"{self.place}: {self.message}"


@dataclass(frozen=True, slots=True)
class _Placed:
    place: str
    record: Record


def check_dataset(
    train: str | os.PathLike[str] | Sequence[Record],
    test: str | os.PathLike[str] | Sequence[Record] | None,
    root: str | os.PathLike[str],
    *,
    images: ImageCheck = "header",
) -> list[Fault]:
    """Check one or two splits and that nothing leaks between them.

    Args:
        train, test: JSON-lines files, or records already read.
        root: folder that image paths are relative to.
        images: `exists` looks for the files, `header` reads sizes too and sees a PNG that is cut
            off, `decode` decodes every image and compares the files of the two splits.

    Returns:
        One fault for each record that has any, in order.

    Raises:
        ValueError: another kind of image check.
        DataError: a file that cannot be read at all.
        SetupError: DICOM or NIfTI images without the extra `medical`.
    """
    if images not in IMAGE_CHECKS:
        raise ValueError(f"images must be one of {', '.join(IMAGE_CHECKS)}, got {images!r}")
    faults: list[Fault] = []
    checker = _Images(Path(root), images)
    in_train, _ = _check_split(train, checker, faults)
    _, sound_test = _check_split(test if test is not None else [], checker, faults)
    # a fault of a training record does not hide that a test record shares its patient
    faults += _leaks(in_train, sound_test, checker)
    return faults


def _check_split(
    source: str | os.PathLike[str] | Sequence[Record], checker: "_Images", faults: list[Fault]
) -> tuple[list[_Placed], list[_Placed]]:
    """All records of a split that could be read, and those without fault; notes the others."""
    placed: list[_Placed] = []
    sound: list[_Placed] = []
    for place, found in _rows(source):
        if isinstance(found, DataError):
            faults.append(Fault(place, str(found)))
            continue
        placed.append(_Placed(place, found))
        message = _first_fault(found, checker)
        if message is None:
            sound.append(placed[-1])
        else:
            faults.append(Fault(place, message))
    if isinstance(source, str | os.PathLike) and not placed and not faults:
        faults.append(Fault(os.fspath(source), "holds no record"))
    return placed, sound


def require_sound(
    train: Sequence[Record], test: Sequence[Record], root: str | os.PathLike[str]
) -> None:
    """Check both splits; images are decoded unless there are over `DECODE_AT_MOST` of them.

    Raises:
        DataError: the first faults, and how many there are.
    """
    for split, records in (("training", train), ("test", test)):
        if not records:
            raise DataError(f"the {split} split holds no record")
    names = {name for record in (*train, *test) for name in record.images}
    images: ImageCheck = "decode" if len(names) <= DECODE_AT_MOST else "header"
    with collector_paused():
        faults = check_dataset(train, test, root, images=images)
    if faults:
        shown = "; ".join(map(str, faults[:_SHOWN]))
        more = f" … and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError(
            f"{len(faults)} records cannot be used: {shown}{more}. List all: clinkd data check"
        )


def check_aspect(name: str, size: tuple[int, int]) -> str | None:
    """Whether an image, its size in pixels, is too thin for the models, or None."""
    if max(size) <= MAX_ASPECT * min(size):
        return None
    return f"image {name!r} is {size[0]} × {size[1]}: over {MAX_ASPECT} times as long"


def check_text(record: Record) -> str | None:
    """Whether the boxes in a record's texts are whole, in order, and those of `boxes`."""
    found: list[Box] = []
    answered = False  # with a box, by the last turn
    for turn in record.conversations:
        stated = stated_boxes(turn.value)
        answered = bool(stated)
        other = next((box for box in stated if box.form in _CONVERTED), None)
        if other is not None:
            return (
                f"{record.id}: the text holds {turn.value[other.start : other.end]!r:.60}, where "
                "records have <|box_start|>(x1,y1),(x2,y2)<|box_end|>: clinkd data convert IN OUT "
                f"--from-boxes {_CONVERTED[other.form]}"
            )
        try:
            found += (to_box(box.corners) for box in stated)
        except ValueError as error:
            return f"{record.id}: the text holds {error}"
    if found and set(found) != set(record.boxes):
        given = [list(box) for box in record.boxes]
        return (
            f"{record.id}: 'boxes' is {given}, but the text holds "
            f"{[list(box) for box in dict.fromkeys(found)]}; both must hold the same"
        )
    if record.task == "VG" and not answered:
        return f"{record.id}: the answer of a VG record must hold a box"
    return None


def _rows(
    source: str | os.PathLike[str] | Sequence[Record],
) -> Iterator[tuple[str, Record | DataError]]:
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        yield from ((f"{path}:{number}", found) for number, found in scan_records(source))
    else:
        yield from ((record.id, record) for record in source)


def _first_fault(record: Record, checker: "_Images") -> str | None:
    message = check_text(record)
    if message is not None:
        return message
    for index, name in enumerate(record.images):
        size = record.size if index == 0 and len(record.images) == 1 else None
        message = checker.fault(name, size)
        if message is not None:
            return f"{record.id}: {message}"
    return None


def _leaks(train: list[_Placed], test: list[_Placed], checker: "_Images") -> list[Fault]:
    place = {item.record.id: item.place for item in test}
    out = [
        Fault(place[record.id], f"{record.id}: {message}")
        for record, message in leaks(
            [i.record for i in train], [i.record for i in test], checker.root
        )
    ]
    if not checker.digests:
        return out
    leaking = {fault.place for fault in out}
    known = {checker.digests.get(n): n for item in train for n in item.record.images}
    known.pop(None, None)
    for item in test:
        for name in item.record.images:
            same = known.get(checker.digests.get(name))
            if same is not None and item.place not in leaking:
                leaking.add(item.place)
                message = f"image {name!r} is the training split's {same!r} under another name"
                out.append(Fault(item.place, f"{item.record.id}: {message}"))
    return out


class _Images:
    """Looks at each image once, however many records ask about it."""

    def __init__(self, root: Path, how: ImageCheck) -> None:
        self.root = root
        self.how = how
        self.digests: dict[str, str | None] = {}  # of the decoded pixels, with `decode` alone
        self._seen: dict[str, tuple[int, int] | str | None] = {}  # size, fault, or only there

    def fault(self, name: str, size: tuple[int, int] | None) -> str | None:
        """What is wrong with an image, whose size must be `size` unless that is None."""
        if name not in self._seen:
            self._seen[name] = self._look(name)
        seen = self._seen[name]
        if isinstance(seen, str):
            return seen
        if size is not None and seen is not None and size != seen:
            return f"'size' is {list(size)}, but image {name!r} has {list(seen)} pixels"
        return None

    def _look(self, name: str) -> tuple[int, int] | str | None:
        look: Callable[[str], tuple[int, int] | None] = getattr(self, f"_{self.how}")
        try:
            size = look(name)
        except SetupError:
            raise
        except DataError as error:
            hint = "; --root, or data.root of a config, says where images lie"
            return str(error) + (hint if "does not exist under" in str(error) else "")
        return size if size is None else check_aspect(name, size) or size

    def _exists(self, name: str) -> None:
        resolve_image(self.root, name)

    def _header(self, name: str) -> tuple[int, int]:
        return image_size(self.root, name, png_end=True)

    def _decode(self, name: str) -> tuple[int, int]:
        image = load_image(self.root, name)
        self.digests[name] = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        return image.size
