"""Boxes in text: every convention there and back, and texts that mean harm."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.boxes import (
    CONVENTIONS,
    find_boxes,
    format_boxes,
    iou,
    parse_boxes,
    strip_boxes,
    to_box,
)
from clinkd.data.formats_boxes import convert_boxes, resized_size

settings.register_profile("clinkd-data", deadline=None)  # the machine may be busy
settings.load_profile("clinkd-data")

side = st.tuples(st.integers(0, 999), st.integers(1, 1000)).map(
    lambda p: (p[0], max(p[0] + 1, p[1]))
)
box = st.tuples(side, side).map(lambda p: (p[0][0], p[1][0], p[0][1], p[1][1]))
size = st.tuples(st.integers(28, 4000), st.integers(28, 4000))


@pytest.mark.parametrize("convention", ["qwen2", "box", "qwen3"])
@given(boxes=st.lists(box, max_size=4), before=st.text(max_size=20))
def test_format_then_parse(convention, boxes, before):
    text = before.replace("{", "") + format_boxes(boxes, convention)
    expected = parse_boxes(before.replace("{", ""), convention) + [
        tuple(map(float, b)) for b in boxes
    ]
    assert parse_boxes(text, convention) == expected


@given(boxes=st.lists(box, min_size=1, max_size=4), size=size)
def test_pixels_there_and_back_within_half_a_pixel(boxes, size):
    back = parse_boxes(format_boxes(boxes, "qwen2.5", size), "qwen2.5", size)
    for was, now in zip(boxes, back, strict=True):
        for low, high, pixels in ((0, 2, size[0]), (1, 3, size[1])):
            ends = [round(was[end] * pixels / 1000) for end in (low, high)]
            most = (500 if ends[0] < ends[1] else 1500) / pixels  # no pixel long: it gets one
            assert all(abs(was[end] - now[end]) <= most + 1e-6 for end in (low, high))
            assert now[low] < now[high]


@given(st.text(alphabet='()<>{}[]|box_2d": ,.-0159startend', max_size=300))
def test_no_text_makes_the_parsers_fail(text):
    for convention in (None, *CONVENTIONS):
        for x1, y1, x2, y2 in parse_boxes(text, convention, (640, 480)):
            assert x1 <= x2
            assert y1 <= y2
    find_boxes(text)
    strip_boxes(text)


HOSTILE = [
    "{" * 200_000,
    '{"bbox_2d": [' * 20_000,
    '{"bbox_2d"' + " " * 200_000,
    "{" + '"bbox_2d":[1,2,3,' * 20_000,
    "(" + "1" * 200_000,
    "(1," * 60_000,
    "(1,2),(" * 30_000,
    "( " * 100_000,
    "(" + " " * 200_000,
    "<box>" * 50_000,
    "<|box_start|>(" + " " * 200_000,
    "<ref>" * 50_000,
    " " * 200_000 + "x",
    "<ref>" + "a" * 200_000,
    '{"bbox_2d": [1, 2, 3, 4], "label": "' + "\\\\" * 100_000 + "}",
    "[" * 100_000,
]


@pytest.mark.timeout(60)  # quadratic would be many minutes
@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_long_hostile_texts_come_to_an_end(index):
    text = HOSTILE[index]
    parse_boxes(text)
    find_boxes(text)
    strip_boxes(text)
    for source in ("qwen2", "box", "qwen3"):
        convert_boxes(text[:50_000], source, "qwen2")


def test_numbers_too_long_are_no_coordinates():
    assert parse_boxes(f"<box>(1,2),(3,{'9' * 400})</box>") == []


def test_find_boxes_keeps_corners_as_written():
    assert find_boxes("<box>(30,40),(10,20)</box>") == [(30, 40, 10, 20)]
    assert parse_boxes("<box>(30,40),(10,20)</box>") == [(10, 20, 30, 40)]


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ((0.4, 0.6, 999.5, 1000.9), (0, 1, 1000, 1000)),
        ((-0.9, 0, 5, 5), (0, 0, 5, 5)),
        ((10.1, 10.1, 10.2, 10.3), (10, 10, 11, 11)),
        ((999.9, 1, 1000, 2), (999, 1, 1000, 2)),
    ],
)
def test_to_box_rounds(corners, expected):
    assert to_box(corners) == expected


@pytest.mark.parametrize(
    ("corners", "message"),
    [((-2, 0, 5, 5), "outside"), ((0, 0, 5, 1002), "outside"), ((5, 0, 5, 5), "reversed or empty")],
)
def test_to_box_refuses(corners, message):
    with pytest.raises(ValueError, match=message):
        to_box(corners)


@given(box)
def test_iou_of_a_box_with_itself(b):
    assert iou(b, b) == 1.0


@given(box, box)
def test_iou_is_symmetric_and_at_most_one(a, b):
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1


# rewriting -----------------------------------------------------------------------------------

QWEN2 = (
    "The <|object_ref_start|>liver<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|> is "
    "right of <|box_start|>(500,500),(600,700)<|box_end|>."
)


def test_to_bird():
    assert convert_boxes(QWEN2, "qwen2", "box") == (
        "The <ref>liver</ref><box>(10,20),(300,400)</box> is right of "
        "<box>(500,500),(600,700)</box>."
    )


def test_to_qwen3():
    assert convert_boxes(QWEN2, "qwen2", "qwen3") == (
        'The {"bbox_2d": [10, 20, 300, 400], "label": "liver"} is right of '
        '{"bbox_2d": [500, 500, 600, 700]}.'
    )


def test_to_pixels():
    assert convert_boxes("<box>(0,500),(1000,1000)</box>", "box", "qwen2.5", (448, 224)) == (
        '{"bbox_2d": [0, 112, 448, 224]}'
    )


def test_qwens_own_json_list():
    first = '{"bbox_2d": [1, 2, 3, 4], "label": "a \\"b\\""}'
    text = f'```json\n[\n\t{first},\n\t{{"bbox_2d": [5, 6, 7, 8]}}\n]\n```'
    assert convert_boxes(text, "qwen3", "qwen2") == (
        '<|object_ref_start|>a "b"<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>'
        "<|box_start|>(5,6),(7,8)<|box_end|>"
    )


def test_names_without_a_box():
    assert convert_boxes("is <ref>it</ref> here", "box", "qwen2") == (
        "is <|object_ref_start|>it<|object_ref_end|> here"
    )
    assert convert_boxes("is <ref>it</ref> here", "box", "qwen3") == "is it here"


@pytest.mark.parametrize("other", ["box", "qwen3"])
@given(boxes=st.lists(box, max_size=3), label=st.text(alphabet='ab "\\é', max_size=8))
def test_rewriting_there_and_back(other, boxes, label):
    name = f"<|object_ref_start|>{label}<|object_ref_end|>"
    text = "At " + " and ".join(name + format_boxes([b]) for b in boxes) + "."
    back = convert_boxes(convert_boxes(text, "qwen2", other), other, "qwen2")
    assert back == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "quad", "qwen2"), "unknown box convention 'quad'"),
        (("", "qwen2", "qwen2.5"), "the size of the image is needed"),
        (("<box>(5,5),(1,1)</box>", "box", "qwen2"), r"reversed or empty: \(5, 5, 1, 1\)"),
        (("<box>(5,5),(6,1200)</box>", "box", "qwen2"), "outside the image"),
    ],
)
def test_rewriting_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_boxes(*arguments)


def test_format_refuses():
    with pytest.raises(ValueError, match="convention must be one of qwen2, box"):
        format_boxes([], "quad")
    with pytest.raises(ValueError, match="convention must be one of qwen2, box"):
        parse_boxes("", "quad")
    with pytest.raises(ValueError, match="size"):
        format_boxes([(1, 2, 3, 4)], "qwen2.5")
    with pytest.raises(ValueError, match="size"):
        parse_boxes("", "qwen2.5")


@pytest.mark.slow
@settings(max_examples=200)
@given(size=size, factor=st.sampled_from([28, 32]))
def test_resized_size_is_that_of_transformers(size, factor):
    smart_resize = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_qwen2_vl"
    ).smart_resize
    height, width = smart_resize(size[1], size[0], factor, 56 * 56, 768 * 768)
    assert resized_size(size, factor, 56 * 56, 768 * 768) == (width, height)
