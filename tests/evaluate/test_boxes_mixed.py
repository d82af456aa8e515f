"""Texts whose boxes are of several forms, malformed, or cut off."""

import time

import pytest

from clinkd.data.boxes import find_boxes, parse_boxes, strip_boxes

QWEN2 = "<|box_start|>(1,2),(3,4)<|box_end|>"


@pytest.mark.parametrize(
    ("text", "firsts"),
    [
        (f"{QWEN2} and (5,6),(7,8)", [1, 5]),  # the second has lost its marks
        (f"(5,6),(7,8), <box>(9,9),(10,10)</box>, {QWEN2}", [5, 9, 1]),
        ('{"bbox_2d": [20, 2, 30, 4]} (5,6),(7,8)', [20, 5]),
        ('{"bbox_2d": [20, 2, 30, 4], "label": "<box>(1,2),(3,4)</box>"}', [20]),  # one box
        ('{"label": "(5,6),(7,8)", "bbox_2d": [20, 2, 30, 4]}', [20]),
        ("<box>(1,2),(3,4),(5,6),(7,8)</box>", [1, 5]),
    ],
)
def test_boxes_of_all_forms_are_read_once_in_the_order_of_the_text(text, firsts):
    assert [box[0] for box in parse_boxes(text)] == firsts
    assert [box[0] for box in find_boxes(text)] == firsts


def test_a_named_form_is_read_alone():
    text = f"{QWEN2} <box>(5,6),(7,8)</box>"
    assert parse_boxes(text, "box") == [(5, 6, 7, 8)]
    assert parse_boxes(text, "qwen2") == [(1, 2, 3, 4)]


@pytest.mark.parametrize(
    "tail",
    [
        "(608,663),(942,",
        "(608,663),(942",
        "(608, 663), (942.5, 70",
        "(608,663),(",
        "(608,663),",
        "(608,663)",
        "(608,",
        "(608",
        "<|box_start|>(1,2),(3,4),(5,6)<|box_end|>",
        "<|box_start|>(1,2),(3,",
        "<|box_start|>(1,2),(3,4)",
        "<|box_start|>left lobe, 12, 13",
        "<box>(1,2)</box>",
        "<box>(1,2),(3,4),(5,",
        "<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
        '{"bbox_2d": [1, 2, 3',
        '{"bbox_2d": [1, 2, 3]}',
    ],
)
def test_nothing_stays_of_a_box_that_is_malformed_or_cut_off(tail):
    assert strip_boxes(f"The liver is at {tail}") == "The liver is at"


@pytest.mark.parametrize(
    "text", ["Grade (2).", "Of (L4, L5)", "T1 (3, 4) and more.", "A (large) one", "5, 6, 7"]
)
def test_other_brackets_stay(text):
    assert strip_boxes(text) == text


def test_text_after_a_malformed_box_stays():
    text = "At <|box_start|>(1,2),(3,4),(5,6)<|box_end|>, the liver; <box>x</box> the lung."
    assert strip_boxes(text) == "At, the liver; the lung."


@pytest.mark.parametrize(
    "text",
    [
        '{"a"' + '"bbox_2d":[1,2,3,4],' * 40_000,
        '{"bbox_2d" ' * 40_000,
        "(1,2)," * 100_000,
        "(1,2),(3," * 60_000,
        "<|box_start|>(1,2" * 40_000,
        "<box>(1,2),(3,4)</bo" * 40_000,
        "(1,2)" + " " * 400_000 + "x",
        "(1.1," + "9" * 400_000,
    ],
    ids=range(8),
)
def test_time_grows_with_the_text(text):
    start = time.process_time()
    parse_boxes(text)
    find_boxes(text)
    strip_boxes(text)
    assert time.process_time() - start < 10  # quadratic would be minutes
