"""The page stays small whatever the answers are, and lines that are damaged do not end it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clinkd.report import build_report
from clinkd.report import judge as judging
from clinkd.report.build import MOST_BYTES
from clinkd.report.gallery import MOST_PICTURE_BYTES, Pictures
from clinkd.report.judge import MOST_JUDGED, as_boxes, judge
from clinkd.report.scores import number
from clinkd.report.text import changes, pieces


def noise(root: Path, names: list[str], side: int = 128) -> None:
    """Pictures that JPEG cannot make small."""
    generator = np.random.default_rng(0)
    for name in names:
        pixels = generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


def page(run: Path, rows: list[dict[str, Any]], root: Path | None = None) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "predictions.jsonl").write_text(text, encoding="utf-8")
    path = build_report(run, root)
    assert path.stat().st_size < MOST_BYTES
    return path.read_text(encoding="utf-8")


def test_forty_images_a_question(run: Path, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(40)]
    noise(tmp_path, names)
    html = page(run, [row | {"image": names} for row in lines(run)], tmp_path)
    assert "… 36 more images" in html
    assert html.count("<img ") >= 4


def test_pictures_that_come_often_are_counted_as_often(tmp_path: Path) -> None:
    noise(tmp_path, ["a.png", "b.png"], 400)
    size = len(Pictures(tmp_path, ["a.png"]).get("a.png")["uri"])
    pictures = Pictures(tmp_path, ["a.png"] * (MOST_PICTURE_BYTES // size + 1))
    assert len(pictures.get("a.png")["uri"]) < size
    pictures = Pictures(tmp_path, ["a.png", *["b.png"] * 3000])
    assert pictures.left_out == ["b.png"]
    assert pictures.get("a.png")["uri"]
    assert "too large" in pictures.get("b.png")["missing"]


@pytest.mark.parametrize("word", ["liver ", '"', "(1,2),(3,4)", "\u2028€"])
def test_answers_that_were_let_run_on(run: Path, tmp_path: Path, word: str) -> None:
    noise(tmp_path, names := [f"{i}.png" for i in range(72)], 384)
    long = word * (6_000 // len(word))
    candidate = {"text": long, "score": -1.0}
    rows = [
        row
        | {"image": name, "question": long, "annotation": long, "response": long}
        | {"candidates": [candidate] * 18, "selected": 0, "id": f"{i}{long}"}
        for i, (row, name) in enumerate(zip(lines(run), names, strict=True))
    ]
    html = page(run, rows, tmp_path)
    assert "more characters" in html
    assert "16 of 18 candidates" in html
    assert html == page(run, rows, tmp_path)


def test_of_long_answers_the_beginning_is_judged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    whole = judging.words
    monkeypatch.setattr(judging, "words", lambda text: seen.append(len(text)) or whole(text))
    candidates = [{"text": "liver " * 20_000, "score": -float(i)} for i in range(36)]
    row = next(row for row in lines(run) if row["task"] == "MIA")
    html = page(run, [row | {"candidates": candidates, "selected": 0}])
    assert max(seen) == MOST_JUDGED
    # of those that are shown alone: the metrics say what choosing gained
    assert len(seen) <= 2 * (16 + 1)
    assert "first 4 000 characters are judged" in html.replace("\u202f", " ")
    start = "(1,2),(3,4)"
    assert judge("VG", start + "x" * MOST_JUDGED, "", [(1, 2, 3, 4)]).verdict == "right"
    assert judge("VG", "x" * MOST_JUDGED + start, "", [(1, 2, 3, 4)]).verdict == "wrong"


def test_pictures_give_way_to_text(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(tmp_path, names := [f"{i}.png" for i in range(72)], 384)
    rows = [row | {"image": name} for row, name in zip(lines(run), names, strict=True)]
    whole = len(page(run, rows, tmp_path).encode())
    monkeypatch.setattr("clinkd.report.build.MOST_BYTES", whole - 300_000)
    html = page(run, rows, tmp_path)
    assert len(html.encode()) < whole - 300_000
    assert "left out, or the page would have more than" in html


@pytest.mark.parametrize(
    "odd",
    [
        {"candidates": 5},
        {"candidates": True},
        {"candidates": {"0": {"text": "a"}}},
        {"candidates": ["a", {"text": "b"}]},
        {"selected": True},
        {"selected": [0]},
        {"boxes": [["a", "b", "c", "d"], None, [float("nan")] * 4, [10**400] * 4]},
        {"response": "\ud800", "id": "\ud800"},
        {"error": {"why": "x"}, "modality": ["ct"]},
    ],
)
def test_damaged_lines_do_not_end_the_page(run: Path, odd: dict[str, Any]) -> None:
    html = page(run, [row | odd for row in lines(run)])
    assert '"nan"' not in html  # as a corner of a rectangle


def test_numbers_and_boxes_are_finite() -> None:
    assert number(10**400) is None
    assert as_boxes([[float("nan"), 1, 2, 3], [1, 2, 3, 10**400], [1, 2, 3, 4]]) == [(1, 2, 3, 4)]


def test_long_texts_are_cut_and_say_so() -> None:
    assert pieces("a" * 50, 40) == [("text", "a" * 40), ("text", " … 10 more characters")]
    assert changes("b", "a " * 5000)[-1] == ("same", "… 8 400 more characters")


def test_one_group_has_no_interval(make_run: Callable[[], Path]) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    for model in metrics["models"].values():
        model["tasks"]["VG"]["ci95"] = None
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    html = build_report(run).read_text(encoding="utf-8")
    assert html.count("one group: no interval") >= 1
    assert '<span class="ci">one group</span>' in html
    assert "60.845" in html
