"""Records about one image: boxes from masks, descriptions from measured facts."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from clinkd.data.boxes import Box, format_boxes
from sample import wording
from sample.slices import Mask, Slice

PER_IMAGE = {"VG": 3, "ROC": 2, "RC": 2}  # at most so many records of a task an image
LEAST_SIDE = 30  # of a box, in thousandths of the image


def box_of(mask: Mask) -> Box:
    """The mask's bounding box, 0…1000 relative to the image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return (
        round(1000 * int(columns[0]) / width),
        round(1000 * int(rows[0]) / height),
        round(1000 * (int(columns[-1]) + 1) / width),
        round(1000 * (int(rows[-1]) + 1) / height),
    )


def records(item: Slice) -> Iterator[dict[str, Any]]:
    """All records of an image, as JSON objects."""
    boxes = {name: box_of(mask) for name, mask in item.masks.items()}
    boxes = {
        name: box
        for name, box in boxes.items()
        if box[2] - box[0] >= LEAST_SIDE and box[3] - box[1] >= LEAST_SIDE
    }
    names = sorted(boxes, key=lambda name: _hash(f"{item.key} {name}"))
    spread = [names[k:] + names[:k] for k in (0, 1, 2)]  # the tasks ask for different structures
    for name in spread[0][: PER_IMAGE["VG"]]:
        yield _grounding(item, name, [boxes[name]])
    pair = _pair(boxes)
    if pair is not None and _hash(item.key) % 3 == 0:
        yield _pair_grounding(item, pair, boxes)
    for name in spread[1][: PER_IMAGE["ROC"]]:
        yield _row(item, "ROC", name, [boxes[name]], wording.ROC_QUESTIONS, name.capitalize() + ".")
    for name in spread[2][: PER_IMAGE["RC"]]:
        answer = describe(item, name, boxes)
        yield _row(item, "RC", name, [boxes[name]], wording.RC_QUESTIONS, answer)
    yield from _whole_image(item)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _grounding(item: Slice, name: str, boxes: list[Box]) -> dict[str, Any]:
    key = f"{item.key} {name}"
    answer = wording.choose(wording.VG_ANSWERS, "a" + key).format(
        name=name, boxes=format_boxes(boxes)
    )
    return _row(item, "VG", name, boxes, wording.VG_QUESTIONS, answer)


def _pair(boxes: dict[str, Box]) -> str | None:
    """A structure that is seen on both sides."""
    both = [n[5:] for n in sorted(boxes) if n.startswith("left ") and f"right {n[5:]}" in boxes]
    return both[0] if both else None


def plural(name: str) -> str:
    """lung → lungs, gluteus maximus → gluteus maximus muscles."""
    irregular = {
        "gluteus maximus": "gluteus maximus muscles",
        "gluteus medius": "gluteus medius muscles",
        "caudate nucleus": "caudate nuclei",
        "cingulate cortex": "cingulate cortices",
        "hippocampus": "hippocampi",
        "thalamus": "thalami",
    }
    return irregular.get(name, f"{name}s")


def _pair_grounding(item: Slice, stem: str, boxes: dict[str, Box]) -> dict[str, Any]:
    name = plural(stem)
    both = [boxes[f"right {stem}"], boxes[f"left {stem}"]]  # from left to right in the image
    key = f"{item.key} {name}"
    answer = wording.choose(wording.VG_PAIR_ANSWERS, "a" + key).format(
        name=name, boxes=format_boxes(both)
    )
    return _row(item, "VG", name, both, wording.VG_PAIR_QUESTIONS, answer)


def _row(
    item: Slice,
    task: str,
    name: str,
    boxes: list[Box],
    questions: tuple[str, ...],
    answer: str,
) -> dict[str, Any]:
    key = f"{item.key}_{task.lower()}_{name.replace(' ', '-')}"
    question = wording.choose(questions, "q" + key).format(name=name, boxes=format_boxes(boxes))
    height, width = item.pixels.shape[:2]
    row: dict[str, Any] = {
        "id": key,
        "image": f"images/{item.key}.png",
        "modality": item.modality,
        "task": task,
        "group": item.group,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
        "boxes": [list(box) for box in boxes],
        "size": [width, height],
        "structure": name,
        "source": item.source,
        "volume": item.volume,
    }
    if item.slice_mm is not None:
        row["slice_mm"] = round(item.slice_mm, 3)
    return row | item.facts


