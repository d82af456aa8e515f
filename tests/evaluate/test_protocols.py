"""The published protocols against golden numbers, and properties of every metric."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.boxes import format_boxes
from clinkd.errors import ConfigError, DataError
from clinkd.evaluate.predictions import read_predictions
from clinkd.evaluate.protocols import (
    PROTOCOLS,
    clean_response,
    describing,
    grounding,
    naming,
    protocol,
)
from clinkd.evaluate.score import score_model
from clinkd.evaluate.text import statistics

GOLDEN = Path(__file__).parent / "golden" / "bird.jsonl"
DESCRIBED = GOLDEN.with_name("rc.jsonl")
SUMMARISED = GOLDEN.with_name("mia.jsonl")


def scores(name, rows):
    found = score_model(rows, protocol(name), label="x", meteor="meteor_py", bootstrap=0)
    return {task: result["score"] for task, result in found["tasks"].items()}


@pytest.mark.parametrize(
    ("name", "vg", "roc"), [("bird", 13.75, 10.42), ("clinkd", 55.0, 41.67), ("strict", 85.71, 80)]
)
def test_golden_file_scores_as_derived_by_hand(name, vg, roc):
    assert scores(name, read_predictions(GOLDEN).rows) == {"VG": vg, "ROC": roc}


def test_each_golden_record_hits_as_derived_by_hand():
    rows = read_predictions(GOLDEN).rows
    boxes = grounding(rows[:6], PROTOCOLS["bird"]).statistics.rows
    assert boxes.tolist() == [[0, 1], [1, 1], [2, 2], [1, 1], [0, 1], [0, 1]]
    boxes = grounding(rows[:6], PROTOCOLS["strict"]).statistics.rows
    assert boxes.tolist() == [[1, 1], [1, 1], [1, 2], [1, 1], [1, 1], [1, 1]]
    cleaned = [{**row, "response": clean_response(row["response"])} for row in rows[6:]]
    assert naming(cleaned, PROTOCOLS["bird"]).statistics.rows[:, 0].tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "rc", "mia"),
    [("bird", 24.55, 13.65), ("clinkd", 65.48, 54.59), ("strict", 63.81, 52.91)],
)
def test_golden_texts_score_as_derived_by_hand(name, rc, mia):
    rows = read_predictions(DESCRIBED).rows + [
        {**row, "id": f"m{row['id']}"} for row in read_predictions(SUMMARISED).rows
    ]
    assert scores(name, rows) == {"RC": rc, "MIA": mia}


def test_each_golden_text_scores_as_derived_by_hand():
    rows = read_predictions(DESCRIBED).rows
    cleaned = [{**row, "response": clean_response(row["response"])} for row in rows]
    found = describing(cleaned, spice=False).statistics.rows[:, 0]
    derived = [1, 2 / 3, 0, 0, 1 / 2, 2 / 3, 1, 2 / 3, 6 / 7, 1, 1, 1 / 2]
    assert found.tolist() == pytest.approx(derived)
    rows = read_predictions(SUMMARISED).rows
    cleaned = [{**row, "response": clean_response(row["response"])} for row in rows]
    texts = [row["response"] for row in cleaned], [[row["annotation"]] for row in rows]
    found = statistics(*texts, ["rouge_l", "meteor_py"])
    rouge = [1, 0.530435, 0, 0, 0.5, 0.5, 1, 0.709302, 0.8, 0, 1, 0.458647]
    assert found["rouge_l"].rows[:, 0].tolist() == pytest.approx(rouge, abs=1e-6)
    meteor = [1, 0.209965, 0, 0, 0.433547, 0.8, 1, 0.415365, 0.382136, 0.6, 1, 0.148148]
    assert found["meteor_py"].rows[:, 0].tolist() == pytest.approx(meteor, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A.<|im_end|>B", "A."),
        ("line1\nline2\nline3", "line2"),
        ("A.\n<|im_end|>", "A.\n<|im_end|>"),
        ("A<|im_end|>\nB", "AB"),
        (" A<|endoftext|> ", "A"),
    ],
)
def test_cleaning_keeps_the_published_faults(text, cleaned):
    assert clean_response(text) == cleaned


corner = st.integers(0, 400)
side = st.integers(1, 400)
box = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)


def written(boxes):
    return "".join(f"<box>({a},{b}),({c},{d})</box>" for a, b, c, d in boxes)


def vg(truth, answer, image="ct_1"):
    row = {"id": image, "task": "VG", "modality": "ct", "group": image}
    return row | {"annotation": written(truth), "response": written(answer)}


@settings(max_examples=40, deadline=None)
@given(st.lists(box, min_size=1, max_size=4, unique=True), st.sampled_from(["clinkd", "strict"]))
def test_identical_boxes_score_all_and_none_score_nothing(boxes, name):
    assert scores(name, [vg(boxes, boxes)]) == {"VG": 100}
    assert scores(name, [vg(boxes, [])]) == {"VG": 0}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(box, box), min_size=2, max_size=6), st.randoms())
def test_line_order_changes_nothing(pairs, random):
    rows = [vg([a], [b], f"ct_{i}") for i, (a, b) in enumerate(pairs)]
    mixed = random.sample(rows, len(rows))
    for name in PROTOCOLS:
        first, second = (
            score_model(r, protocol(name), label="", meteor="meteor_py", bootstrap=20)
            for r in (rows, mixed)
        )
        assert first == second


@settings(max_examples=40, deadline=None)
@given(box, box)
def test_truth_and_answer_may_be_swapped_and_units_changed(a, b):
    for name in PROTOCOLS:
        one = scores(name, [vg([a], [b])])
        assert one == scores(name, [vg([b], [a])])
        double = [tuple(2 * c for c in x) for x in (a, b)]
        assert one == scores(name, [vg([double[0]], [double[1]])])


TRUTHS = {
    "VG": "The liver is at <box>(10,10),(300,200)</box>.",
    "ROC": "left kidney",
    "RC": "A large lesion of the left lung.",
    "MIA": "The liver is large. A cyst lies in its left lobe.",
}


def of_all_tasks(answer):
    """A row a task in two modalities, answered by `answer(truth)`."""
    return [
        {
            "id": f"{modality}_{task}",
            "task": task,
            "modality": modality,
            "group": modality,
            "annotation": truth,
            "response": answer(truth),
        }
        for modality in ("ct", "mr")
        for task, truth in TRUTHS.items()
    ]


@pytest.mark.parametrize("name", ["clinkd", "strict"])
def test_the_truth_scores_all_and_silence_nothing_in_every_task(name):
    assert scores(name, of_all_tasks(lambda truth: truth)) == dict.fromkeys(TRUTHS, 100)
    assert scores(name, of_all_tasks(lambda truth: "")) == dict.fromkeys(TRUTHS, 0)


def test_eight_modalities_of_which_two_are_there_give_a_quarter():
    assert scores("bird", of_all_tasks(lambda truth: truth)) == dict.fromkeys(TRUTHS, 25)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(8)))
def test_line_order_changes_no_task(order):
    rows = of_all_tasks(lambda truth: truth[: len(truth) // 2] + "in the lung")
    assert scores("clinkd", rows) == scores("clinkd", [rows[i] for i in order])


@settings(max_examples=40, deadline=None)
@given(st.lists(box, min_size=1, max_size=3, unique=True), st.lists(box, max_size=3))
def test_strict_reads_every_convention_of_the_same_unit(truth, answer):
    found = set()
    for convention in ("box", "qwen2", "qwen3"):
        row = vg(truth, answer) | {"response": format_boxes(answer, convention)}
        found.add(scores("strict", [row])["VG"])
    assert len(found) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(box, min_size=1, max_size=3, unique=True), st.lists(box, max_size=3))
def test_more_boxes_never_lower_the_published_recall(truth, answer):
    one = scores("clinkd", [vg(truth, answer)])["VG"]
    assert scores("clinkd", [vg(truth, [*answer, truth[0]])])["VG"] >= one


def test_unknown_protocol_names_the_known():
    with pytest.raises(ConfigError, match="bird, clinkd, strict"):
        protocol("coco")


def test_malformed_lines_are_errors_with_their_number_or_listed(tmp_path):
    good = json.dumps({"id": 1, "image": "ct_1.png", "annotation": "a", "response": "a"})
    path = tmp_path / "p.jsonl"
    path.write_text(f'{good}\n{good[:20]}\n{good}\n{{"id": 3}}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        read_predictions(path, task="ROC")
    found = read_predictions(path, task="ROC", skip_bad=True)
    assert [number for number, _ in found.bad] == [2, 3, 4]
    assert len(found.rows) == 1
