"""Pseudo-labels become records; one that nobody could learn from is left out, and said."""

import pytest

from clinkd.config import check
from clinkd.data.files import write_jsonl
from clinkd.data.records import Record, Turn, write_records
from clinkd.errors import DataError
from clinkd.models.demo import build_processor
from clinkd.pipeline import stages, steps
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


def test_soft_labels_are_not_written(folder, monkeypatch):
    """They are the teacher's distributions: a text of them would be read by nobody."""
    asked = []
    monkeypatch.setattr(stages, "run_task", lambda *task: asked.append(task))
    soft = {"distill": {"pseudo_labels": "soft"}}
    said = stages.pseudo_label(RunFolder(folder.path, check(soft)), lambda *_: None)
    assert said.startswith("left out (distill.pseudo_labels = soft")
    assert not asked
    assert not (folder.path / "pseudo").exists()


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


def test_a_cache_for_a_lower_confidence_does_for_a_higher_one(folder):
    write_labels(folder, ("A.", 0.9), ("B.", 0.4), ("C.", 0.6))
    processor = build_processor(["What? That."], 300, 3136, 3136)
    folder.teacher.mkdir(parents=True)
    (folder.teacher / "config.json").write_text('{"text_config": {"hidden_size": 8}}')

    def opened(least):
        both = {"pseudo_labels": "both", "teacher_cache": "hidden", "min_confidence": least}
        distill = folder.config.distill.model_copy(update=both)
        config = folder.config.model_copy(update={"distill": distill})
        run = RunFolder(folder.path, config)
        return steps.open_cache(run, steps.stage_records(run, "distill"), processor)

    assert opened(0.5).spec.records == 7
    more = opened(0.8)
    assert more.spec.records == 7
    assert [*more.places] == [0, 1, 2, 3, 4, 5]
    assert [*opened(0.5).places] == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(DataError, match=r"min_confidence is '0\.5', needed '0\.3'"):
        opened(0.3)
