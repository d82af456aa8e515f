"""Charts, verdicts, texts and the choice of examples, each by itself."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

from clinkd.report import charts
from clinkd.report.build import _about, _signed, _without_places, settings_table
from clinkd.report.corrections import examples
from clinkd.report.gallery import in_turn, rectangle
from clinkd.report.judge import as_boxes, judge, mean_iou, token_f1
from clinkd.report.read import Run
from clinkd.report.scores import standing
from clinkd.report.selection import first_beam, selection
from clinkd.report.text import changes, pieces


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7.3), (-2, 5), (0.001, 0.0042), (10, 600), (3, 3), (0, 0)]
)
def test_ticks_cover_the_range_evenly(low: float, high: float) -> None:
    found = charts.ticks(low, high, 4)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    steps = [b - a for a, b in pairwise(found)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)


def test_a_zero_has_no_minus() -> None:
    assert [_signed(each) for each in (-0.02, 0.02, -0.2, None)] == ["+0.0", "+0.0", "−0.2", "–"]


def test_thin_keeps_the_last_point() -> None:
    points = [(float(i), float(i)) for i in range(1001)]
    kept = charts.thin(points, 100)
    assert len(kept) <= 102
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]


def test_chart_of_one_point_and_its_spoken_form() -> None:
    svg = charts.loss_chart("a <b>", [charts.Curve("loss", "loss", ((10.0, 6.3),))])
    assert "a &lt;b&gt;" in svg
    assert "nan" not in svg
    assert "loss from 6.3 to 6.3" in svg


def test_bar_stays_inside_and_marks_are_drawn() -> None:
    svg = charts.bar(140.0, "final", {"baseline": 100.0, "none": None})
    assert 'width="100"' in svg
    assert 'class="tick f-baseline" x="99"' in svg
    assert "f-none" not in svg
    assert "f-final" not in charts.bar(None, "final")


def test_stacked_shares_fill_the_bar() -> None:
    svg = charts.stacked([("accepted", 3), ("skipped", 1)])
    assert 'class="f-accepted" x="0" y="0" width="75"' in svg
    assert 'class="f-skipped" x="75" y="0" width="25"' in svg


BOX = "<|box_start|>(100,100),(300,300)<|box_end|>"


@pytest.mark.parametrize(
    ("task", "text", "truth", "verdict"),
    [
        ("VG", BOX, BOX, "right"),
        ("VG", "<|box_start|>(100,100),(300,200)<|box_end|>", BOX, "right"),  # IoU exactly 0.5
        ("VG", "<|box_start|>(100,100),(300,199)<|box_end|>", BOX, "wrong"),
        ("VG", "nothing", BOX, "wrong"),
        ("ROC", "The Liver.", "the liver", "right"),
        ("ROC", "spleen", "the liver", "wrong"),
        ("RC", "The liver, small and bright", "The liver, large and dark", "partly"),
        ("MIA", "", "An axial slice", "wrong"),
    ],
)
def test_verdicts(task: str, text: str, truth: str, verdict: str) -> None:
    assert judge(task, text, truth, [(100.0, 100.0, 300.0, 300.0)]).verdict == verdict


def test_several_true_boxes_are_averaged() -> None:
    a, b = (0.0, 0.0, 100.0, 100.0), (500.0, 500.0, 600.0, 600.0)
    assert mean_iou([a], [a, b]) == 0.5
    assert mean_iou([a], []) == 0.0


def test_token_f1_ignores_boxes_case_and_signs() -> None:
    assert token_f1(f"The liver {BOX}.", "the LIVER") == 1.0
    assert token_f1("a b", "b c") == 0.5
    assert token_f1("", "") == 1.0


def test_malformed_boxes_are_left_out() -> None:
    assert as_boxes([[1, 2, 3, 4], [1, 2], "abcd", None, [1, 2, 3, True]]) == [(1, 2, 3, 4)]
    assert as_boxes("x") == []


def test_rectangle_is_cut_to_the_image() -> None:
    wanted = {"x": "0", "y": "20", "width": "1000", "height": "30"}
    assert rectangle((-50, 20, 1700, 50)) == wanted


def test_pieces_turn_boxes_into_labels() -> None:
    assert pieces(f"The liver is at {BOX}.") == [
        ("text", "The liver is at "),
        ("box", "100, 100 – 300, 300"),
        ("text", "."),
    ]
    assert pieces("<ref>liver</ref>") == [("text", "liver")]
    # a box that is cut off takes no words with it
    assert pieces(f"<|box_start|>(1,2 and a liver {BOX}") == [
        ("text", "(1,2 and a liver "),
        ("box", "100, 100 – 300, 300"),
    ]
    assert pieces("<|box_start|>broken<|box_end|>")[0][0] == "text"
    assert pieces("  ") == []


def test_changes_mark_words() -> None:
    assert changes("The liver is small", "The liver is large") == [
        ("same", "The liver is"),
        ("old", "small"),
        ("new", "large"),
    ]
    assert changes("", "all new") == [("new", "all new")]


def test_in_turn_mixes_both_kinds() -> None:
    items = [(m, v, i) for i in range(5) for m in "ab" for v in "xy"]
    found = in_turn(items, outer=lambda t: t[0], inner=lambda t: t[1], most=4)
    assert [t[:2] for t in found] == [("a", "x"), ("b", "y"), ("a", "y"), ("b", "x")]
    assert in_turn(items[:3], outer=lambda t: t[0], inner=lambda t: t[1], most=9)
    assert in_turn([], outer=str, inner=str, most=3) == []


def test_correction_examples_show_every_status() -> None:
    rows = [{"status": "accepted", "task": "RC", "id": str(i)} for i in range(50)]
    rows += [{"status": s, "task": "VG", "id": s} for s in ("truth", "kept", "skipped", "odd")]
    found = examples(rows, 6)
    assert {row["status"] for row in found} == {"accepted", "truth", "kept", "skipped", "odd"}


@pytest.mark.parametrize(
    ("score", "interval", "baseline", "word"),
    [
        (10.0, [8.0, 12.0], ("b", 13.0), "below"),
        (10.0, [8.0, 12.0], ("b", 10.0), "below"),
        (10.0, [8.0, 12.0], ("b", 9.0), "unclear"),
        (10.0, [8.0, 12.0], ("b", 7.9), "above"),
        (10.0, None, ("b", 9.0), "above"),
        (10.0, None, None, None),
        (None, None, ("b", 9.0), None),
    ],
)
def test_standing_against_a_baseline(
    score: float | None,
    interval: list[float] | None,
    baseline: tuple[str, float] | None,
    word: str | None,
) -> None:
    assert standing(score, interval, baseline) == word


def test_first_beam_is_the_best_score() -> None:
    assert first_beam([{"score": -2.0}, {"score": -1.0}, {"score": -1.0}]) == 1
    assert first_beam([{}, {"score": None}]) == 0


def test_selection_is_counted_where_the_metrics_are_silent() -> None:
    line = {
        "task": "ROC",
        "annotation": "liver",
        "selected": 1,
        "candidates": [{"text": "spleen", "score": -1}, {"text": "liver", "score": -2}],
    }
    wrong = line | {"selected": 0}
    (row,) = selection([line, wrong], {})
    assert (row["first"], row["chosen"], row["oracle"]) == (0.0, 50.0, 100.0)
    assert (row["gain"], row["gap"], row["changed"]) == (50.0, 50.0, 50.0)
    assert row["measure"] == "token F1"


def test_settings_show_the_end_of_whole_paths() -> None:
    config = {"data": {"train": "/srv/somebody/study/train.jsonl", "root": None}, "seed": 0}
    assert settings_table(config) == [
        ("run", [("seed", "0")]),
        ("data", [("train", "…/study/train.jsonl"), ("root", "–")]),
    ]


def test_of_whole_paths_the_end_is_shown_everywhere(tmp_path: Path) -> None:
    places = {"student": "/srv/somebody/models/qwen", "teacher": "Qwen/Qwen2-VL-2B-Instruct"}
    config = {"model": places, "generate": {"scorer": "local-dir:/srv/somebody/models/clip"}}
    shown = dict(row for _, rows in settings_table(config) for row in rows)
    assert shown["scorer"] == "local-dir:…/models/clip"
    assert shown["teacher"] == "Qwen/Qwen2-VL-2B-Instruct"
    run = Run(tmp_path, config=config)
    assert _about(run)["student"] == "…/models/qwen"
    rows = [{"summary": "stopped: /srv/somebody/models/qwen: no processor can be read"}]
    found = _without_places({"rows": rows}, config)["rows"][0]["summary"]
    assert found == "stopped: …/models/qwen: no processor can be read"
    assert settings_table({"output": "/run"}) == [("run", [("output", "…/run")])]
