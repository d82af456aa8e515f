"""Bounding boxes in text: one place for every convention that models write them in.

| convention | text | coordinates |
| --- | --- | --- |
| `qwen2` | `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` | 0…1000 of the image (Qwen2-VL) |
| `box` | `<box>(x1,y1),(x2,y2)</box>` | 0…1000 of the image (Qwen-VL, BiRD, Med-GRIT) |
| `qwen2.5` | `{"bbox_2d": [x1, y1, x2, y2]}` | pixels of the resized image (Qwen2.5-VL) |
| `qwen3` | `{"bbox_2d": [x1, y1, x2, y2]}` | 0…1000 of the image (Qwen3-VL) |
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Box = tuple[int, int, int, int]  # x1, y1, x2, y2: integers 0…1000 relative to the image
Convention = Literal["qwen2", "box", "qwen2.5", "qwen3"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

# at most nine digits, so that no number overflows and a hostile text takes linear time
_NUMBER = r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
_PAIRS = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)\s*,\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
PATTERNS: dict[str, re.Pattern[str]] = {
    "qwen2": re.compile(rf"<\|?box_start\|?>\s*{_PAIRS}\s*<\|?box_end\|?>"),
    "box": re.compile(rf"<box>\s*{_PAIRS}\s*</box>"),
    # atomic: of the boxes between the same braces, maybe thousands, only the first is tried
    "json": re.compile(
        r'\{(?>[^{}]*?"bbox_2d"\s*:\s*\['
        rf"\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\])"
        r'(?:"(?:[^"\\]|\\.){0,400}+"|[^{}"])*+\}'
    ),
    "plain": re.compile(_PAIRS),
}
_ALL = tuple(PATTERNS)
_SIGNS = {"qwen2": "box_start", "box": "<box>", "json": "bbox_2d", "plain": "("}  # of each form
# what is left of boxes that are malformed or cut off: all from a start mark to its end mark, or to
# the text's end, and points that a text ends with
_BROKEN = re.compile(
    r"<\|?(?:box|quad)_start\|?>.*?(?:<\|?(?:box|quad)_end\|?>|\Z)"
    r"|<(?:box|quad)>.*?(?:</(?:box|quad)>|\Z)"
    r'|\{(?>[^{}]*?"bbox_2d")[^{}]*+(?:\}|\Z)',
    re.DOTALL,
)
_SOME = r"-?[0-9]{0,9}(?:\.[0-9]{0,9})?"
_CUT_OFF = re.compile(
    rf"(?:\(\s*+{_NUMBER}\s*+,\s*+{_NUMBER}\s*+\)\s*+(?:,\s*+)?)?+"
    rf"(?:\(\s*+{_SOME}\s*+(?:,\s*+{_SOME}\s*+)?)?\Z"
)
_MARKUP = re.compile(
    r"</?(?:box|ref|img|quad)>|<\|?(?:box|quad)_(?:start|end)\|?>|<\|object_ref_(?:start|end)\|>"
)


class StatedBox(NamedTuple):
    """A box as a text has it: where, in which form, its corners exactly as written."""

    start: int
    end: int
    form: str
    corners: tuple[float, float, float, float]

    @property
    def ordered(self) -> tuple[float, float, float, float]:
        """The corners left, top, right, bottom, where they came reversed as well."""
        x1, y1, x2, y2 = self.corners
        return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def format_boxes(
    boxes: Sequence[Sequence[float]],
    convention: Convention = "qwen2",
    size: tuple[int, int] | None = None,
) -> str:
    """Write boxes as text, one after the other.

    Args:
        boxes: 0…1000 relative to the image.
        convention: see the module's table.
        size: (width, height) in pixels of the image as the model sees it; needed by `qwen2.5`. A
            side that rounds to no pixel becomes one pixel long, as in `to_box`.

    Raises:
        ValueError: an unknown convention, or `qwen2.5` without a size.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if convention == "qwen2":
        return "".join(
            f"<|box_start|>({x1:.0f},{y1:.0f}),({x2:.0f},{y2:.0f})<|box_end|>"
            for x1, y1, x2, y2 in boxes
        )
    if convention == "box":
        return "".join(
            f"<box>({x1:.0f},{y1:.0f}),({x2:.0f},{y2:.0f})</box>" for x1, y1, x2, y2 in boxes
        )
    if convention == "qwen3":
        size = (1000, 1000)
    elif size is None:
        raise ValueError("convention 'qwen2.5' writes pixels: size (width, height) is needed")
    out = []
    for x1, y1, x2, y2 in boxes:
        left, right = _side(round(x1 * size[0] / 1000), round(x2 * size[0] / 1000), size[0])
        top, bottom = _side(round(y1 * size[1] / 1000), round(y2 * size[1] / 1000), size[1])
        out.append(f'{{"bbox_2d": [{left}, {top}, {right}, {bottom}]}}')
    return "".join(out)


