"""Cards of test images: true and predicted boxes, every candidate, right and wrong answers."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from clinkd.data.boxes import parse_boxes
from clinkd.data.images import load_image
from clinkd.data.records import TASKS
from clinkd.errors import DataError
from clinkd.report.judge import MOST_JUDGED, as_boxes, judge
from clinkd.report.read import Row, candidates_of
from clinkd.report.scores import number
from clinkd.report.selection import first_beam
from clinkd.report.text import cut, label, pieces

T = TypeVar("T")

CARDS_PER_TASK = 12
MOST_PICTURE_BYTES = 4 << 20  # of all pictures together, as text; the page stays under 6 MB
MOST_IMAGES = 4  # of a card
MOST_CANDIDATES = 16  # as many as the search has
MOST_IN_CANDIDATE = 800  # characters
MOST_BOXES = 20  # drawn of one text
_ENCODINGS = ((384, 82), (288, 74), (200, 64), (128, 55))  # longest side in pixels, JPEG quality
_VERDICTS = ("right", "wrong", "partly")


class Pictures:
    """Small JPEG copies of images as data URIs, each image read once.

    Made smaller until all of them fit; where the smallest do not, the last ones are left out.

    Args:
        root: the data root; None where it is unknown: every picture is then missing.
        names: all images that will be asked for, as often as they will be, in the page's order.
    """

    def __init__(self, root: Path | None, names: Sequence[str]) -> None:
        self.missing: dict[str, str] = {}
        self.left_out: list[str] = []
        self._uses = Counter(names)
        originals: dict[str, Image.Image] = {}
        for name in self._uses:
            if root is None:
                self.missing[name] = "the folder of the images is not known"
                continue
            try:
                image = load_image(root, name)
            except DataError as error:
                self.missing[name] = str(error).replace(str(root.resolve()), "the data root")
                continue
            image.thumbnail((_ENCODINGS[0][0],) * 2, Image.Resampling.LANCZOS)
            originals[name] = image
        self._pictures: dict[str, Row] = {}
        for side, quality in _ENCODINGS:
            self._pictures = {n: _encode(i, side, quality) for n, i in originals.items()}
            if self._bytes() <= MOST_PICTURE_BYTES:
                break
        self.save(self._bytes() - MOST_PICTURE_BYTES)

    def _bytes(self) -> int:
        """Of all pictures as often as they stand in the page."""
        return sum(len(p["uri"]) * self._uses[name] for name, p in self._pictures.items())

    def save(self, count: int) -> None:
        """Leave out as many pictures as it takes to save so many bytes, the last ones first."""
        while count > 0 and self._pictures:
            name, picture = self._pictures.popitem()
            count -= len(picture["uri"]) * self._uses[name]
            self.left_out.append(name)

    def get(self, name: str) -> Row:
        """`uri`, `width`, `height`, or `missing`: why there is no picture."""
        if name in self.left_out:
            return {"uri": None, "missing": "left out, or the page would be too large"}
        picture = self._pictures.get(name)
        return picture or {"uri": None, "missing": self.missing.get(name, "not read")}


def _encode(image: Image.Image, side: int, quality: int) -> Row:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": f"data:image/jpeg;base64,{text}", "width": small.width, "height": small.height}


def choose(predictions: Sequence[Row], per_task: int = CARDS_PER_TASK) -> list[tuple[Row, Row]]:
    """Test questions worth a look: of each task, modality and verdict in turn; (line, judgement).

    The choice depends on the file's order alone.
    """
    judged: dict[str, list[tuple[Row, Row]]] = {task: [] for task in TASKS}
    for row in predictions:
        if str(row.get("task")) in judged:
            judged[str(row["task"])].append((row, judged_line(row)))
    by_task = [
        in_turn(
            pairs,
            outer=lambda pair: str(pair[0].get("modality") or "unknown"),
            inner=lambda pair: _VERDICTS.index(pair[1]["verdict"]),
            most=per_task,
        )
        for pairs in judged.values()
    ]
    return [pair for turn in zip_longest(*by_task) for pair in turn if pair is not None]


def in_turn(
    items: Iterable[T], outer: Callable[[T], Any], inner: Callable[[T], Any], most: int
) -> list[T]:
    """At most `most` items: the values of `outer` in turn, and beneath each those of `inner`.

    Neighbouring outer values start with different inner ones, so that a short list holds all kinds.
    """
    bins: dict[Any, dict[Any, list[T]]] = {}
    for item in items:
        bins.setdefault(outer(item), {}).setdefault(inner(item), []).append(item)
    out: list[T] = []
    for turn in count():
        for index, name in enumerate(sorted(bins)):
            kinds = sorted(kind for kind, left in bins[name].items() if left)
            if len(out) >= most or not kinds:
                continue
            out.append(bins[name][kinds[(turn + index) % len(kinds)]].pop(0))
        if len(out) >= most or not any(left for kinds in bins.values() for left in kinds.values()):
            return out
    raise AssertionError("unreachable: count() never ends")


def judged_line(row: Row) -> Row:
    """The verdict on a prediction's response; a question without an answer counts as wrong."""
    text = str(row.get("response") or "")
    result = judge(
        str(row.get("task")), text, str(row.get("annotation") or ""), as_boxes(row.get("boxes"))
    )
    return {"verdict": result.verdict, "value": result.value, "measure": result.measure}