def describe(item: Slice, name: str, boxes: dict[str, Box]) -> str:
    """One or two sentences of measured facts about a structure."""
    mask = item.masks[name]
    near = _neighbours(item.masks, name)
    facts = {
        "name": name,
        "size": size_word(float(mask.mean())),
        "place": place_word(boxes[name]),
        "tone": tone_word(item.pixels, mask),
        "near": f", next to the {wording.join(near)}" if near else "",
    }
    return wording.choose(wording.RC_ANSWERS, f"d{item.key} {name}").format(**facts)


def size_word(share: float) -> str:
    """By the share of the image that the mask covers."""
    return "small" if share < 0.01 else "medium-sized" if share < 0.04 else "large"


def place_word(box: Box) -> str:
    """Which ninth of the image the box's centre lies in."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    column = "left" if x < 400 else "right" if x > 600 else ""
    row = "upper" if y < 400 else "lower" if y > 600 else ""
    if not row and not column:
        return "centre"
    return f"{row} {column} part".strip().replace("  ", " ") if row else f"{column} part"


def tone_word(pixels: np.ndarray, mask: Mask) -> str:
    """Mean grey value inside against that of a ring of four pixels around."""
    grey = pixels.mean(axis=2) if pixels.ndim == 3 else pixels.astype(np.float64)
    ring = grow(mask, 4) & ~mask
    if not ring.any():
        return "about as bright as"
    difference = float(grey[mask].mean() - grey[ring].mean())
    if abs(difference) < 8:
        return "about as bright as"
    return "brighter than" if difference > 0 else "darker than"


def grow(mask: Mask, pixels: int) -> Mask:
    """The mask, larger by so many pixels in every direction."""
    out = mask.copy()
    for _ in range(pixels):
        padded = np.pad(out, 1)
        out = (
            padded[1:-1, 1:-1]
            | padded[:-2, 1:-1]
            | padded[2:, 1:-1]
            | padded[1:-1, :-2]
            | padded[1:-1, 2:]
        )
    return out


def _neighbours(masks: dict[str, Mask], name: str) -> list[str]:
    """At most two structures that touch the grown mask most."""
    if item_is_derived(name):
        return []
    ring = grow(masks[name], 4)
    touching = {other: int((ring & mask).sum()) for other, mask in masks.items() if other != name}
    best = sorted((n for n in touching if touching[n] >= 10), key=lambda n: (-touching[n], n))
    return best[:2]


def item_is_derived(name: str) -> bool:
    """Names such as "largest nucleus" can mean one and the same object twice."""
    return name.endswith("nucleus") and not name.endswith("caudate nucleus")


def _whole_image(item: Slice) -> Iterator[dict[str, Any]]:
    plane = f"{item.what['plane']} " if item.what["plane"] else ""
    modality, region = item.what["modality"], item.what["region"]
    if not region.startswith(("the ", "a ", "cell", "stained")):
        region = f"the {region}"
    shown = sorted(item.masks, key=lambda n: (-int(item.masks[n].sum()), n))[:4]
    shown = [name for name in shown if not item_is_derived(name)]
    words = {
        "modality": modality,
        "plane": plane,
        "region": region,
        "seen": f" It shows the {wording.join(shown)}." if shown else "",
    }
    key = f"m{item.key}"
    answer = wording.choose(wording.MIA_ANSWERS, key).format(
        **words, article=wording.article(plane + modality)
    )
    yield _row(item, "MIA", "description", [], wording.MIA_QUESTIONS, answer)
    if _hash(key) % 3 == 0:
        answer = wording.choose(wording.MODALITY_ANSWERS, key).format(
            **words, article=wording.article(modality)
        )
        yield _row(item, "MIA", "modality", [], wording.MODALITY_QUESTIONS, answer)
