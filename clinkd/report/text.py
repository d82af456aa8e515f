"""Answers as people read them: boxes become short labels, changed words are marked."""

import difflib
import re

from clinkd.data.boxes import stated_boxes

_MARKS = re.compile(r"<\|(?:object_ref|box|quad)_(?:start|end)\|>|</?(?:ref|box|quad)>")
Piece = tuple[str, str]  # kind, text
MOST_CHARACTERS = 1600  # of a text on the page: no answer is longer that was not let run on
MOST_IN_LABEL = 80  # of a name: an id, a modality


def cut(text: str, most: int) -> tuple[str, str]:
    """The beginning of a text, and how much is left out in words; "" where nothing is."""
    left_out = len(text) - most
    if left_out <= 0:
        return text, ""
    return text[:most], f" … {left_out:,} more characters".replace(",", " ")


def label(value: object, default: str = "") -> str:
    """A short name as it is, a long one cut; `default` for none."""
    text, more = cut(str(value or default), MOST_IN_LABEL)
    return f"{text}…" if more else text


def pieces(text: str, most: int = MOST_CHARACTERS) -> list[Piece]:
    """Cut the first `most` characters into ("text", …) and ("box", "x1, y1 – x2, y2") pieces."""
    text, more = cut(text, most)
    out = _pieces(text)
    if more:
        out.append(("text", more))
    return out


def _pieces(text: str) -> list[Piece]:
    out: list[Piece] = []
    at = 0
    for box in stated_boxes(text):
        _add(out, text[at : box.start])
        left, top, right, bottom = box.ordered
        out.append(("box", f"{left:g}, {top:g} – {right:g}, {bottom:g}"))
        at = box.end
    _add(out, text[at:])
    return out


def _add(out: list[Piece], text: str) -> None:
    text = _MARKS.sub("", text)
    if text.strip():
        out.append(("text", text))


def changes(before: str, after: str) -> list[Piece]:
    """The words of `after`, each ("same" | "new", …), with ("old", …) where words went.

    Only the beginning of long texts is compared, whose time would grow with the square.
    """
    (before, _), (after, more) = cut(before, MOST_CHARACTERS), cut(after, MOST_CHARACTERS)
    old, new = _words(before), _words(after)
    out: list[Piece] = []
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            out.append(("same", " ".join(new[j1:j2])))
            continue
        if i2 > i1:
            out.append(("old", " ".join(old[i1:i2])))
        if j2 > j1:
            out.append(("new", " ".join(new[j1:j2])))
    if more:
        out.append(("same", more.strip()))
    return out


def _words(text: str) -> list[str]:
    """Words, a box counting as one."""
    out: list[str] = []
    for kind, piece in _pieces(text):
        out += [f"[{piece}]"] if kind == "box" else piece.split()
    return out
