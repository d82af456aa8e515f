"""Rewriting the boxes inside a text from one model's convention to another's."""

import json
import re
from collections.abc import Sequence
from typing import Any

from clinkd.data.boxes import CONVENTIONS, PATTERNS, Convention, format_boxes, stated_boxes, to_box

Size = tuple[int, int]  # width, height in pixels

_JSON_LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\]|\\.){0,400}")')
_LARGEST = 1e9  # of a coordinate, as `PATTERNS` takes it; NaN is not below
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_OPEN = {"qwen2": ("<|object_ref_start|>", "<|object_ref_end|>"), "box": ("<ref>", "</ref>")}
_NAME = re.compile(
    r"<ref>([^<]{0,400})</ref>|<\|object_ref_start\|>([^<]{0,400})<\|object_ref_end\|>"
)


def convert_boxes(
    text: str,
    source: Convention,
    target: Convention,
    size: Size | None = None,
    *,
    strict: bool = True,
) -> str:
    """Rewrite every marked box and object name of a text; the rest stays as it is.

    A name that stands before its box (`<ref>liver</ref><box>…</box>`) becomes the `label` of JSON
    conventions and the other way round; a JSON list of boxes becomes boxes one after another.

    Args:
        text: a question or an answer.
        source, target: see `clinkd.data.boxes`.
        size: pixels of the image as the model sees it; needed where one side is `qwen2.5`.
        strict: whether a box outside the image, or reversed, is an error; else it stays one.

    Raises:
        ValueError: an unknown convention, no size, and what `strict` says.
    """
    for convention in (source, target):
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown box convention {convention!r}: one of {CONVENTIONS}")
    if "qwen2.5" in (source, target) and size is None:
        raise ValueError("convention 'qwen2.5' counts pixels: the size of the image is needed")
    if source in _OPEN:
        pattern = re.compile(rf"(?:(?:{_NAME.pattern})\s*)?(?:{PATTERNS[source].pattern})")
        text = pattern.sub(
            lambda m: _write(_label(m), m.groups()[2:], target, None, size, strict), text
        )
    else:
        text = _from_json(text, source, target, size, strict)
    return _NAME.sub(lambda m: _name(_label(m) or "", target), text)


def _label(match: re.Match[str]) -> str | None:
    """The object's name of a match that begins with `_NAME`, if there is one."""
    return match.group(2) if match.group(1) is None else match.group(1)


def _from_json(
    text: str, source: Convention, target: Convention, size: Size | None, strict: bool
) -> str:
    scale = size if source == "qwen2.5" else None
    whole = _listed(text)
    if whole is not None:
        return "".join(
            _write(label, corners, target, scale, size, strict) for label, corners in whole
        )

    def rewrite(match: re.Match[str]) -> str:
        found = _JSON_LABEL.search(match.group())
        try:
            label = json.loads(found.group(1)) if found else None
        except ValueError:
            if strict:
                raise
            label = None
        return _write(_writable(label), match.groups(), target, scale, size, strict)

    return PATTERNS["json"].sub(rewrite, text)


def _writable(label: Any) -> str | None:
    """A label that can be written as UTF-8, which half of a surrogate pair cannot."""
    if not isinstance(label, str):
        return None
    try:
        label.encode()
    except UnicodeEncodeError:
        return None
    return label


def _listed(text: str) -> list[tuple[str | None, list[float]]] | None:
    """Labels and corners, if the whole text is one JSON list of boxes, fenced or not."""
    fenced = _FENCE.fullmatch(text.strip())
    try:
        rows = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows:
        return None
    out: list[tuple[str | None, list[float]]] = []
    for row in rows:
        corners = row.get("bbox_2d") if isinstance(row, dict) else None
        numbers = isinstance(corners, list) and all(
            type(c) in (int, float) and abs(c) < _LARGEST for c in corners
        )
        if not isinstance(corners, list) or not numbers or len(corners) != 4:
            return None
        label = row.get("label")
        out.append((_writable(label), [float(c) for c in corners]))
    return out


def _write(
    label: str | None,
    corners: Sequence[str | float],
    target: Convention,
    pixels: Size | None,
    size: Size | None,
    strict: bool,
) -> str:
    """One box in the target's convention; `pixels` scales corners that are not in 0…1000."""
    width, height = pixels or (1000, 1000)
    scale = (1000 / width, 1000 / height) * 2
    box: Sequence[float] = [float(c) * s for c, s in zip(corners, scale, strict=True)]
    try:
        box = to_box(box)
    except ValueError:
        if strict:
            raise
    text = format_boxes([box], target, size)
    if label is None:
        return text
    if target in _OPEN:
        return _name(label, target) + text
    return f'{text[:-1]}, "label": {json.dumps(label, ensure_ascii=False)}}}'


def _name(label: str, target: Convention) -> str:
    """An object's name as the target marks it; JSON conventions have no mark inside a sentence."""
    before, after = _OPEN.get(target, ("", ""))
    return f"{before}{label}{after}"


def with_own_boxes(text: str, boxes: Sequence[Any], size: Size) -> str:
    """A text of ours whose boxes were pixels, with the exact ones where they are known.

    Args:
        boxes: those of the row, unchecked: what is no box matches none.
        size: pixels in which the text's were rounded.
    """
    pixel = (1000 / size[0], 1000 / size[1]) * 2

    def is_of(own: Any, corners: Sequence[float]) -> bool:
        whole = isinstance(own, list) and len(own) == 4 and all(type(c) is int for c in own)
        return whole and all(
            abs(a - b) <= side for a, b, side in zip(own, corners, pixel, strict=True)
        )

    out, end = [], 0
    for box in stated_boxes(text, ("qwen2",)):
        exact = next((own for own in boxes if is_of(own, box.corners)), box.corners)
        out += [text[end : box.start], format_boxes([exact])]
        end = box.end
    return "".join(out) + text[end:]


def resized_size(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The size that Qwen-VL image processors resize an image to.

    Both sides become multiples of `factor` (patch times merge: 28 for Qwen2-VL and Qwen2.5-VL, 32
    for Qwen3-VL), with between `min_pixels` and `max_pixels` pixels, the aspect nearly kept.
    """
    width, height = size
    new_w, new_h = (round(side / factor) * factor for side in size)
    if new_w * new_h > max_pixels:
        shrink = (width * height / max_pixels) ** 0.5
        new_w, new_h = (max(factor, int(side / shrink / factor) * factor) for side in size)
    elif new_w * new_h < min_pixels:
        grow = (min_pixels / (width * height)) ** 0.5
        new_w, new_h = (-int(-side * grow // factor) * factor for side in size)
    return new_w, new_h
