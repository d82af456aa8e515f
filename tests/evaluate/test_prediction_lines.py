"""Odd lines of prediction files: each is an error with its number, or left out and listed."""

import json
import math

import pytest

from clinkd.commands.evaluate import evaluate_file
from clinkd.data.records import record_from_json
from clinkd.errors import ConfigError, DataError
from clinkd.evaluate.extras import confidence
from clinkd.evaluate.predictions import read_predictions
from clinkd.evaluate.protocols import protocol
from clinkd.evaluate.score import score_model
from clinkd.evaluate.text import scene_graph

ROW = {"id": "ct_1", "task": "VG", "annotation": "There.", "response": "(1,2),(3,4)"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scored(rows):
    return score_model(rows, protocol("strict"), label="", meteor="meteor_py", bootstrap=0)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"boxes": 5}, "'boxes' must be a list"),
        ({"boxes": "abc"}, "'boxes' must be a list"),
        ({"boxes": [None]}, "'boxes' must be a list"),
        ({"boxes": [[1, 2, 3]]}, "'boxes' must be a list"),
        ({"boxes": [["1", "2", "3", "4"]]}, "'boxes' must be a list"),
        ({"boxes": [[1, 2, 3, True]]}, "'boxes' must be a list"),
        ({"boxes": [[1, 2, 3, 10**400]]}, "'boxes' must be a list"),
        ({"candidates": 5}, "'candidates' must be a list"),
        ({"candidates": {"0": 1}}, "'candidates' must be a list"),
        ({"candidates": ["a"]}, "an object with a 'text'"),
        ({"candidates": [{"text": 1}]}, "an object with a 'text'"),
        ({"candidates": [{"mean_log_prob": -1.0}]}, "an object with a 'text'"),
        ({"candidates": [{"text": "", "mean_log_prob": 1e308}]}, "'mean_log_prob' must be"),
        ({"candidates": [{"text": "", "mean_log_prob": "x"}]}, "'mean_log_prob' must be"),
        ({"candidates": [{"text": "", "mean_log_prob": True}]}, "'mean_log_prob' must be"),
        ({"candidates": [{"text": ""}], "selected": 1}, "'selected' must be the place of one of 1"),
        ({"candidates": [{"text": ""}], "selected": -1}, "'selected' must be"),
        ({"candidates": [{"text": ""}], "selected": "0"}, "'selected' must be"),
        ({"candidates": [{"text": ""}], "selected": [0]}, "'selected' must be"),
    ],
)
def test_a_line_of_another_shape_is_named_and_may_be_left_out(tmp_path, odd, message):
    path = write(tmp_path / "p.jsonl", ROW, ROW | {"id": "2"} | odd)
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{message}"):
        read_predictions(path)
    found = read_predictions(path, skip_bad=True)
    assert [number for number, _ in found.bad] == [2]
    scored(found.rows)


@pytest.mark.parametrize(
    "fine",
    [
        {"boxes": None, "candidates": None, "selected": None},
        {"boxes": [], "candidates": [], "selected": 0, "error": "no image"},
        {"boxes": [[1.5, 2, 3, 4]], "candidates": [{"text": "a", "mean_log_prob": None}]},
        {"candidates": [{"text": "a", "mean_log_prob": 1e-9}, {"text": "b"}], "selected": 1},
    ],
)
def test_what_our_own_lines_may_hold(tmp_path, fine):
    scored(read_predictions(write(tmp_path / "p.jsonl", ROW | fine)).rows)


def test_an_answer_that_failed_has_no_confidence():
    row = {"selected": 0, "candidates": [{"text": "a", "mean_log_prob": math.log(0.5)}]}
    assert confidence(row) == pytest.approx(0.5)
    assert confidence(row | {"error": "the scorer yields NaN"}) is None
    assert confidence(row | {"candidates": "a"}) is None
    assert confidence(row | {"candidates": ["a"]}) is None
    assert confidence({"candidates": [{"mean_log_prob": 1e308}]}) == 1