def parse_boxes(
    text: str,
    convention: Convention | None = None,
    size: tuple[int, int] | None = None,
) -> list[tuple[float, float, float, float]]:
    """Read the boxes that a text carries, in order, as 0…1000 relative to the image.

    Corners that come reversed are put in order. Without a convention those of every marked form are
    read, and bare `(x1,y1),(x2,y2)` pairs, whatever forms a text mixes.

    Args:
        text: a question or an answer.
        convention: see the module's table; None tries all of them.
        size: (width, height) in pixels; needed by `qwen2.5`.
    """
    if convention is None:
        names: Sequence[str] = _ALL
    elif convention in CONVENTIONS:
        names = ["json" if convention.startswith("qwen2.") or convention == "qwen3" else convention]
    else:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    scale_x, scale_y = 1.0, 1.0
    if convention == "qwen2.5":
        if size is None:
            raise ValueError("convention 'qwen2.5' holds pixels: size (width, height) is needed")
        scale_x, scale_y = 1000 / size[0], 1000 / size[1]
    return [
        (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
        for left, top, right, bottom in (box.ordered for box in stated_boxes(text, names))
    ]


def find_boxes(text: str) -> list[tuple[float, float, float, float]]:
    """The boxes of a text exactly as written, corners not put in order; 0…1000 is assumed."""
    return [box.corners for box in stated_boxes(text)]


def stated_boxes(text: str, forms: Sequence[str] = _ALL) -> list[StatedBox]:
    """Every box of a text, in the text's order; of two that overlap, the one that starts first.

    A marked form holds a bare pair, and is found first; then its place holds no other.

    Args:
        forms: keys of `PATTERNS`.
    """
    found: list[StatedBox] = []
    for form in forms:

        def take(match: re.Match[str], form: str = form) -> str:
            x1, y1, x2, y2 = map(float, match.groups())
            found.append(StatedBox(*match.span(), form, (x1, y1, x2, y2)))
            return "\0" * len(match[0])

        if _SIGNS[form] in text:  # seldom, and ten times as fast to see as by the pattern
            text = PATTERNS[form].sub(take, text)
    if len(forms) > 1 and len(found) > 1:
        found.sort()
    out: list[StatedBox] = []
    for box in found:
        if not out or box.start >= out[-1].end:
            out.append(box)
    return out


def to_box(corners: Sequence[float]) -> Box:
    """Corners in 0…1000 as whole numbers; a side that rounds to nothing becomes 1 long.

    Raises:
        ValueError: a box outside the image (by more than rounding does), reversed or empty.
    """
    x1, y1, x2, y2 = corners
    if 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000:  # nearly all
        left, top, right, bottom = int(x1 + 0.5), int(y1 + 0.5), int(x2 + 0.5), int(y2 + 0.5)
        if left < right and top < bottom:
            return left, top, right, bottom
    if min(corners) < -1 or max(corners) > 1001:
        raise ValueError(f"a box outside the image (0…1000): {_plain(corners)}")
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"a box that is reversed or empty: {_plain(corners)}")
    left, top, right, bottom = (min(max(int(c + 0.5), 0), 1000) for c in corners)
    left, right = _side(left, right, 1000)
    top, bottom = _side(top, bottom, 1000)
    return left, top, right, bottom


def _side(low: int, high: int, most: int) -> tuple[int, int]:
    """Both ends of a side; one apart, and not past `most`, where rounding left it no length."""
    if low != high:
        return low, high
    return (low, high + 1) if high < most else (low - 1, high)


def _plain(corners: Sequence[float]) -> str:
    return "(" + ", ".join(f"{c:g}" for c in corners) + ")"


def strip_boxes(text: str) -> str:
    """The text without boxes and box markup, spaces tidied: what a text encoder should judge.

    Of a box that is malformed or cut off nothing stays either: all from its start mark to its end
    mark, or to the text's end, goes, and so do points that a text ends with.
    """
    for pattern in (*PATTERNS.values(), _BROKEN, _CUT_OFF, _MARKUP):
        text = pattern.sub("", text)
    return re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", text)).strip()


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where either has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return intersection / (areas - intersection)
