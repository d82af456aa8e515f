"""Checkpoints are whole, or known not to be; which are kept."""

import json
import shutil

import pytest

from clinkd.errors import SetupError
from clinkd.train.checkpoint import _prune
from clinkd.train.manifest import (
    LATEST,
    MANIFEST,
    checkpoints,
    fault_of,
    latest_whole,
    publish,
    require_same_run,
    seal,
)

MADE_BY = {"processes": 2, "strategy": "zero2"}


def save(root, step, content=b"weights"):
    staged = root / ".staging" / f"checkpoint-{step}"
    (staged / "global_step").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(content)
    (staged / "global_step" / "rank0.pt").write_bytes(b"optimiser")
    seal(staged, MADE_BY)
    publish(staged, root / staged.name)
    return root / staged.name


def test_sealed_and_published(tmp_path):
    assert latest_whole(tmp_path) == (None, [])
    folder = save(tmp_path, 2)
    assert fault_of(folder) is None
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(files) == {"model.safetensors", "global_step/rank0.pt"}
    assert (tmp_path / LATEST).read_text() == "checkpoint-2\n"
    save(tmp_path, 10)
    assert latest_whole(tmp_path) == (tmp_path / "checkpoint-10", [])


def test_copies_put_aside_are_no_checkpoints(tmp_path):
    folder = save(tmp_path, 10)
    for name in ("checkpoint-10-backup", "checkpoint-old-10", "checkpoint-99 (copy)"):
        shutil.copytree(folder, tmp_path / name)
    assert latest_whole(tmp_path) == (folder, [])
    assert checkpoints(tmp_path) == {10: folder}
    save(tmp_path, 20)
    _prune(tmp_path, 1, None)
    assert sorted(path.name for path in tmp_path.glob("c*")) == [
        "checkpoint-10-backup", "checkpoint-20", "checkpoint-99 (copy)", "checkpoint-old-10",
    ]  # fmt: skip


DAMAGES = {
    "cut": (lambda f: (f / "model.safetensors").write_bytes(b"wei"), "has 3 bytes, not 7"),
    "flipped": (lambda f: (f / "model.safetensors").write_bytes(b"weighty"), "checksum of model"),
    "lost": (lambda f: (f / "global_step" / "rank0.pt").unlink(), "rank0.pt is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "it has no manifest.json"),
    "no json": (lambda f: (f / MANIFEST).write_text("{"), "manifest.json cannot be read"),
    "not ours": (lambda f: (f / MANIFEST).write_text("[1]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, damage, reason):
    before, last = save(tmp_path, 2), save(tmp_path, 4)
    damage(last)
    assert reason in fault_of(last)
    found, problems = latest_whole(tmp_path)
    assert found == before
    assert len(problems) == 1
    assert reason in problems[0]
    damage(before)
    with pytest.raises(SetupError, match="no other checkpoint is whole: delete"):
        latest_whole(tmp_path)


def test_a_crash_between_the_rename_and_latest(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 4)
    (tmp_path / LATEST).write_text("checkpoint-2\n")
    assert latest_whole(tmp_path)[0] == tmp_path / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert latest_whole(tmp_path)[0] == tmp_path / "checkpoint-4"
    (tmp_path / LATEST).unlink()
    assert latest_whole(tmp_path)[0] == tmp_path / "checkpoint-4"


@pytest.mark.parametrize(("name", "value"), [("processes", 1), ("strategy", "ddp")])
def test_another_way_of_training_is_refused(tmp_path, name, value):
    folder = save(tmp_path, 2)
    require_same_run(folder, MADE_BY)
    with pytest.raises(SetupError, match=f"made with parallel.{name}={MADE_BY[name]}, this run"):
        require_same_run(folder, MADE_BY | {name: value})


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(None, None, [2, 4, 6, 8]), (2, None, [6, 8]), (1, 4, [4, 8]), (2, 8, [6, 8])],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep, best, left):
    for step in (8, 2, 6, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    _prune(tmp_path, keep, best)
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}