def test_a_text_that_the_parser_refuses_is_read_as_far_as_it_goes():
    long = "The liver is large. " + "x" * 1_100_000
    rows = [{"id": "1", "task": "RC", "modality": "ct", "annotation": "A liver.", "response": long}]
    assert scored(rows)["tasks"]["RC"]["score"] > 0
    assert scene_graph._parser().max_length > scene_graph.MOST_CHARACTERS


TRUTH = [
    record_from_json(
        {
            "id": f"ct_{i}",
            "task": "ROC",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "liver"}],
        }
    )
    for i in range(3)
]


def test_records_without_a_line_are_listed_beside_the_bad_lines(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "ct_0", "response": "liver"}\n{"id": "ct_1", "resp\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        read_predictions(path, reference=TRUTH)
    found = read_predictions(path, reference=TRUTH, skip_bad=True)
    assert (len(found.rows), len(found.bad), found.missing) == (1, 1, ["ct_1", "ct_2"])
    whole = write(tmp_path / "q.jsonl", {"id": "ct_0", "response": "liver"})
    with pytest.raises(DataError, match=r"no prediction for 2 records, as ct_1, ct_2; --skip-bad"):
        read_predictions(whole, reference=TRUTH)
    reference = write(tmp_path / "r.jsonl", *(record.to_json() for record in TRUTH))
    settings = {"reference": reference, "protocol": "strict", "task": None, "meteor": "python"}
    evaluate_file(path, **settings, spice=False, skip_bad=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["missing"], [row["line"] for row in told["bad_lines"]]) == (["ct_1", "ct_2"], [2])
    evaluate_file(path, **settings, spice=False, skip_bad=True, as_json=False)
    assert "2 records without a usable line" in capsys.readouterr().out


PIXELS = '```json\n[{"bbox_2d": [200, 100, 400, 200], "label": "liver"}]\n```'
THOUSANDTHS = "<|box_start|>(500,500),(1000,1000)<|box_end|>"


def grounded(path, response, boxes, **more):
    row = {"id": "a", "task": "VG", "annotation": f"At {THOUSANDTHS}.", "response": response}
    rows = read_predictions(write(path, row | more), boxes=boxes).rows
    return scored(rows)["tasks"]["VG"]["score"]


@pytest.mark.parametrize(
    ("response", "boxes", "score"),
    [
        (PIXELS, None, 0),  # as thousandths
        (PIXELS, "qwen2.5", 100),
        ('{"bbox_2d": [500, 500, 1000, 1000]}', "qwen3", 100),
        ("<box>(500,500),(1000,1000)</box>", "box", 100),
        (THOUSANDTHS, "qwen2", 100),
        ("I see none.", "qwen2.5", 0),
    ],
)
def test_the_convention_of_a_file_may_be_named(tmp_path, response, boxes, score):
    assert grounded(tmp_path / "p.jsonl", response, boxes, size=[400, 200]) == score


def test_published_protocols_read_it_too(tmp_path):
    row = {"id": "a", "annotation": f"At {THOUSANDTHS}.", "response": PIXELS, "size": [400, 200]}
    rows = read_predictions(write(tmp_path / "p.jsonl", row), boxes="qwen2.5").rows
    found = score_model(rows, protocol("clinkd"), label="", meteor="meteor_py", bootstrap=0)
    assert found["tasks"]["VG"]["score"] == 100


@pytest.mark.parametrize("size", [None, [0, 4], ["4", 4], [4], 4])
def test_pixels_need_the_size_of_the_image(tmp_path, size):
    with pytest.raises(DataError, match=r"p\.jsonl:1: boxes in pixels need 'size'"):
        grounded(tmp_path / "p.jsonl", PIXELS, "qwen2.5", size=size)
    assert grounded(tmp_path / "p.jsonl", "None.", "qwen2.5", size=size) == 0
    with pytest.raises(ConfigError, match=r"boxes must be one of qwen2, box, qwen2\.5, qwen3"):
        grounded(tmp_path / "p.jsonl", "", "quad")
