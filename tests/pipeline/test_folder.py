"""The run folder keeps one run's files, and nobody else's."""

import os

import pytest

from clinkd.config import check
from clinkd.errors import ClinkdError, ConfigError, DataError, SetupError
from clinkd.pipeline.cache_check import check_cache
from clinkd.pipeline.folder import STAGES, RunFolder, fingerprints


def config(tmp_path, **tree):
    return check({"output": str(tmp_path / "run"), **tree})


@pytest.fixture
def folder(tmp_path):
    with RunFolder.open(config(tmp_path)) as opened:
        yield opened


def test_goes_on_in_its_own_folder(tmp_path):
    folder = RunFolder.open(config(tmp_path))
    folder.note("prepare", status="done", summary="x")
    folder.close()
    again = RunFolder.open(config(tmp_path))
    assert again.book()["stages"]["prepare"]["summary"] == "x"
    again.close()


def test_refuses_a_folder_of_another_config(tmp_path):
    with RunFolder.open(config(tmp_path)) as folder:
        folder.note("prepare", status="done")
    with pytest.raises(ConfigError, match=r"different: distill\.epochs, seed\. Choose another"):
        RunFolder.open(config(tmp_path, seed=1, distill={"epochs": 9}))
    RunFolder.open(config(tmp_path, seed=1), update=True).close()
    RunFolder.open(config(tmp_path)).close()  # nothing was done with that one
    with RunFolder.open(config(tmp_path, seed=1), update=True) as folder:
        folder.write_config()
    RunFolder.open(config(tmp_path, seed=1)).close()  # it is the folder's own now


ENDPOINT = {"kind": "endpoint", "url": "http://localhost/v1", "model": "m"}


@pytest.mark.parametrize(
    ("status", "tree", "accepted"),
    [
        ({"prepare": "running"}, {"seed": 1}, True),  # stopped: nothing was done with it
        ({"prepare": "done"}, {"distill": {"epochs": 9}}, True),
        ({"prepare": "done"}, {"seed": 1}, False),
        ({"prepare": "done", "teacher": "running"}, {"teacher": {"epochs": 9}}, False),
        ({"correct": "running"}, {"correct": {"corrector": ENDPOINT | {"dry_run": True}}}, True),
        ({"correct": "running"}, {"correct": {"corrector": ENDPOINT | {"max_calls": 3}}}, False),
        ({"evaluate": "done"}, {"evaluate": {"protocol": "strict"}}, True),
        ({"correct": "done"}, {"log": {"wandb": "mine"}}, True),
    ],
)
def test_only_what_was_done_otherwise_is_held_against_a_config(tmp_path, status, tree, accepted):
    first = {"correct": {"corrector": ENDPOINT}} if "correct" in status else {}
    with RunFolder.open(config(tmp_path, **first)) as folder:
        for stage, each in status.items():
            folder.note(stage, status=each)
    if accepted:
        RunFolder.open(config(tmp_path, **{**first, **tree})).close()
        return
    with pytest.raises(ConfigError, match="belongs to another configuration"):
        RunFolder.open(config(tmp_path, **{**first, **tree}))


def test_a_config_of_another_version_is_another(tmp_path):
    with RunFolder.open(config(tmp_path)) as folder:
        path = folder.path / "config.yaml"
        path.write_text("colour: blue\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    RunFolder.open(config(tmp_path)).close()
    with RunFolder.open(config(tmp_path)) as folder:
        folder.note("prepare", status="done")
    with pytest.raises(ConfigError, match="different: colour"):
        RunFolder.open(config(tmp_path))


def test_refuses_a_folder_with_other_things_in_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        RunFolder.open(config(tmp_path))
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_one_process_at_a_time(tmp_path):
    first = RunFolder.open(config(tmp_path))
    with pytest.raises(SetupError, match="another process"):
        RunFolder.open(config(tmp_path))
    first.close()
    RunFolder.open(config(tmp_path)).close()


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"cannot be used.*choose another"):
        RunFolder.open(check({"output": str(tmp_path / "file" / "run")}))
    assert os.listdir(tmp_path) == ["file"]


def test_damaged_book(folder):
    (folder.path / "run.json").write_text('{"stages": {')
    with pytest.raises(DataError, match="damaged"):
        folder.book()


def test_require_names_the_command(folder):
    with pytest.raises(ClinkdError, match="clinkd teacher CONFIG"):
        folder.require("teacher", "mark")
    folder.note("teacher", status="running", fingerprint="mark")
    with pytest.raises(ClinkdError):
        folder.require("teacher", "mark")
    folder.note("teacher", status="done")
    folder.require("teacher", "mark")
    with pytest.raises(ClinkdError, match=r"other settings.*--from teacher --update"):
        folder.require("teacher", "another mark")


def test_clear_removes_the_stage_alone(folder):
    for name in ("student/base", "student/distilled", "student/round-1", "correction/round-1"):
        (folder.path / name).mkdir(parents=True)
    folder.clear("correct")
    left = sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_dir())
    assert left == ["student", "student/base", "student/distilled"]


@pytest.mark.parametrize(
    ("tree", "first_changed"),
    [
        ({"seed": 1}, "prepare"),
        ({"model": {"positions": {"preset": "gap2"}}}, "prepare"),
        ({"teacher": {"epochs": 7}}, "teacher"),
        ({"generate": {"max_new_tokens": 33}}, "correct"),
        ({"distill": {"pseudo_labels": "both"}}, "pseudo-label"),
        ({"distill": {"kd_weight": 0.1}}, "distill"),
        ({"correct": {"threshold": 0.7}}, "correct"),
        ({"generate": {"num_beams": 4}}, "generate"),
        ({"generate": {"scorer": "hf-hub:other/clip"}}, "generate"),
        ({"generate": {"scorer_steps": 7}}, "generate"),
        ({"evaluate": {"protocol": "strict"}}, "evaluate"),
    ],
)
def test_a_change_concerns_its_stage_and_those_after_it(tree, first_changed):
    inputs = {"train": "a", "test": "b"}
    before, after = fingerprints(check({}), inputs), fingerprints(check(tree), inputs)
    changed = [stage for stage in STAGES if before[stage] != after[stage]]
    assert changed == list(STAGES[STAGES.index(first_changed) :])


def test_how_calls_go_concerns_nothing_that_is_done():
    """A slower pace after a server's refusal, or the end of a dry run, takes no round away."""
    inputs = {"train": "a", "test": "b"}
    endpoint = {"kind": "endpoint", "url": "http://localhost/v1", "model": "m"}

    def marks(**more):
        return fingerprints(check({"correct": {"corrector": endpoint | more}}), inputs)

    pace = {"concurrency": 1, "requests_per_minute": 6, "tokens_per_minute": 9, "max_failures": 1}
    assert marks(**pace, key_env="KEY", dry_run=True) == marks()
    assert marks(model="other")["correct"] != marks()["correct"]
    assert marks(max_calls=3)["correct"] != marks()["correct"]


def test_other_input_files_concern_everything():
    one, two = ({"train": name, "test": "b"} for name in "ac")
    assert fingerprints(check({}), one)["prepare"] != fingerprints(check({}), two)["prepare"]


def test_a_cache_that_no_stage_has_filled_is_not_checked(tmp_path):
    with RunFolder.open(config(tmp_path, distill={"teacher_cache": "top-k"})) as folder:
        folder.note("teacher", status="done")
    with pytest.raises(ClinkdError, match=r"'pseudo-label' is not done in .*clinkd pseudo-label"):
        check_cache(tmp_path / "run", 1)
