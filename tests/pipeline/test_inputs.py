"""Data are known by what they are: not by where they lie, by the clock, or by their names alone."""

import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from clinkd.config import check, load
from clinkd.data.records import Record, Turn, read_records, write_records
from clinkd.errors import ConfigError, Preempted
from clinkd.pipeline import inputs, runner, stages
from clinkd.pipeline.folder import STAGES
from clinkd.pipeline.paths import SAMPLE_FOLDER, with_whole_paths
from clinkd.progress import Console

TURNS = (Turn("human", "Which organ?"), Turn("gpt", "Liver."))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run over data of one's own; returns the stages that were not skipped."""
    done = []
    for name in STAGES:
        monkeypatch.setitem(stages.RUN, name, lambda *_, name=name: done.append(name) or name)
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for n, split in enumerate(("train", "test")):
        names = [f"images/{split}{i}.bmp" for i in range(2)]
        for i, name in enumerate(names):
            Image.new("L", (64, 48), 10 * n + i).save(data / name)
        records = [Record(name, (name,), "ct", "ROC", name, TURNS) for name in names]
        write_records(data / f"{split}.jsonl", records)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "output: run\ndata: {train: data/train.jsonl, test: data/test.jsonl}\n"
    )

    def start(config="c.yaml", *overrides, update=False):
        done.clear()
        start.said = io.StringIO()
        runner.run(load(config, overrides), Console(start.said), update=update)
        return list(done)

    return start


def repaint(path, grey=200):
    """Another picture under the same name, in as many bytes."""
    size = os.path.getsize(path)
    Image.new("L", (64, 48), grey).save(path)
    assert os.path.getsize(path) == size


def test_an_image_that_changed_under_its_name_is_noticed(start):
    assert start() == list(STAGES)
    assert start() == []
    repaint("data/images/train1.bmp")
    for _ in range(2):  # and stays so
        with pytest.raises(ConfigError, match=r"'prepare' .* from other data.*--update"):
            start()
        assert "changed since the last start: image images/train1.bmp\n" in start.said.getvalue()
    assert start(update=True) == list(STAGES)
    assert start() == []


def test_an_image_of_the_test_split_concerns_the_answers_alone(start):
    start()
    repaint("data/images/test0.bmp")
    assert start("c.yaml", update=True) == ["generate", "evaluate", "report"]


def test_a_folder_that_was_copied_or_moved_is_the_same(start, tmp_path, monkeypatch):
    start()
    shutil.copytree("data", "copy", copy_function=shutil.copyfile)  # its files are of now
    shutil.rmtree("data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = [f"data.{split}={tmp_path}/copy/{split}.jsonl" for split in ("train", "test")]
    config = tmp_path / "run" / "config.yaml"
    assert start(config, f"output={config.parent}", *moved) == []
    assert "changed since" not in start.said.getvalue()
    assert start(config, f"output={config.parent}") == []


def test_a_run_goes_on_from_any_folder(start, tmp_path, monkeypatch):
    start()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = tmp_path / "run" / "config.yaml"
    assert start(config, f"output={config.parent}") == []
    assert load(config).data.train == str(tmp_path / "data" / "train.jsonl")


def test_only_files_of_another_size_or_time_are_read(start, monkeypatch):
    start()
    read = []
    whole = inputs.sha256_file
    monkeypatch.setattr(inputs, "sha256_file", lambda path: read.append(str(path)) or whole(path))
    assert start() == []
    assert [Path(path).name for path in read] == ["train.jsonl", "test.jsonl"]
    os.utime("data/images/test1.bmp", (time.time(), 1))
    assert start() == []
    assert Path(read[-1]).name == "test1.bmp"


def test_images_that_are_not_there_are_not_others(start):
    start()
    shutil.rmtree("data/images")
    assert start() == []
    (Path("run") / inputs.TABLE).write_text('{"files": 1}')
    with pytest.raises(ConfigError, match="from other data"):
        start()


@pytest.mark.parametrize(
    "damage",
    [
        {"files": {"images/test1.bmp": 3}},
        {"files": {"images/test1.bmp": []}},
        {"train": []},
        {"test": {"names": None}},
        {"test": {"names": [2]}},
    ],
)
def test_a_damaged_table_is_made_anew(start, damage):
    start()
    table = Path("run") / inputs.TABLE
    whole = table.read_text()
    damaged = json.loads(whole)
    for name, value in damage.items():
        damaged[name] = damaged[name] | value if isinstance(value, dict) else value
    table.write_text(json.dumps(damaged))
    assert start() == []
    assert table.read_text() == whole


def test_what_else_is_a_path_becomes_whole_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "clip", "demo", "sample"):
        Path(name).mkdir()
    tree = {
        "model": {"student": "model", "teacher": "Qwen/Qwen2-VL-2B-Instruct"},
        "generate": {"scorer": "local-dir:clip"},
    }
    found = with_whole_paths(check(tree))
    assert found.model.student == str(tmp_path / "model")
    assert found.model.teacher == "Qwen/Qwen2-VL-2B-Instruct"
    assert found.generate.scorer == f"local-dir:{tmp_path / 'clip'}"
    assert found.output == "run"
    assert with_whole_paths(check({})) == check({})


