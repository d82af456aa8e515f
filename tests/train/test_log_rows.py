"""Rows of metrics.jsonl: the same however a run is cut off, and for every token alike."""

import json
import os
import signal

import pytest
import torch

from clinkd.config import DemoModelConfig, TrainConfig
from clinkd.data.collate import AnswerDataset, collate
from clinkd.data.records import read_records
from clinkd.errors import Preempted
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.rotary import PositionConfig
from clinkd.train.answer_trainer import AnswerTrainer
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.loss import answer_forward
from clinkd.train.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers' own
SIZE = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32, vocabulary=500)
HELD_OUT = [1, 4, 8, 9, 13]


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:20]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, SIZE.vocabulary, 3136, 56 * 56)


def make_model(processor):
    return apply(build_model(processor, SIZE, 0), PositionConfig("paper"))


def make_job(folder, records, progress=None, held_out=()):
    log = MetricsLog(folder / "metrics.jsonl")
    return Job(
        "teacher", folder / "out", log, records, SAMPLE_FOLDER, 0, progress, held_out=held_out
    )


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("error", [Killed, Preempted])
@pytest.mark.parametrize("at", [3, 6, 7])
def test_rows_between_saves(tmp_path, records, processor, error, at):
    """Lines every 4 steps, checkpoints every 3: a line spans what came before a resumption."""
    settings = TrainConfig(
        epochs=3, batch_size=3, gradient_accumulation=2, save_steps=3, log_steps=4,
        learning_rate=1e-2,
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_job(whole, records), make_model(processor), processor, settings)

    def stop(step, total, note):
        if step == at and error is Killed:
            raise Killed
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(error):
        train(make_job(cut, records, stop), make_model(processor), processor, settings)
    train(make_job(cut, records), make_model(processor), processor, settings)
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_the_held_out_loss_is_of_tokens(tmp_path, records, processor):
    found = []
    for batch in (1, 2, 5):
        settings = TrainConfig(epochs=1, batch_size=batch, save_steps=1, learning_rate=1e-12)
        folder = tmp_path / str(batch)
        job = make_job(folder, records[:15], held_out=HELD_OUT)
        train(job, make_model(processor), processor, settings)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        found.append(next(row["eval_loss"] for row in rows if "eval_loss" in row))
    dataset = AnswerDataset([records[i] for i in HELD_OUT], SAMPLE_FOLDER, processor, 512)
    batch = collate(list(dataset), processor.tokenizer.pad_token_id)
    model = make_model(processor).eval()
    with torch.no_grad(), answer_forward(model, len(processor.tokenizer)):
        expected = model(**batch).loss.item()
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_the_best_checkpoint_outlives_a_resumption(tmp_path, records, processor, monkeypatch):
    """The held-out loss is least at step 4; the run is killed at step 15."""
    settings = TrainConfig(epochs=6, batch_size=3, save_steps=2)
    real, kept = AnswerTrainer.evaluation_loop, []

    def least_at_4(self, *arguments, **options):
        found = real(self, *arguments, **options)
        found.metrics["eval_loss"] = abs(self.state.global_step - 4.0)
        return found

    monkeypatch.setattr(AnswerTrainer, "evaluation_loop", least_at_4)

    def run(at=None):
        def look(step, total, note):
            folders = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
            kept.append(sorted(int(path.name.split("-")[1]) for path in folders))
            if step == at:
                raise Killed

        job = make_job(tmp_path, records, look, HELD_OUT)
        train(job, make_model(processor), processor, settings)

    with pytest.raises(Killed):
        run(at=15)
    assert kept[-1] == [4, 12, 14]
    run()
    assert kept[-1][0] == 4
    assert len(kept[-1]) == 3
