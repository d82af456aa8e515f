"""Weights & Biases, off line: the run's numbers are in its folder, and nothing is sent."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clinkd.errors import SetupError

pytest.importorskip("wandb")
ROOT = Path(__file__).parent.parent.parent


def learn(folder):
    """Two stages in one process, as in a run."""
    from clinkd.config import DemoModelConfig, TrainConfig
    from clinkd.data.records import read_records
    from clinkd.models import apply
    from clinkd.models.demo import build_model, build_processor
    from clinkd.pipeline.paths import SAMPLE_FOLDER
    from clinkd.train.job import Job
    from clinkd.train.log import MetricsLog
    from clinkd.train.trainer import train

    size = DemoModelConfig(layers=1, width=32, vision_layers=1, vision_width=32, vocabulary=400)
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:6]
    texts = [turn.value for record in records for turn in record.conversations]
    processor = build_processor(texts, size.vocabulary, 3136, 3136)
    settings = TrainConfig(epochs=1, batch_size=2, log_steps=1)
    log = MetricsLog(folder / "metrics.jsonl")
    for stage in ("teacher", "correct-1"):
        job = Job(stage, folder / stage, log, records, SAMPLE_FOLDER, 0, wandb="clinkd-test")
        train(job, apply(build_model(processor, size, 0)), processor, settings)


def messages(path):
    """What a run's file holds, in LevelDB's log format: blocks of 32 KiB, parts of messages."""
    data, at, message = path.read_bytes(), len(":W&B") + 3, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            yield message
            message = b""


def history(path):
    """A run's names and projects, and its rows of numbers."""
    from wandb.proto.wandb_internal_pb2 import Record

    names, rows = set(), []
    for message in messages(path):
        record = Record.FromString(message)
        if record.HasField("run"):
            names.add((record.run.display_name, record.run.project))
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return names, rows


ASKED = []


class Refuse(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ASKED.append(self.path)
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_offline_runs_hold_the_numbers_and_nothing_is_sent(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = {
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(tmp_path),
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "WANDB_API_KEY": "0" * 40,
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-Wignore", __file__, str(tmp_path)],
            env=os.environ | settings, capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert ASKED == []
    assert "wandb:" not in done.stdout + done.stderr
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
        names, rows = history(path)
        ((name, project),) = names
        assert project == "clinkd-test"
        learned = [row for row in rows if "train/ce" in row]
        found[name] = [row["train/ce"] for row in learned]
        for what in ("tokens_per_second", "memory_gib"):
            assert all(row[f"train/{what}"] > 0 for row in learned), what
    expected = {
        stage: [pytest.approx(row["ce"]) for row in log if row["stage"] == stage]
        for stage in ("teacher", "correct-1")
    }
    assert found == expected


def test_what_it_refuses_is_one_line(tmp_path):
    import wandb

    from clinkd.train import trainer
    from clinkd.train.job import Job
    from clinkd.train.log import MetricsLog

    job = Job("teacher", tmp_path, MetricsLog(tmp_path / "m"), [], tmp_path, 0, wandb="project")
    said = pytest.raises(SetupError, match=r"log.wandb='project': No key\. WANDB_MODE=offline")
    with said, trainer._logger_errors(job):
        raise wandb.errors.UsageError("No key.")


if __name__ == "__main__":
    learn(Path(sys.argv[1]))
