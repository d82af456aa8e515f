"""What is done is kept while it holds, and never mixed with what was made from something else."""

import io
import json
import shutil

import pytest

from clinkd.config import check
from clinkd.errors import ClinkdError, ConfigError
from clinkd.pipeline import folder, runner, stages
from clinkd.pipeline.folder import OWNED, STAGES, RunFolder
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.progress import Console


@pytest.fixture
def calls(monkeypatch):
    """Stages that write a file each in place of their work; the list of what was done."""
    done = []

    def stage(name):
        def work(folder, progress):
            done.append(name)
            for pattern in OWNED[name]:
                path = folder.path / pattern.replace("*", "1")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(name, encoding="utf-8")
            return name

        return work

    for name in STAGES:
        monkeypatch.setitem(stages.RUN, name, stage(name))
    return done


@pytest.fixture
def run(tmp_path, calls):
    """Runs stages over data of one's own; returns those that were not skipped."""
    for split in ("train", "test"):
        shutil.copy(SAMPLE_FOLDER / f"{split}.jsonl", tmp_path)

    def start(first="prepare", last="report", update=False, **settings):
        calls.clear()
        data = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
        config = check({"output": str(tmp_path / "run"), "data": data, **settings})
        runner.run(config, Console(io.StringIO()), first=first, last=last, update=update)
        return list(calls)

    return start


def shorten(path):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")


LEARNS = list(STAGES[: STAGES.index("generate")])
ANSWERS = list(STAGES[STAGES.index("generate") :])


def test_another_test_split_is_answered_by_the_models_there_are(run, tmp_path):
    assert run() == LEARNS + ANSWERS
    assert run() == []
    shorten(tmp_path / "test.jsonl")
    with pytest.raises(ConfigError, match=r"'generate' .* other data.*give --update"):
        run()
    assert (tmp_path / "run" / "predictions.jsonl").exists()
    assert run(update=True) == ANSWERS


def test_another_training_split_removes_nothing_unasked(run, tmp_path):
    run()
    shorten(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"'prepare' .* other data.*give --update"):
        run()
    assert (tmp_path / "run" / "student" / "distilled").exists()
    assert run(update=True) == LEARNS + ANSWERS


def test_a_single_stage_does_not_build_on_what_is_out_of_date(run, tmp_path):
    run()
    with pytest.raises(ClinkdError, match=r"'distill' .* other settings.*--from distill --update"):
        run("generate", "generate", update=True, distill={"learning_rate": 0.01})
    shorten(tmp_path / "train.jsonl")
    with pytest.raises(ClinkdError, match=r"'prepare' .* from other data"):
        run("report", "report", update=True)


def test_another_version_counts_again_what_costs_nothing(run, tmp_path, monkeypatch):
    run()
    monkeypatch.setattr(folder, "__version__", "9.9.9")
    assert run() == ["evaluate", "report"]


def test_a_stage_that_is_refused_leaves_the_folder_as_it_was(run):
    run()
    with pytest.raises(ClinkdError, match=r"'distill' .* other settings"):
        run("generate", update=True, distill={"learning_rate": 0.01})
    assert run() == []


def test_a_kill_while_old_results_are_removed(run, tmp_path, monkeypatch):
    run()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "clear", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            run(update=True, distill={"learning_rate": 0.01})
    assert run(update=True) == ["distill", "correct", *ANSWERS]


def test_what_follows_a_stage_that_is_done_again_is_not_done(run, tmp_path):
    """Even back at the settings that it was done with: what it was made from is gone."""
    run()
    other = {"distill": {"learning_rate": 0.01}}
    assert run(last="distill", update=True, **other) == ["distill"]
    with pytest.raises(ClinkdError, match=r"'correct' is not done"):
        run("report", "report", **other)
    book = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert list(book["stages"]) == ["prepare", "teacher", "pseudo-label", "distill"]
    assert run(update=True) == ["distill", "correct", *ANSWERS]


@pytest.mark.parametrize("seen", [True, False])
def test_a_test_split_is_looked_at_once(tmp_path, monkeypatch, seen):
    """By `prepare`; by `generate` only where it is another one by then."""
    settings = {"data": {"test_limit": 5}, "generate": {"selection": "beam"}}
    config = check({"output": str(tmp_path / "run"), **settings})
    looked = []
    monkeypatch.setattr(stages, "require_sound", lambda *_: looked.append("sound"))
    monkeypatch.setattr(stages, "require_places", lambda *_: looked.append("places"))
    monkeypatch.setattr(stages, "load_processor", lambda *_: None)

    def answer(folder, task, progress):
        with open(task.output, "w", encoding="utf-8") as file:
            file.write('{"error": null}\n{"error": "no"}\n')

    monkeypatch.setattr(stages, "run_task", answer)
    with RunFolder.open(config) as opened:
        (opened.path / "predictions").mkdir()
        shutil.copytree(SAMPLE_FOLDER, opened.path / "data", ignore=shutil.ignore_patterns("te*"))
        mark = stages._test_split(config) if seen else ["another", 5]
        opened.note("prepare", test=mark)
        summary = stages.generate_answers(opened, lambda *_: None)
        assert summary.startswith("2 answers (1 failed), beams")
        assert len(opened.data("test").read_text(encoding="utf-8").splitlines()) == 5
    assert looked == ([] if seen else ["sound", "places"])
