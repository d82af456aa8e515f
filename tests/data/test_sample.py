"""The shipped sample set is sound, its splits lie apart, left and right are where they belong."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clinkd.data.boxes import parse_boxes
from clinkd.data.images import load_image
from clinkd.data.records import TASKS, read_records

FOLDER = Path(__file__).parent.parent.parent / "clinkd" / "data" / "sample"
ROOT = FOLDER.parent.parent.parent
GAP_MM = 15.0
MOST_ALIKE = 0.97  # correlation; neighbouring frames of one film have over 0.99


@pytest.fixture(scope="module")
def splits():
    return {name: read_records(FOLDER / f"{name}.jsonl") for name in ("train", "test")}


@pytest.fixture(scope="module")
def everything(splits):
    return splits["train"] + splits["test"]


def test_size_and_variety(splits, everything):
    assert 1500 <= len(everything) <= 3000
    assert len({r.id for r in everything}) == len(everything)
    assert len({r.images[0] for r in everything}) >= 300
    assert len({r.modality for r in everything}) >= 6
    for records in splits.values():
        assert {r.task for r in records} == set(TASKS)
        assert {"ct", "mr", "ultrasound", "microscopy", "x", "fundus"} <= {
            r.modality for r in records
        }
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 12e6


def test_ids_carry_the_modality(everything):
    assert all(r.id.startswith(f"{r.modality}_") for r in everything)


def test_several_wordings(everything):
    names = sorted({r.extra["structure"] for r in everything}, key=len, reverse=True)
    for task in TASKS:
        forms = set()
        for record in (r for r in everything if r.task == task):
            text = re.sub(r"<\|box_start\|>.*?<\|box_end\|>", "B", record.question)
            for name in names:
                text = text.replace(name, "X")
            forms.add(text)
        assert len(forms) >= 6


def test_images_decode_and_have_the_size_that_is_written(everything):
    for name, size in {(r.images[0], r.size) for r in everything}:
        image = load_image(FOLDER, name)
        assert image.size == size
        assert max(size) == 240


def test_boxes_in_the_text_are_the_boxes(everything):
    for record in everything:
        holder = record.answer if record.task == "VG" else record.question
        assert [tuple(map(int, box)) for box in parse_boxes(holder)] == list(record.boxes)
        assert bool(record.boxes) == (record.task != "MIA")


def test_splits_lie_apart(splits):
    assert not {r.group for r in splits["train"]} & {r.group for r in splits["test"]}
    places = defaultdict(lambda: {"train": set(), "test": set()})
    for split, records in splits.items():
        for record in records:
            where = record.extra.get("slice_mm", record.extra.get("left"))
            places[record.extra["volume"]][split].add(None if where is None else float(where))
    shared = {v: p for v, p in places.items() if p["train"] and p["test"]}
    assert {"ct_totalseg", "mr_brainatlas"} <= set(shared)
    for volume, place in shared.items():
        gap = min(abs(a - b) for a in place["train"] for b in place["test"])
        least = 128 + 64 if volume == "microscopy_nuclei" else GAP_MM  # a tile is 128 pixels wide
        assert gap >= least, volume


def fingerprint(name):
    """Zero-mean, unit-length thumbnail: the product of two is their correlation."""
    small = load_image(FOLDER, name).convert("L").resize((32, 32), Image.Resampling.BOX)
    values = np.asarray(small, dtype=float).ravel()
    values -= values.mean()
    return values / np.linalg.norm(values)


def test_no_test_image_is_nearly_a_training_image(splits):
    """Catches one film or slice under two names, which metadata cannot show."""
    names = {split: sorted({r.images[0] for r in records}) for split, records in splits.items()}
    train, test = (np.stack([fingerprint(n) for n in names[s]]) for s in ("train", "test"))
    alike = test @ train.T
    i, j = np.unravel_index(alike.argmax(), alike.shape)
    assert alike[i, j] < MOST_ALIKE, (names["test"][i], names["train"][j])


def test_one_box_has_one_name(everything):
    answers = defaultdict(set)
    for record in (r for r in everything if r.task == "ROC"):
        answers[record.images[0], record.boxes].add(record.answer)
    assert [key for key, found in answers.items() if len(found) > 1] == []


def test_tasks_are_balanced(splits):
    for records in splits.values():
        share = {task: sum(r.task == task for r in records) / len(records) for task in TASKS}
        assert all(0.15 <= s <= 0.40 for s in share.values()), share


def test_left_and_right(everything):
    """Patient's right is on the image's left: liver there, paired structures on their sides."""
    centres = defaultdict(list)
    for record in everything:
        if record.task == "VG" and len(record.boxes) == 1 and record.modality in ("ct", "mr"):
            centres[record.extra["structure"]].append((record.boxes[0][0] + record.boxes[0][2]) / 2)
    assert sum(x < 500 for x in centres["liver"]) / len(centres["liver"]) > 0.9
    assert sum(x > 500 for x in centres["spleen"]) / len(centres["spleen"]) > 0.9
    for name, found in centres.items():
        for side, sign in (("left", 1), ("right", -1)):
            if name.startswith(f"{side} "):
                wrong = [
                    x for x in found if sign * (x - 500) < -60
                ]  # the body is not quite centred
                assert len(wrong) <= 0.05 * len(found), (name, found)


def test_pairs_are_named_from_left_to_right_in_the_image(everything):
    pairs = [r for r in everything if r.task == "VG" and len(r.boxes) == 2]
    assert len(pairs) >= 20
    assert all(r.boxes[0][0] < r.boxes[1][0] for r in pairs)


def test_structures_of_the_test_split_were_seen_in_training(splits):
    seen = {r.extra["structure"] for r in splits["train"]}
    assert {r.extra["structure"] for r in splits["test"]} <= seen


def test_every_source_is_attributed(everything):
    text = (ROOT / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for source in {r.extra["source"] for r in everything}:
        assert f"| `{source}` |" in text


def test_no_names_of_people(everything):
    for line in (FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines():
        assert "CompressedSamples" not in json.loads(line)["conversations"][1]["value"]


def test_contact_sheet_is_there():
    with Image.open(ROOT / "docs" / "sample.png") as sheet:
        assert sheet.width >= 1200
