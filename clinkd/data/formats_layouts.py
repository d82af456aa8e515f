"""How each project lays out a row: readers make our JSON objects of them, writers the opposite.

Readers leave texts alone but for image placeholders; boxes in texts are `clinkd.data.formats`'
matter, except for ms-swift, which keeps them outside the text.
"""

import re
from collections.abc import Callable
from typing import Any

from clinkd.data.boxes import PATTERNS, format_boxes, to_box
from clinkd.data.prompt import IMAGE_PLACEHOLDER
from clinkd.data.records import Record
from clinkd.errors import DataError

Row = dict[str, Any]
SizeOf = Callable[[str], tuple[int, int]]  # pixels of an image, by its name

_PICTURE = re.compile(r"(?:Picture [0-9]{1,3}:\s?)?<img>[^<]*</img>\n?")
_HUMAN = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_DOMAINS = {"chest_xray": "x", "mri": "mr", "ct_scan": "ct", "histology": "histology"}
_QWEN2_NAME = re.compile(r"<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>")
_META = ("modality", "task", "group", "boxes", "size")
OWN_ID = "clinkd_id"  # of a BiRD row that was one record of ours; its own id is the image's name


def _turns(row: Row, turns: Any, role_key: str, text_key: str) -> tuple[list[Row], str | None]:
    """Turns with our roles, and the text of a leading system turn."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("the conversation must be a list of objects with a role and a text")
    system = None
    if turns and turns[0].get(role_key) == "system":
        system, turns = turns[0].get(text_key), turns[1:]
    out = []
    for index, turn in enumerate(turns):
        role = _HUMAN.get(turn.get(role_key))
        if role is None:
            raise DataError(
                f"turn {index + 1} has the role {turn.get(role_key)!r}; expected one of "
                + ", ".join(_HUMAN)
            )
        out.append({"from": role, "value": turn.get(text_key)})
    return out, system


def _meta(record: Record) -> Row:
    """What other projects have no key for; they ignore it, and we find it again."""
    row = record.to_json()
    return {key: row[key] for key in _META if key in row} | record.extra


# BiRD and Med-GRIT ------------------------------------------------------------------------


def read_bird(row: Row, size_of: SizeOf) -> Row:
    """`{"id": image stem, "conversations": [[question, answer], ...]}`, image = id + ".png".

    A row that we wrote has our id beside it, see `OWN_ID`.
    """
    stem, pairs = row.get("id"), row.get("conversations")
    if not isinstance(stem, str) or not stem:
        raise DataError(f"'id' must be the image's name without '.png', got {stem!r}")
    if not isinstance(pairs, list) or not pairs:
        raise DataError(f"{stem}: 'conversations' must be a list of [question, answer] pairs")
    turns = []
    for index, pair in enumerate(pairs):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise DataError(f"{stem}: pair {index + 1} of 'conversations' is no [question, answer]")
        question = _PICTURE.sub("", pair[0]).strip()
        question = f"{IMAGE_PLACEHOLDER}\n{question}" if index == 0 else question
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": pair[1]}]
    # SA-Med2D: <modality>_<sub>--<data set>--<volume>--<axis>_<slice>
    group = stem.rsplit("--", 1)[0]
    meta = {"modality": stem.split("_", 1)[0], "group": group}
    own = {key: value for key, value in row.items() if key != OWN_ID}
    own["id"] = row.get(OWN_ID, stem)
    return meta | own | {"image": f"{stem}.png", "conversations": turns}


def write_bird(record: Record) -> Row:
    if len(record.images) != 1 or not record.images[0].endswith(".png"):
        raise DataError(f"{record.id}: BiRD rows have one image each, named id + '.png'")
    stem = record.images[0].removesuffix(".png")
    texts = [turn.value.replace(IMAGE_PLACEHOLDER, "").strip() for turn in record.conversations]
    texts[0] = f"Picture 1: <img>{record.images[0]}</img>\n{texts[0]}"
    pairs = [texts[i : i + 2] for i in range(0, len(texts), 2)]
    return {"id": stem, OWN_ID: record.id, "conversations": pairs} | _meta(record)


# LLaVA and LLaVA-Med -----------------------------------------------------------------------


def read_llava(row: Row, size_of: SizeOf) -> Row:
    """`{"id", "image", "conversations": [{"from", "value"}]}`; LLaVA-Med adds `domain`.

    LLaVA-Med's evaluation rows, `{"question_id", "image", "text", "gpt4_answer", "domain"}`, too.
    """
    row = dict(row)
    domain = row.pop("domain", None)
    if isinstance(domain, dict) and "modality" not in row:
        names = [name for name, true in domain.items() if true]
        row["modality"] = _DOMAINS.get(names[0], names[0]) if names else "unknown"
    elif domain is not None:
        row["domain"] = domain
    if "text" in row and "conversations" not in row:
        identity = row.pop("question_id", row.get("id"))
        turns = [("human", row.pop("text")), ("gpt", row.pop("gpt4_answer", None))]
        row["conversations"] = [{"from": r, "value": v} for r, v in turns]
        if identity is not None:
            row["id"] = str(identity)
    elif "conversatons" in row and "conversations" not in row:  # spelt so in LLaVA-Med's own files
        row["conversations"] = row.pop("conversatons")
    if isinstance(row.get("image"), list):
        row["images"] = row.pop("image")
    row["conversations"], system = _turns(row, row.get("conversations"), "from", "value")
    return row | ({"system": system} if system is not None else {})


def write_llava(record: Record) -> Row:
    row: Row = {"id": record.id}
    if record.images:
        row["image"] = record.images[0] if len(record.images) == 1 else list(record.images)
    return row | {"conversations": _marked(record, "from", "value", {})} | _meta(record)


# ShareGPT as LLaMA-Factory reads it ---------------------------------------------------------


def read_sharegpt(row: Row, size_of: SizeOf) -> Row:
    """`{"conversations" | "messages", "images": [...]}`; `from`/`value` or `role`/`content`."""
    row = dict(row)
    turns = row.pop("messages", None)
    turns = row.pop("conversations", turns) if turns is None else turns
    openai = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]
    keys = ("role", "content") if openai else ("from", "value")
    row["conversations"], system = _turns(row, turns, *keys)
    images = row.pop("images", [])
    if isinstance(images, str):
        images = [images]
    if isinstance(images, list):
        images = [i["path"] if isinstance(i, dict) and i.get("path") else i for i in images]
    if any(isinstance(i, dict) for i in images or []):
        raise DataError("an image is given as bytes; save it as a file and name its path")
    row["images"] = [row.pop("image")] if not images and "image" in row else images
    return row | ({"system": system} if system is not None else {})


def write_sharegpt(record: Record) -> Row:
    roles = {"human": "user", "gpt": "assistant"}
    messages = _marked(record, "role", "content", roles)
    return {"id": record.id, "messages": messages, "images": list(record.images)} | _meta(record)


def _marked(record: Record, role: str, text: str, roles: dict[str, str]) -> list[Row]:
    """Turns with one `<image>` for each image, as LLaVA and LLaMA-Factory demand."""
    marks = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in record.conversations)
    missing = f"{IMAGE_PLACEHOLDER}\n" * len(record.images) if marks == 0 else ""
    out = []
    for index, turn in enumerate(record.conversations):
        value = (missing if index == 0 else "") + turn.value
        out.append({role: roles.get(turn.role, turn.role), text: value})
    system = record.extra.get("system")
    if isinstance(system, str):
        out.insert(0, {role: "system", text: system})
    return out


# ms-swift ------------------------------------------------------------------------------------


def read_swift(row: Row, size_of: SizeOf) -> Row:
    """ShareGPT whose texts hold `<ref-object>` and `<bbox>`, filled in turn from `objects`."""
    objects = row.get("objects") or {}
    if not isinstance(objects, dict):
        raise DataError("'objects' must be an object with 'ref' and 'bbox'")
    row = read_sharegpt({key: value for key, value in row.items() if key != "objects"}, size_of)
    names, corners = objects.get("ref") or [], objects.get("bbox") or []
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise DataError(f"'bbox_type' must be 'real' or 'norm1', got {kind!r}")
    which = objects.get("image_id") or [0] * len(corners)
    if len(which) != len(corners):
        raise DataError(f"'image_id' has {len(which)} entries for {len(corners)} boxes")
    boxes = []
    for box, image in zip(corners, which, strict=True):
        scale = (1000.0, 1000.0)
        if kind == "real":
            if not isinstance(image, int) or not 0 <= image < len(row["images"]):
                raise DataError(f"'image_id' {image!r} names none of {len(row['images'])} images")
            width, height = size_of(row["images"][image])
            scale = (1000 / width, 1000 / height)
        boxes.append(_swift_box(box, scale))
    fill = {"<ref-object>": iter(names), "<bbox>": iter(boxes)}

    def value(match: re.Match[str]) -> str:
        found = next(fill[match.group()], None)
        if found is None:
            raise DataError(f"the text has more {match.group()} marks than 'objects' has entries")
        if match.group() == "<bbox>":
            return format_boxes([found])
        return f"<|object_ref_start|>{found}<|object_ref_end|>"

    for turn in row["conversations"]:
        if isinstance(turn["value"], str):
            turn["value"] = re.sub(r"<ref-object>|<bbox>", value, turn["value"])
    for mark, rest in fill.items():
        if next(rest, None) is not None:
            raise DataError(f"'objects' has more entries than the text has {mark} marks")
    if boxes:
        row["boxes"] = [list(box) for box in dict.fromkeys(boxes)]
    if any(which):
        row["image_id"] = which
    return row


def _swift_box(corners: Any, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    numbers = isinstance(corners, list) and all(type(c) in (int, float) for c in corners)
    if not numbers or len(corners) != 4:
        raise DataError(f"'bbox' must hold [x1, y1, x2, y2], got {corners!r:.80} (no points)")
    try:
        return to_box([c * s for c, s in zip(corners, scale * 2, strict=True)])
    except ValueError as error:
        raise DataError(f"'objects' holds {error}") from None


def write_swift(record: Record) -> Row:
    """Boxes as `norm1`, fractions of the image, which loses nothing; the marks in the texts."""
    row = write_sharegpt(record)
    names: list[str] = []
    boxes: list[list[float]] = []

    def name(match: re.Match[str]) -> str:
        names.append(match.group(1))
        return "<ref-object>"

    def box(match: re.Match[str]) -> str:
        boxes.append([float(corner) / 1000 for corner in match.groups()])
        return "<bbox>"

    for message in row["messages"]:
        message["content"] = _QWEN2_NAME.sub(name, PATTERNS["qwen2"].sub(box, message["content"]))
    if names or boxes:
        row["objects"] = {"ref": names, "bbox": boxes, "bbox_type": "norm1"}
        if "image_id" in row:
            row["objects"]["image_id"] = row.pop("image_id")
    return row
