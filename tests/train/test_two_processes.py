"""Two processes: resumed in the middle of an epoch, and the loss of held-out records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HELD_OUT = [1, 4, 8, 9, 13]


def learn(folder, killed_at, held_out, rate, count, accumulation):
    """One process; it dies as by SIGKILL after a step, where one is named."""
    from clinkd.config import DemoModelConfig, TrainConfig
    from clinkd.data.records import read_records
    from clinkd.models import apply
    from clinkd.models.demo import build_model, build_processor
    from clinkd.pipeline.paths import SAMPLE_FOLDER
    from clinkd.rotary import PositionConfig
    from clinkd.train.job import Job
    from clinkd.train.log import MetricsLog
    from clinkd.train.trainer import train

    def look(step, total, note):
        if step == killed_at:
            os._exit(9)

    size = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32, vocabulary=500)
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:count]
    texts = [turn.value for record in records for turn in record.conversations]
    processor = build_processor(texts, size.vocabulary, 3136, 56 * 56)
    settings = TrainConfig(
        epochs=3, batch_size=2, gradient_accumulation=accumulation, save_steps=2, log_steps=1,
        learning_rate=rate,
    )  # fmt: skip
    log = MetricsLog(folder / "metrics.jsonl")
    job = Job("teacher", folder / "out", log, records, SAMPLE_FOLDER, 0, look, held_out=held_out)
    model = apply(build_model(processor, size, 0), PositionConfig("paper"))
    train(job, model, processor, settings)
    os._exit(0)  # threads of gloo can abort the interpreter's own end


def start(folder, port, killed_at=0, held_out=(), rate=1e-2, processes=2, count=20, accumulation=2):
    """Rows of the log."""
    folder.mkdir(exist_ok=True)
    (folder / "one.py").write_text(
        "import pathlib, test_two_processes as tests\n"
        f"tests.learn(pathlib.Path({str(folder)!r}), {killed_at}, {held_out!r}, {rate}, "
        f"{count}, {accumulation})\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        f"--master-port={port}", str(folder / "one.py"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == bool(killed_at), done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resumed_in_mid_epoch(tmp_path, free_port):
    """Three steps an epoch, killed at the fifth, taken up from the fourth."""
    whole = start(tmp_path / "whole", free_port)
    start(tmp_path / "cut", free_port, killed_at=5)
    assert start(tmp_path / "cut", free_port) == whole


def test_an_epoch_that_does_not_share_evenly(tmp_path, free_port):
    """17 records are 9 batches: the second process has none left for the last step."""
    one = start(tmp_path / "1", free_port, processes=1, count=17, accumulation=4, rate=1e-3)
    two = start(tmp_path / "2", free_port, processes=2, count=17, accumulation=2, rate=1e-3)
    assert len(one) == len(two) == 9
    for name in ("loss", "ce"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4)


def test_held_out_records_count_once(tmp_path, free_port):
    """Five records do not share evenly among two processes; the model stays as it is."""
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        rows = start(folder, free_port, held_out=HELD_OUT, rate=1e-12, processes=processes)
        losses.append(next(row["eval_loss"] for row in rows if "eval_loss" in row))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
