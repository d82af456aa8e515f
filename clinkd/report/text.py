"""Answers as people read them: boxes become short labels, changed words are marked."""

import difflib
import re

from clinkd.data.boxes import parse_boxes

_BOX = re.compile(
    r"<\|box_start\|>.*?<\|box_end\|>|<box>.*?</box>|\{[^{}]*\"bbox_2d\"[^{}]*\}", re.DOTALL
)
_MARKS = re.compile(r"<\|(?:object_ref|box|quad)_(?:start|end)\|>|</?(?:ref|box|quad)>")
Piece = tuple[str, str]  # kind, text


def pieces(text: str) -> list[Piece]:
    """Cut a text into ("text", …) and ("box", "x1, y1 – x2, y2") pieces."""
    out: list[Piece] = []
    at = 0
    for match in _BOX.finditer(text):
        boxes = parse_boxes(match.group())
        if boxes:
            _add(out, text[at : match.start()])
            x1, y1, x2, y2 = boxes[0]
            out.append(("box", f"{x1:g}, {y1:g} – {x2:g}, {y2:g}"))
            at = match.end()
    _add(out, text[at:])
    return out


def _add(out: list[Piece], text: str) -> None:
    text = _MARKS.sub("", text)
    if text.strip():
        out.append(("text", text))


def changes(before: str, after: str) -> list[Piece]:
    """The words of `after`, each ("same" | "new", …), with ("old", …) where words went."""
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
    return out


def _words(text: str) -> list[str]:
    """Words, a box counting as one."""
    out: list[str] = []
    for kind, piece in pieces(text):
        out += [f"[{piece}]"] if kind == "box" else piece.split()
    return out
