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
from typing import Literal, get_args

Box = tuple[int, int, int, int]  # x1, y1, x2, y2: integers 0…1000 relative to the image
Convention = Literal["qwen2", "box", "qwen2.5", "qwen3"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

# at most nine digits, so that no number overflows and a hostile text takes linear time
_NUMBER = r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
_PAIRS = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)\s*,\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
PATTERNS: dict[str, re.Pattern[str]] = {
    "qwen2": re.compile(rf"<\|?box_start\|?>\s*{_PAIRS}\s*<\|?box_end\|?>"),
    "box": re.compile(rf"<box>\s*{_PAIRS}\s*</box>"),
    "json": re.compile(
        r'\{[^{}]*"bbox_2d"\s*:\s*\['
        rf"\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\][^{{}}]*\}}"
    ),
    "plain": re.compile(_PAIRS),
}
_MARKUP = re.compile(r"</?(?:box|ref|img|quad)>|<\|(?:box|object_ref|quad)_(?:start|end)\|>")


def format_boxes(
    boxes: Sequence[Sequence[float]],
    convention: Convention = "qwen2",
    size: tuple[int, int] | None = None,
) -> str:
    """Write boxes as text, one after the other.

    Args:
        boxes: 0…1000 relative to the image.
        convention: see the module's table.
        size: (width, height) in pixels of the image as the model sees it; needed by `qwen2.5`.

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
    scale_x, scale_y = 1.0, 1.0
    if convention == "qwen2.5":
        if size is None:
            raise ValueError("convention 'qwen2.5' writes pixels: size (width, height) is needed")
        scale_x, scale_y = size[0] / 1000, size[1] / 1000
    scaled = ((x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y) for x1, y1, x2, y2 in boxes)
    return "".join(
        f'{{"bbox_2d": [{x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}]}}' for x1, y1, x2, y2 in scaled
    )


def parse_boxes(
    text: str,
    convention: Convention | None = None,
    size: tuple[int, int] | None = None,
) -> list[tuple[float, float, float, float]]:
    """Read the boxes that a text carries, in order, as 0…1000 relative to the image.

    Corners that come reversed are put in order. Without a convention every marked form is tried,
    then bare `(x1,y1),(x2,y2)` pairs.

    Args:
        text: a question or an answer.
        convention: see the module's table; None tries all of them.
        size: (width, height) in pixels; needed by `qwen2.5`.
    """
    if convention is None:
        names = ["qwen2", "box", "json", "plain"]
    elif convention in CONVENTIONS:
        names = ["json" if convention.startswith("qwen2.") or convention == "qwen3" else convention]
    else:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    scale_x, scale_y = 1.0, 1.0
    if convention == "qwen2.5":
        if size is None:
            raise ValueError("convention 'qwen2.5' holds pixels: size (width, height) is needed")
        scale_x, scale_y = 1000 / size[0], 1000 / size[1]
    for name in names:
        found = [tuple(float(n) for n in groups) for groups in PATTERNS[name].findall(text)]
        if found:
            return [
                (
                    min(x1, x2) * scale_x,
                    min(y1, y2) * scale_y,
                    max(x1, x2) * scale_x,
                    max(y1, y2) * scale_y,
                )
                for x1, y1, x2, y2 in found
            ]
    return []


def find_boxes(text: str) -> list[tuple[float, float, float, float]]:
    """The boxes of a text exactly as written, corners not put in order; 0…1000 is assumed."""
    if "(" not in text and "bbox_2d" not in text:
        return []
    for name in ("qwen2", "box", "json", "plain"):
        found = PATTERNS[name].findall(text)
        if found:
            return [(float(a), float(b), float(c), float(d)) for a, b, c, d in found]
    return []


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
    if left == right:
        left, right = (left, right + 1) if right < 1000 else (left - 1, right)
    if top == bottom:
        top, bottom = (top, bottom + 1) if bottom < 1000 else (top - 1, bottom)
    return left, top, right, bottom


def _plain(corners: Sequence[float]) -> str:
    return "(" + ", ".join(f"{c:g}" for c in corners) + ")"


def strip_boxes(text: str) -> str:
    """The text without boxes and box markup, spaces tidied: what a text encoder should judge."""
    for name in ("qwen2", "box", "json", "plain"):
        text = PATTERNS[name].sub("", text)
    text = _MARKUP.sub("", text)
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