def test_another_root_is_read_whatever_the_times_of_its_files(start):
    shutil.copytree("data", "other")
    repaint("other/images/train0.bmp")
    for path in (*Path("data/images").iterdir(), *Path("other/images").iterdir()):
        os.utime(path, (1, 1))  # as archives and images of containers have them
    start()
    with pytest.raises(ConfigError, match="from other data"):
        start("c.yaml", "data.root=other")


def test_images_of_a_sample_under_another_root_count(start):
    image = Path("data", read_records(SAMPLE_FOLDER / "test.jsonl")[0].images[0])
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(b"one")
    start("c.yaml", "data.test=sample")
    image.write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"'generate' .* from other data"):
        start("c.yaml", "data.test=sample")


def test_a_signal_does_not_wait_for_all_images(start, monkeypatch):
    names = [f"images/{i}.bmp" for i in range(2 * inputs.READERS * inputs._AT_ONCE)]
    for name in names:
        os.link("data/images/train0.bmp", f"data/{name}")
    write_records("data/train.jsonl", [Record(n, (n,), "ct", "ROC", n, TURNS) for n in names])
    read = []
    ready = threading.Event()

    def slow(path):
        if str(path).endswith(".bmp"):
            read.append(path)
            ready.wait(0.02)
        return "0"

    monkeypatch.setattr(inputs, "sha256_file", slow)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Preempted):
        start()
    assert len(read) < inputs.READERS * inputs._AT_ONCE / 2


@pytest.mark.parametrize("already", [False, True])
def test_a_reading_that_is_cut_off_goes_on(start, monkeypatch, already):
    """Nobody looks twice at an image; one that changed before the cut is still told of after."""
    monkeypatch.setattr(inputs, "READERS", 1)
    monkeypatch.setattr(inputs, "_AT_ONCE", 1)
    if already:
        start()
        repaint("data/images/train0.bmp")
        for split in ("train", "test"):
            os.utime(f"data/images/{split}1.bmp", (1, 1))
    whole = inputs.sha256_file
    read = []

    def note(path):
        read.append(Path(path).name)
        return whole(path)

    def cut(path):
        if Path(path).name in (("test1.bmp",) if already else ("test0.bmp", "test1.bmp")):
            raise KeyboardInterrupt
        return note(path)

    monkeypatch.setattr(inputs, "sha256_file", cut)
    with pytest.raises(KeyboardInterrupt):
        start()
    monkeypatch.setattr(inputs, "sha256_file", note)
    if already:
        with pytest.raises(ConfigError, match="from other data"):
            start()
        assert "changed since the last start: image images/train0.bmp\n" in start.said.getvalue()
    else:
        assert start() == list(STAGES)
        pictures = sorted(name for name in read if name.endswith(".bmp"))
        assert pictures == ["test0.bmp", "test1.bmp", "train0.bmp", "train1.bmp"]


def test_a_file_that_the_run_makes_and_a_model_that_went_are_no_other_settings(start):
    Path("model").mkdir()
    corrector = ["kind=local", "model=model", "cache=replies/all.jsonl"]
    given = ["model.teacher=model", *(f"correct.corrector.{each}" for each in corrector)]
    start("c.yaml", *given)
    Path("replies").mkdir()
    Path("replies/all.jsonl").touch()
    Path("model").rmdir()
    for name in ("minilm", "token_f1"):  # what these mean is no matter of folders
        Path(name).mkdir()
    assert start("c.yaml", *given) == []


def test_a_way_up_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "far" / "folder").mkdir(parents=True)
    (tmp_path / "far" / "train.jsonl").touch()
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "link").symlink_to("far/folder")
    monkeypatch.chdir(tmp_path)
    found = with_whole_paths(check({"data": {"train": "link/../train.jsonl"}}))
    assert found.data.train == str((tmp_path / "far" / "train.jsonl").resolve())
