"""What texts state, and which replies of a corrector are refused."""

import pytest

from clinkd.data.boxes import stated_boxes
from clinkd.train.correction.facts import (
    contradiction,
    new_numbers,
    numbers,
    sides,
    without_boxes,
)
from clinkd.train.correction.verify import why_rejected

BOX = "<|box_start|>(10,20),(300,400)<|box_end|>"
OTHER = "<|box_start|>(11,20),(300,400)<|box_end|>"
TRUTH = f"The left femur is located at {BOX}."


def test_boxes_of_every_convention_are_found_in_order():
    text = f'a (1,2),(3,4) b {BOX} c <box>(5,6),(7,8)</box> d {{"bbox_2d": [9, 10, 11, 12]}}'
    found = stated_boxes(text)
    assert [b.form for b in found] == ["plain", "qwen2", "box", "json"]
    assert found[1].corners == (10, 20, 300, 400)
    assert text[found[0].start : found[0].end] == "(1,2),(3,4)"
    assert without_boxes(text, "#") == "a # b # c # d #"


def test_reversed_corners_stay_as_written():
    assert stated_boxes("(30,40),(1,2)")[0].corners == (30, 40, 1, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 lesions", {"3"}),
        ("three lesions of 3.0 cm", {"3"}),
        ("T2-weighted, 1,5 mm", {"2", "1.5"}),
        ("-20 HU, −3, minus 6, [-7] and 4-5", {"-20", "-3", "-6", "-7", "4", "5"}),
        ("< 5mm, >6 %, ≤.5, ca.4", {"5", "6", "0.5", "4"}),
        ("3.1.2020", {"3.1", "2020"}),
        ("fifteen, forty and a hundred", {"15", "40", "100"}),
        ("third ventricle, stage IV", {"3", "4"}),
        ("a second lesion in the v. cava, i.v. line, IV contrast, vitamin D", set()),
        ("1234567 and 1234568", {"1234567", "1234568"}),
        (f"at {BOX}", set()),
        ("one finds a lesion", set()),
        ("３ lesions", {"3"}),
    ],
)
def test_numbers(text, expected):
    assert numbers(text).keys() == expected


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("3 mm", "3 cm", {"3 mm"}),
        ("3 lesions, one of 3 mm", "3 lesions, one of 3 cm", {"3 mm"}),
        (">5 mm", "< 5 mm", {"5 >"}),
        ("20 HU", "minus 20 HU", {"20"}),
        ("a 5-mm nodule", "5 mm", set()),
        ("5 % or 5 mm", "5 percent or 5 millimetres", set()),
        ("less than 5 mm", "< 5 mm", set()),
        ("between 3 mm and 5 mm", "3-5 mm", set()),
        ("10 mm x 12 mm", "10 x 12 mm", set()),
    ],
)
def test_new_numbers(text, truth, expected):
    assert new_numbers(text, truth) == expected


def test_sides():
    assert sides("Left of it lies the RIGHT kidney") == {"left", "right"}
    assert sides("leftover bright") == set()


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("the right femur", "the left femur"),
        ("the femur", "the left femur"),
        ("the left femur", "the femur"),
        # the same sides in all, each at the wrong noun
        ("the left hip, next to the right femur", "the right hip, next to the left femur"),
        ("it is darker than its surroundings", "it is brighter than its surroundings"),
        ("a large lesion", "a small lesion"),
        ("no lesion is seen", "a lesion is seen"),
        ("a lesion isn't seen", "a lesion is seen"),
        ("a lesion is seen", "without any lesion"),
        ("an axial image", "a coronal image"),
    ],
)
def test_contradictions(text, truth):
    assert contradiction(text, truth) is not None


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("the left femur is at", "you can find the left femur at"),
        ("no lesion", "without a lesion"),
        ("brighter and darker parts", "darker parts and brighter ones"),
        ("the kidney on the left", "the left kidney"),
        ("a large lesion", "a lesion"),
    ],
)
def test_no_contradiction(text, truth):
    assert contradiction(text, truth) is None


def test_a_good_reply_passes():
    assert why_rejected(f"You can find the left femur at {BOX}.", TRUTH, 0.9) is None


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("  ", "empty"),
        (f"The left femur is at {OTHER}.", "boxes differ"),
        ("The left femur is at the border.", "boxes differ"),
        (f"The left femur is at {BOX} and {BOX}.", "boxes differ"),
        (f"The left femur is at {BOX} or (1,2),(3,4).", "boxes differ"),
        ("The left femur is at (10,20),(300,400).", "boxes differ"),  # another convention
        (f"The left femur is at {BOX} or （1,2）,（3,4）.", "boxes differ"),  # full width
        (f"The 2 left femurs are at {BOX}.", "numbers that the truth lacks: 2"),
        (f"The left femur is at {BOX}, [10, 20, 300, 400].", "numbers that the truth lacks"),
        (f"The right femur is at {BOX}.", "'right' where the truth says 'left'"),
        (f"No left femur is at {BOX}.", "negates"),
        (f"The correct answer is the left femur at {BOX}.", "speaks about the correction"),
        (f"The student's left femur is at {BOX}.", "speaks about the correction"),
        (f"The left femur is at {BOX}.<|im_end|>\n<|im_start|>user", "markup"),
        (f"The left femur is at {BOX}. <image>", "markup"),
        (f"The left femur is at {BOX}<|box_end|>.", "markup"),
        (f"The left femur is at {BOX}.\u200b", "cannot be seen"),
        (f"The left femur is at {BOX}.\ud800", "cannot be seen"),
        (f"The left femur is at {BOX}. " + "It is a bone of the leg. " * 9, "too long"),
        (f"Left: {BOX}.", "too short"),
    ],
)
def test_bad_replies_are_refused(reply, why):
    truth = TRUTH if why != "too short" else f"The left femur of this patient is located at {BOX}."
    assert why in why_rejected(reply, truth, 1.0)


def test_unlike_replies_are_refused():
    assert why_rejected(TRUTH, TRUTH, 0.79) == "similarity to the truth 0.79, under 0.8"
    assert why_rejected(TRUTH, TRUTH, 0.8) is None
    assert why_rejected(TRUTH, TRUTH, 0.5, least_similarity=0.4) is None


def test_markup_of_the_truth_is_allowed():
    truth = f"<ref>left femur</ref> {BOX}"
    assert why_rejected(f"The <ref>left femur</ref> is at {BOX}", truth, 1.0) is None
