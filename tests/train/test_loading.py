"""Images decoded by other processes: the same training, the same errors, the same stops."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from clinkd.config import DemoModelConfig, DistillConfig
from clinkd.data import collate, teacher_cache
from clinkd.data.records import read_records
from clinkd.errors import DataError, SetupError
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.rotary import PositionConfig
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
SIZE = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32, vocabulary=500)
SETTINGS = DistillConfig(
    epochs=2, learning_rate=1e-2, batch_size=3, gradient_accumulation=2, save_steps=2, log_steps=1
)
CONFIG = """\
data: {train_limit: 40, test_limit: 4, teacher_fraction: 1.0}
model:
  positions: {preset: paper}
  max_pixels: 12544
  demo: {layers: 1, width: 64, vision_layers: 1, vision_width: 32, vocabulary: 500}
teacher: {epochs: 9999, log_steps: 1, batch_size: 2, save_steps: 100000}
parallel: {dataloader_workers: 2}
"""


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:20]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, SIZE.vocabulary, 3136, 56 * 56)


@pytest.fixture
def learn(records, processor, tmp_path):
    def learn(workers):
        folder = tmp_path / str(workers)
        log = MetricsLog(folder / "log.jsonl")
        job = Job("distill", folder / "model", log, records, SAMPLE_FOLDER, 0)
        job = replace(job, dataloader_workers=workers)
        folder.mkdir()
        student, teacher = (
            apply(build_model(processor, SIZE, seed), PositionConfig("paper")) for seed in (0, 1)
        )
        train(job, student, processor, SETTINGS, teacher)
        return student.state_dict(), (folder / "log.jsonl").read_text()

    return learn


def test_the_same_training(learn, monkeypatch, tmp_path):
    real, decoded = collate.load_image, tmp_path / "decoded"

    def load(root, name):
        with decoded.open("a") as file:
            file.write(f"{os.getpid()} {name}\n")
        return real(root, name)

    monkeypatch.setattr(collate, "load_image", load)
    here, log = learn(0)
    alone = decoded.read_text().split("\n")
    decoded.unlink()
    there, same_log = learn(2)
    assert log == same_log
    for name in here:
        assert torch.equal(here[name], there[name]), name
    lines = decoded.read_text().split()
    assert len({*lines[::2]} - {str(os.getpid())}) == 2
    assert len(lines) / 2 <= 2 * len(alone)  # those of the second epoch are at hand


def test_a_fault_reads_as_one_here(learn, records, monkeypatch):
    parent, real, named = os.getpid(), collate.load_image, records[7].images[0]

    def load(root, name):
        if os.getpid() != parent and name == named:
            raise DataError(f"{name}: damaged: x.DataError: so it is")
        return real(root, name)

    monkeypatch.setattr(collate, "load_image", load)
    with pytest.raises(DataError) as found:
        learn(1)
    assert str(found.value) == f"{named}: damaged: x.DataError: so it is"
    monkeypatch.setattr(collate, "load_image", lambda *_: os._exit(1))
    with pytest.raises(SetupError, match=r"DataLoader worker.*parallel\.dataloader_workers=0"):
        learn(2)


def test_a_shard_is_checked_once_for_all(tmp_path, monkeypatch):
    spec = teacher_cache.CacheSpec("hidden", 2, 4, {}, "float32", 1.0)
    cache = teacher_cache.TeacherCache(tmp_path, spec)
    labels = [torch.tensor([1]), torch.tensor([2, 3])]
    cache.write(0, {"hidden": torch.ones(3, 4)}, labels)
    read, whole = tmp_path / "read", teacher_cache.sha256_file

    def note(path):
        with read.open("a") as file:
            file.write(f"{path}\n")
        return whole(path)

    monkeypatch.setattr(teacher_cache, "sha256_file", note)
    for _ in range(3):  # each opens the file anew, as workers do
        child = os.fork()
        if child == 0:
            found = cache.read(1, labels[1])["hidden"]
            os._exit(0 if torch.equal(found, torch.ones(2, 4)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(read.read_text().splitlines()) == 1


@pytest.fixture
def program(tmp_path):
    """A run that trains until it is stopped, in a group of processes of its own."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "clinkd", "run", "c.yaml", "--to", "teacher"]
    command.append("generate.scorer_steps=1")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log = tmp_path / "run" / "metrics.jsonl"
    started = []

    def steps():
        return log.read_text().count('"stage": "teacher"') if log.exists() else 0

    def start():
        with (tmp_path / "said").open("w") as said:
            running = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=said, stderr=said,
                start_new_session=True,
                # a shell has its jobs in the background ignore it
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        started.append(running)
        before, end = steps(), time.monotonic() + 120
        while steps() < before + 3:
            assert running.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        return running

    yield start, tmp_path
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_ctrl_c_saves_and_stops(program):
    start, folder = program
    running = start()
    os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it
    assert running.wait(60) == 130
    state = next((folder / "run").rglob("trainer_state.json"))
    assert json.loads(state.read_text())["global_step"] >= 3


@pytest.mark.slow
def test_a_killed_process_leaves_its_folder(program):
    start, folder = program
    running = start()
    running.kill()
    running.wait()
    start().kill()  # at once, though the others look for their parent every few seconds
    assert "another process" not in (folder / "said").read_text()
