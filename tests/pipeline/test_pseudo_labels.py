"""Pseudo-labels become records; one that nobody could learn from is left out, and said."""

import pytest

from clinkd.config import check
from clinkd.data.files import write_jsonl
from clinkd.data.records import Record, Turn, write_records
from clinkd.models.demo import build_processor
from clinkd.pipeline import steps
from clinkd.pipeline.folder import RunFolder

TURNS = (Turn("human", "What?"), Turn("gpt", "That."), Turn("human", "And?"), Turn("gpt", "This."))


@pytest.fixture
def folder(tmp_path):
    build_processor(["What? That."], 300, 3136, 3136).save_pretrained(tmp_path / "start")
    tree = {
        "model": {"student": str(tmp_path / "start"), "teacher": None},
        "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "train.jsonl")},
        "distill": {"pseudo_labels": "hard", "min_confidence": 0.5, "max_length": 60},
    }
    run = RunFolder(tmp_path / "run", check(tree))
    records = [Record(name, (), "ct", "ROC", name, TURNS) for name in "abcde"]
    for path in (tmp_path / "train.jsonl", run.data("train")):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, records)
    return run


def write_labels(folder, *responses):
    rows = [
        {"id": name, "response": response, "confidence": confidence}
        for name, (response, confidence) in zip("abcde", responses, strict=False)
    ]
    (folder.path / "pseudo").mkdir()
    write_jsonl(folder.path / "pseudo" / "labels.jsonl", rows)


def test_labels_that_fit(folder):
    write_labels(folder, ("A.", 0.9), ("B.", 0.4), (" ", 0.9), ("D.", 0.5))
    *truths, first, second = steps.stage_records(folder, "distill")
    assert [record.id for record in truths] == list("abcde")
    assert [(r.id, r.answer, r.question) for r in (first, second)] == [
        ("a#pseudo", "A.", "And?"),
        ("d#pseudo", "D.", "And?"),
    ]
    assert [turn.value for turn in first.conversations[:3]] == ["What?", "That.", "And?"]


def test_labels_that_do_not(folder):
    write_labels(folder, ("A.", 1), ("word " * 99, 1), ("The <|image_pad|>.", 1))
    with pytest.warns(UserWarning, match=r"'b#pseudo' has \d+ tokens.* \(and 1 more\)"):
        found = steps.stage_records(folder, "distill")
    assert [record.id for record in found[5:]] == ["a#pseudo"]
