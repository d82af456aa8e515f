"""What a kill left behind is not mixed into what is done again."""

import json

import pytest

from clinkd.config import check
from clinkd.errors import ConfigError
from clinkd.pipeline import ablation
from clinkd.pipeline.ablation import ablate, cell_labels, summarise
from clinkd.pipeline.folder import OWNED, STAGES, RunFolder
from clinkd.progress import Console


def test_journals_of_unfinished_answers_go_with_their_stage(tmp_path):
    with RunFolder.open(check({"output": str(tmp_path / "run")})) as folder:
        for name in (
            ".predictions.jsonl.journal",
            ".predictions.jsonl.journal-0-of-2",
            "predictions/.base.jsonl.journal",
        ):
            path = folder.path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("header\n", encoding="utf-8")
        folder.clear("correct")
        assert len(list(folder.path.rglob(".*.journal*"))) == 3
        folder.clear("generate")
        assert list(folder.path.rglob(".*.journal*")) == []


LOG = [
    {"stage": "clip", "step": 1},
    {"stage": "teacher", "step": 1},
    {"stage": "distill", "step": 1},
    {"stage": "correct-1", "step": 1},
    {"stage": "correct-2", "step": 1},
]


@pytest.fixture
def source(tmp_path):
    """A run folder whose stages are done, with the log of its training."""
    with RunFolder.open(check({"output": str(tmp_path / "source")})) as folder:
        for stage in STAGES:
            for pattern in OWNED[stage]:
                path = folder.path / pattern.replace("*", "1")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(stage, encoding="utf-8")
            folder.note(stage, status="done", fingerprint=stage)
        lines = "".join(json.dumps(row) + "\n" for row in LOG)
        (folder.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder.path


@pytest.mark.parametrize("killed_at", ["prepare", "teacher", "distill", "correct"])
def test_a_log_is_taken_along_once(source, tmp_path, monkeypatch, killed_at):
    marks = {stage: stage for stage in STAGES}
    note = RunFolder.note

    def killed(self, stage, **facts):
        if stage == killed_at:
            raise KeyboardInterrupt
        note(self, stage, **facts)

    with RunFolder.open(check({"output": str(tmp_path / "run")})) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "note", killed)
            with pytest.raises(KeyboardInterrupt):
                ablation._share(folder, marks, [source])
        with open(folder.path / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write('{"stage": "dist')  # half a line
        ablation._share(folder, marks, [source])
        text = (folder.path / "metrics.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == LOG


CONFIG = check({"model": {"positions": {"preset": "paper"}}, "generate": {"selection": "clip"}})


def test_a_seed_below_0_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"different numbers from 0 on, .* got \[0, -1\]"):
        ablate(CONFIG, Console(quiet=True), tmp_path, [0, -1])


def test_cells_are_named_after_their_selection():
    assert (cell_labels()["sasg"], cell_labels()["all"]) == ("+ SASG", "All four")
    labels = cell_labels("oracle")
    assert labels["sasg"] == "+ oracle (looks at the truth)"
    assert labels["all"] == "All four, with oracle (looks at the truth)"
    scores = {cell: {0: {"tasks": {}, "average": 1.0}} for cell in labels}
    cells = summarise(scores, "oracle")["cells"]
    assert {name: cell["label"] for name, cell in cells.items()} == labels
