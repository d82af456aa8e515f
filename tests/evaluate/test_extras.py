"""Boxes that cannot be read, wrong sides, and how far confidence can be trusted."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.evaluate.extras import calibration, confidence, grounding_extras, laterality_extras
from clinkd.evaluate.protocols import protocol
from clinkd.evaluate.score import score_model

TRUTH = "It is at <box>(0,0),(100,100)</box>."


def answers(*texts, truth=TRUTH):
    return [{"annotation": truth, "response": text} for text in texts]


def test_boxes_are_tried_read_and_counted_apart():
    found = grounding_extras(
        answers(
            "<box>(0,0),(100,100)</box>",  # read
            "<box>(0,0),(100,</box>",  # tried, cut off
            "<|box_start|>",  # tried
            "I see no lesion.",  # not tried; one number would not be a try either
            "At (0,0),(100,50) and (5,5),(4,2000).",  # two read, the second reversed, outside
        )
    )
    assert found == pytest.approx(
        {
            "mean_iou": 100 * (1 + 0 + 0 + 0 + 0.5) / 5,
            "box_present": 80,
            "parse_rate": 40,
            "valid_boxes": 100 * 2 / 3,
            "zero_boxes": 60,
            "one_box": 20,
            "many_boxes": 20,
            "count_match": 20,
        }
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet="<box>/(),0123456789| _startend", max_size=40), min_size=1))
def test_numbers_of_boxes_make_a_whole_and_what_is_read_was_tried(texts):
    found = grounding_extras(answers(*texts))
    counted = found["zero_boxes"] + found["one_box"] + found["many_boxes"]
    assert counted == pytest.approx(100)
    assert found["parse_rate"] == pytest.approx(100 - found["zero_boxes"])
    assert found["parse_rate"] <= found["box_present"] + 1e-9


def test_sides_are_whole_words():
    rows = answers(
        "A lesion of the LEFT lung.",
        "A cleft; the right lung.",  # "left" within a word is no side
        "Nothing is left or right.",
        "The lung.",
        "Bilateral.",
        truth="In the left lung.",
    )
    found = laterality_extras(rows)
    assert found == {
        "laterality_n": 5,
        "laterality_errors": 20,
        "laterality_both": 40,
        "laterality_missing": 20,
    }
    assert laterality_extras(answers("left", truth="Left and right.")) == {}


def test_confidence_is_that_of_the_chosen_candidate():
    row = {
        "selected": 1,
        "candidates": [{"mean_log_prob": -1.0}, {"mean_log_prob": math.log(0.25)}],
    }
    assert confidence(row) == pytest.approx(0.25)
    for other in ({}, {"candidates": []}, {"candidates": [{"text": "x"}]}, row | {"selected": 2}):
        assert confidence(other) is None


def test_calibration_by_hand():
    # bin 0.9…1: three at 0.95, two right: |2/3 − 0.95|; bin 0.2…0.3: one at 0.25, wrong
    found = calibration([0.95, 0.95, 0.95, 0.25], [True, True, False, False])
    assert found["ece"] == pytest.approx(100 * (3 * abs(2 / 3 - 0.95) + 0.25) / 4, abs=0.01)
    assert found["gap"] == pytest.approx(100 * (3.1 / 4 - 0.5), abs=0.01)
    assert [(b["low"], b["n"], b["right"]) for b in found["bins"]] == [(0.2, 1, 0), (0.9, 3, 66.67)]
    assert calibration([1.0, 0.0], [True, False])["ece"] == 0
    assert calibration([1.0], [False])["ece"] == 100
    assert calibration([], [])["ece"] == 0


def test_a_model_that_says_how_sure_it_is_gets_its_calibration():
    rows = [
        {
            "id": str(i),
            "task": "ROC",
            "modality": "ct",
            "annotation": "left kidney",
            "response": "left kidney" if i < 3 else "right kidney",
            "selected": 0,
            "candidates": [{"text": "", "mean_log_prob": math.log(0.75)}],
        }
        for i in range(4)
    ]
    rules = protocol("clinkd")
    result = score_model(rows, rules, label="x", meteor="meteor_py", bootstrap=0)["tasks"]["ROC"]
    assert result["calibration"]["ece"] == 0
    assert result["calibration"]["n"] == 4
    assert result["extras"]["laterality_errors"] == 25
    plain = [{k: v for k, v in row.items() if k != "candidates"} for row in rows]
    result = score_model(plain, rules, label="x", meteor="meteor_py", bootstrap=0)["tasks"]["ROC"]
    assert "calibration" not in result