def image_names(row: Row) -> list[str]:
    """The images of a line, one or several."""
    image = row.get("image", row.get("images"))
    names = image if isinstance(image, list) else [image]
    return [name for name in names if isinstance(name, str) and name]


def shown_images(row: Row) -> list[str]:
    """Those of a line that its card shows."""
    return image_names(row)[:MOST_IMAGES]


def cards(chosen: Sequence[tuple[Row, Row]], pictures: Pictures) -> list[Row]:
    """What the template draws, one entry a question."""
    return [_card(index, row, judged, pictures) for index, (row, judged) in enumerate(chosen)]


def _card(index: int, row: Row, judged: Row, pictures: Pictures) -> Row:
    task = str(row.get("task"))
    true = as_boxes(row.get("boxes"))
    truth = str(row.get("annotation") or "")
    candidates = candidates_of(row)
    selected = row.get("selected")
    first = first_beam(candidates) if candidates else None
    shown = [
        _candidate(position, candidate, task, truth, true, position == selected, position == first)
        for position, candidate in enumerate(candidates[:MOST_CANDIDATES])
    ]
    names = shown_images(row)
    response = str(row.get("response") or "")
    error = row.get("error")
    return {
        "number": index,
        "id": label(row.get("id")),
        "task": task,
        "modality": label(row.get("modality"), "unknown"),
        "question": pieces(str(row.get("question") or "")),
        "truth": pieces(truth),
        "response": pieces(response),
        "error": "".join(cut(str(error), MOST_IN_CANDIDATE)) if error else None,
        "images": [{"name": name} | pictures.get(name) for name in names],
        "more_images": len(image_names(row)) - len(names),
        "true_boxes": [rectangle(box) for box in true[:MOST_BOXES]],
        "predicted_boxes": _rectangles(response),
        "candidates": shown,
        "more_candidates": len(candidates) - len(shown),
        "selection": label(row.get("selection")),
        "changed": first is not None and type(selected) is int and selected != first,
        **judged,
    }


def _candidate(
    position: int,
    candidate: Row,
    task: str,
    truth: str,
    true: list[tuple[float, float, float, float]],
    chosen: bool,
    first: bool,
) -> Row:
    text = str(candidate.get("text") or "")
    result = judge(task, text, truth, true)
    return {
        "position": position,
        "text": pieces(text, MOST_IN_CANDIDATE),
        "boxes": _rectangles(text),
        "score": number(candidate.get("score")),
        "clip": number(candidate.get("clip")),
        "verdict": result.verdict,
        "value": result.value,
        "measure": result.measure,
        "chosen": chosen,
        "first": first,
    }


def _rectangles(text: str) -> list[dict[str, Any]]:
    """The first boxes of the part of an answer that is judged."""
    return [rectangle(box) for box in parse_boxes(text[:MOST_JUDGED])[:MOST_BOXES]]


def rectangle(box: Sequence[float]) -> dict[str, Any]:
    """A box (x1, y1, x2, y2) in 0…1000 as an SVG rectangle, cut to the image."""
    x1, y1, x2, y2 = (min(max(c, 0.0), 1000.0) for c in box)
    return {"x": f"{x1:g}", "y": f"{y1:g}", "width": f"{x2 - x1:g}", "height": f"{y2 - y1:g}"}
