"""The page's content: numbers, escaping, self-containment, runs that are not whole."""

import base64
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clinkd.errors import DataError, SetupError
from clinkd.report import build_report

HOSTILE = "\"'><script>window.hit=1</script><b onload=x>&amp;"
MOST_BYTES = 6 << 20
RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"


class Elements(HTMLParser):
    """All tags with their attributes, and the text outside style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._code = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._code = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._code = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._code else data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    return " ".join(Elements(page).text.split())


def test_numbers_are_those_of_the_metrics(run: Path) -> None:
    text = words_of(page_of(run))
    assert "Corrected + CLIP selection: 60.5" in text  # the average of the last model
    assert "+54.4 on its base, +21.7 on its teacher" in text
    assert "Mean box 37.7 34.3–41.6" in text
    assert "52.5–59.8" in text  # the interval of VG
    assert "On VG it does not beat the mean box of the same structure." in text
    assert "microscopy 57 questions" in text
    assert "seed 7" in text
    assert "distill 3 min 10 s peak 1 470 MiB" in text
    assert "One rule differs from another." in text


def test_an_average_of_fewer_tasks_does_not_stand_beside_the_others(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    metrics["baselines"]["mean_box"]["average"] = 77.7
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = words_of(page_of(run))
    assert "77.7" not in text
    assert "Mean box 37.7 34.3–41.6 – – – –" in text


def test_the_papers_figures_stand_beside_the_runs(run: Path) -> None:
    words = words_of(page_of(run))
    assert "Models by task, beside the paper" in words
    assert "ClinKD (paper, as printed) 67.51 82.35 70.56 65.69 71.53" in words
    assert "ClinKD (paper, recomputed) 67.65 82.35 70.56 65.30 71.46" in words
    assert "Ablation" not in words


def test_a_cell_of_an_ablation_shows_the_grid(run: Path, tmp_path: Path) -> None:
    cell = tmp_path / "grid" / "seed-0" / "all"
    shutil.copytree(run, cell)
    grid = tmp_path / "grid" / "ablation.json"
    shutil.copy(RESULTS / "ablation-demo.json", grid)
    words = words_of(page_of(cell))
    assert "Ablation: mean ± sd over 3 seeds, beside the paper" in words
    assert "BiRD (paper)" in words
    base = json.loads(grid.read_text())["cells"]["base"]["scores"]["Average"]
    assert f"{base['mean']:.2f} ± {base['sd']:.2f}" in words
    for damaged in ("[]", '{"cells": {}}', '{"cells": {"base": 3}}', "{"):
        grid.write_text(damaged)
        assert "Ablation" not in words_of(page_of(cell))


def test_selection_is_told_in_the_metrics_own_figures(run: Path) -> None:
    text = words_of(page_of(run))
    # 207 have a score; how many of them had candidates to choose from is another number
    assert "VG Recall@0.5, 207 questions first beam 40.0 chosen 42.5 +2.5" in text
    assert "best of all 61.0 +18.5 left" in text


def test_gallery_holds_every_task_modality_and_verdict(run: Path) -> None:
    shots = [a for a in Elements(page_of(run)).named("article") if "shot" in str(a.get("class"))]
    assert {a["data-task"] for a in shots} == {"VG", "ROC", "RC", "MIA"}
    assert len({a["data-modality"] for a in shots}) == 6
    for task in ("VG", "ROC", "RC", "MIA"):
        verdicts = {a["data-verdict"] for a in shots if a["data-task"] == task}
        assert {"right", "wrong"} <= verdicts, task


def test_candidates_carry_their_scores_and_the_chosen_one_is_marked(run: Path) -> None:
    page = page_of(run)
    text = words_of(page)
    assert "CLIP 0.305" in text
    assert "beam -0.340" in text
    cards = page.count('class="card shot"')
    assert text.count("★ chosen") == cards
    assert page.count('class="predicted"') == cards // 4  # only grounding answers hold a box here


def test_nothing_is_fetched(run: Path) -> None:
    elements = Elements(page_of(run))
    for tag, attributes in elements.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert str(value).startswith(("data:", "#")), (tag, name, value)
            assert name != "style"  # the policy would refuse it
            assert not name.startswith("on")
    style = (Path(build_report.__code__.co_filename).parent / "templates/report.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_policy_allows_exactly_this_style_and_script(run: Path) -> None:
    page = page_of(run)
    policies = [
        str(a["content"]) for a in Elements(page).named("meta")
        if a.get("http-equiv") == "Content-Security-Policy"
    ]  # fmt: skip
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "unsafe" not in policies[0]
    for name in ("style", "script"):
        bodies = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        assert len(bodies) == 1
        digest = base64.b64encode(hashlib.sha256(bodies[0].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policies[0]


def test_hostile_strings_stay_text(run: Path) -> None:
    """In every place that comes from a file: not one element or attribute more than before."""
    before = Elements(page_of(run))
    for path in [*run.rglob("*.jsonl"), run / "metrics.json", run / "run.json"]:
        lines = path.read_text(encoding="utf-8")
        keep = ("task", "stage", "image", "verdict", "selection_", "status")
        chunks = [lines] if path.suffix == ".json" else lines.splitlines()
        spoiled = [json.dumps(spoil(json.loads(chunk), keep)) for chunk in chunks]
        path.write_text("\n".join(spoiled) + "\n", encoding="utf-8")
    page = page_of(run)
    after = Elements(page)

    assert HOSTILE in after.text
    assert len(after.named("script")) == 1
    assert {tag for tag, _ in after.tags} <= {tag for tag, _ in before.tags}
    names = {name for _, attributes in after.tags for name in attributes}
    assert names <= {name for _, attributes in before.tags for name in attributes}


def spoil(value: object, keep: tuple[str, ...]) -> object:
    """Every string of a JSON value with the attack after it, but under the keys to keep."""
    if isinstance(value, dict):
        return {k: v if k in keep else spoil(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [spoil(item, keep) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert page_of(run) == page_of(run)


def test_writing_it_again_after_its_own_stage_changes_nothing(run: Path) -> None:
    before = page_of(run)
    book = json.loads((run / "run.json").read_text(encoding="utf-8"))
    book["stages"]["report"] = {"status": "done", "seconds": 9.9, "peak_mib": 99_999}
    (run / "run.json").write_text(json.dumps(book), encoding="utf-8")
    assert page_of(run) == before


def test_page_stays_small(run: Path) -> None:
    assert build_report(run).stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("metrics.json", "stage “evaluate” has not run"),
        ("predictions.jsonl", "stage “generate” has not run"),
        ("metrics.jsonl", "metrics.jsonl is missing"),
        ("run.json", "run.json is missing"),
        ("config.yaml", "config.yaml is missing"),
    ],
)
def test_a_missing_file_is_said(run: Path, name: str, told: str) -> None:
    (run / name).unlink()
    text = words_of(page_of(run))
    assert "What is missing from this page" in text
    assert told in text


@pytest.mark.parametrize("name", ["metrics.json", "run.json", "config.yaml"])
@pytest.mark.parametrize(
    "content", ['{"models": {"base": ', "[1, 2]", ": : {", "\x00", "[" * 100_000]
)
def test_a_damaged_file_is_said(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content, encoding="utf-8")
    assert f"{name} is" in words_of(page_of(run))


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("output: run\n", encoding="utf-8")
    text = words_of(page_of(tmp_path))
    assert "A run without scores yet" in text
    assert "predictions.jsonl is missing" in text


def test_an_unfinished_stage_is_said(run: Path) -> None:
    book = json.loads((run / "run.json").read_text(encoding="utf-8"))
    book["stages"]["distill"]["status"] = "running"
    (run / "run.json").write_text(json.dumps(book), encoding="utf-8")
    assert "Stage “distill” is not finished (status: running)." in words_of(page_of(run))


def test_a_line_cut_in_half_is_counted(run: Path) -> None:
    with open(run / "predictions.jsonl", "a", encoding="utf-8") as file:
        file.write("[" * 100_000 + "\n" + '{"id": "cut", "ima')
    assert "predictions.jsonl: 2 damaged lines left out." in words_of(page_of(run))


def test_a_missing_image_is_said_on_its_card(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "images" / "ct.png").unlink()
    text = words_of(page_of(run))
    assert "No picture: image 'images/ct.png' does not exist under the data root" in text
    assert "1 picture could not be read." in text


def test_an_image_path_cannot_leave_the_data_root(run: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "data" / "images" / "ct.png", tmp_path / "secret.png")
    path = run / "predictions.jsonl"
    text = path.read_text(encoding="utf-8").replace("images/ct.png", "../secret.png")
    path.write_text(text, encoding="utf-8")
    assert "lies outside the data root" in words_of(page_of(run))


@pytest.mark.parametrize(
    "odd",
    [
        {"task": "VG"},
        {"task": "RC", "candidates": None, "selected": None, "boxes": None, "image": None},
        {"task": "VG", "candidates": [{}, 3, {"text": None}], "selected": 9, "boxes": [[1, 2]]},
        {"task": "MIA", "error": "out of memory", "response": "", "image": ["images/ct.png"] * 2},
        {"task": ["VG"], "modality": 4},
        {"task": "new"},
    ],
)
def test_odd_lines_do_not_break_the_page(run: Path, odd: dict[str, object]) -> None:
    (run / "predictions.jsonl").write_text(json.dumps(odd) + "\n", encoding="utf-8")
    assert "Scores" in words_of(page_of(run))


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {"base": None}, {"base": {"tasks": {"VG": 1}}}]
)
def test_odd_metrics_do_not_break_the_page(run: Path, value: object) -> None:
    text = json.dumps({"models": value, "baselines": value, "selection": value, "settings": value})
    (run / "metrics.json").write_text(text, encoding="utf-8")
    assert "Settings and versions" in words_of(page_of(run))


@pytest.mark.parametrize("value", [None, 3, True, {"a": 1}])
def test_odd_verdicts_do_not_break_the_page(run: Path, value: object) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    (run / "metrics.json").write_text(json.dumps(metrics | {"verdicts": value}), encoding="utf-8")
    assert "Scores" in words_of(page_of(run))


def test_images_shrink_until_the_page_fits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = build_report(run).stat().st_size
    monkeypatch.setattr("clinkd.report.gallery.MOST_PICTURE_BYTES", 20_000)
    assert build_report(run).stat().st_size < large


def test_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build_report(tmp_path / "nowhere")


def test_a_failed_write_keeps_the_old_page(
    make_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    old = build_report(run).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SetupError, match=r"report\.html cannot be written: no space left"):
        build_report(run)
    monkeypatch.undo()
    assert (run / "report.html").read_bytes() == old
    assert not list(run.glob(".*.tmp"))
