"""The builder's measurements, on masks whose facts are known."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))

from pydicom import Dataset
from sample.names import brain_region, organ
from sample.pictures import upright
from sample.questions import box_of, describe, grow, place_word, records, tone_word
from sample.slices import Slice, axial, resize, resize_mask, slabs, window


def make_slice():
    pixels = np.full((100, 200), 50, np.uint8)
    liver, kidney = np.zeros((2, 100, 200), bool)
    liver[20:60, 10:80] = True
    kidney[60:80, 20:50] = True
    pixels[liver] = 150
    return Slice(
        "ct_x_ax_001", pixels, {"liver": liver, "right kidney": kidney}, "ct_x", "ct_x", "train",
        {"modality": "CT", "plane": "axial", "region": "abdomen"}, "test", 3.0,
    )  # fmt: skip


def test_box_of_is_the_masks_border_in_thousandths():
    assert box_of(make_slice().masks["liver"]) == (50, 200, 400, 600)


def test_description_states_what_was_measured():
    item = make_slice()
    boxes = {name: box_of(mask) for name, mask in item.masks.items()}
    text = describe(item, "liver", boxes)
    assert "liver" in text
    assert "large" in text
    assert "brighter than" in text
    assert "next to the right kidney" in text
    assert "left part" in text


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0, 0, 200, 200), "upper left part"),
        ((450, 450, 550, 550), "centre"),
        ((450, 700, 550, 900), "lower part"),
        ((700, 450, 900, 550), "right part"),
    ],
)
def test_place(box, place):
    assert place_word(box) == place


def test_tone_and_growth():
    mask = np.zeros((20, 20), bool)
    mask[8:12, 8:12] = True
    dark = np.where(mask, 10, 200).astype(np.uint8)
    assert tone_word(dark, mask) == "darker than"
    assert tone_word(np.full((20, 20), 7, np.uint8), mask) == "about as bright as"
    assert grow(mask, 1).sum() == 16 + 4 * 4


def test_the_same_slice_gives_the_same_records():
    assert list(records(make_slice())) == list(records(make_slice()))
    tasks = [row["task"] for row in records(make_slice())]
    assert {"VG", "ROC", "RC", "MIA"} == set(tasks)


def test_slabs_leave_a_gap():
    dealt = list(slabs(100, 3.0, 36.0, 12.0, 12.0))
    places = {s: [i * 3.0 for i, split, _ in dealt if split == s] for s in ("train", "test")}
    assert min(abs(a - b) for a in places["train"] for b in places["test"]) >= 12.0


def test_slabs_start_inside_the_first_train_slab():
    dealt = list(slabs(12, 1.0, 4.0, 2.0, 3.0, 3.0))  # train 1, gap 2, test 3, gap 2, train 4
    assert [i for i, split, _ in dealt if split == "test"] == [3, 4, 5]
    assert [i for i, split, _ in dealt if split == "train"] == [0, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("attribute", "value", "corner"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 1, 0], (0, 0)),
        ("ImageOrientationPatient", [1, 0, 0, 0, -1, 0], (1, 0)),  # front is at the bottom
        ("ImageOrientationPatient", [-1, 0, 0, 0, 1, 0], (0, 2)),  # patient's left is at the left
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1], (0, 0)),
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, 1], (1, 0)),  # the head is at the bottom
        ("PatientOrientation", ["L", "F"], (0, 0)),
        ("PatientOrientation", ["R", "F"], (0, 2)),
        ("PatientOrientation", None, (0, 0)),
    ],
)
def test_upright_turns_pictures_as_their_files_say(attribute, value, corner):
    dataset = Dataset()
    setattr(dataset, attribute, value)
    pixels = np.zeros((2, 3), np.uint8)
    pixels[0, 0] = 1
    assert tuple(np.argwhere(upright(pixels, dataset))[0]) == corner


def test_axial_puts_the_right_side_left_and_the_front_on_top():
    volume = np.zeros((4, 6, 1))  # RAS+: x grows to the patient's right, y to the front
    volume[3, 5, 0] = 1  # right, front
    plane = axial(volume, 0)
    assert plane.shape == (6, 4)
    assert plane[0, 0] == 1


def test_resize_keeps_proportions():
    pixels = np.zeros((100, 50), np.uint8)
    assert resize(pixels, (1.0, 1.0)).shape == (240, 120)
    assert resize(pixels, (1.0, 4.0)).shape == (120, 240)
    mask = np.zeros((100, 50), bool)
    mask[:50] = True
    assert resize_mask(mask, (1.0, 1.0)).mean() == pytest.approx(0.5, abs=0.02)


def test_window_clips():
    assert window(np.array([-1000.0, 40.0, 1000.0]), -160, 240).tolist() == [0, 128, 255]


def test_names():
    assert organ("kidney_left") == "left kidney"
    assert organ("lung_upper_lobe_right") == "right lung"
    assert organ("vertebrae_L3") == "vertebra"
    assert organ("rib_left_3") is None
    assert brain_region("Frontal_Sup_Orb_L") == "left frontal lobe"
    assert brain_region("Vermis_4_5") == "cerebellar vermis"
    assert brain_region("Amygdala_L") is None
