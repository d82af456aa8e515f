"""Training: the loss's normalisation, exact resumption, whole checkpoints, signals."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from clinkd.config import DemoModelConfig, DistillConfig, TrainConfig
from clinkd.data.collate import AnswerDataset, collate
from clinkd.data.records import read_records
from clinkd.errors import ClinkdError, DataError, Preempted, SetupError
from clinkd.models import apply
from clinkd.models.card import card
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.rotary import PositionConfig
from clinkd.train import checkpoint
from clinkd.train import trainer as trainer_module
from clinkd.train.answer_trainer import AnswerTrainer
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.loss import answer_forward
from clinkd.train.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
SIZE = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32, vocabulary=500)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:20]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, SIZE.vocabulary, 3136, 56 * 56)


def make_model(processor, seed=0):
    return apply(build_model(processor, SIZE, seed), PositionConfig("paper"))


def make_job(tmp_path, records, progress=None, name="a"):
    log = MetricsLog(tmp_path / f"{name}.jsonl")
    return Job("distill", tmp_path / name, log, records, SAMPLE_FOLDER, 0, progress)


SETTINGS = DistillConfig(
    epochs=2, learning_rate=1e-2, batch_size=3, gradient_accumulation=2, save_steps=2, log_steps=1
)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, records, processor):
    """Weights and log of a run that nobody interrupted."""
    tmp_path = tmp_path_factory.mktemp("whole")
    model = make_model(processor)
    train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    log, card = ((tmp_path / name).read_text() for name in ("a.jsonl", "a/README.md"))
    return weights(model), log, sorted(os.listdir(tmp_path / "a")), card


def test_leaves_a_model_folder_and_no_checkpoints(whole):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(whole[2])
    assert not [name for name in whole[2] if "checkpoint" in name or name.startswith(".")]


def test_a_model_folder_says_who_misreads_it(whole, processor):
    assert "positions `paper`" in whole[3]
    assert "Other loaders give other answers" in whole[3]
    model = build_model(processor, SIZE, 0)
    model.config.architectures = None
    assert "load this model as well" in card(model.config)  # nothing is applied: M-RoPE
    apply(model, PositionConfig("mrope"))
    assert "positions `mrope`" in card(model.config)


def test_log_has_loss_ce_and_kd(whole):
    rows = [json.loads(line) for line in whole[1].splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        expected = (row["ce"] + SETTINGS.kd_weight * row["kd"]) / (1 + SETTINGS.kd_weight)
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert rows[-1]["ce"] < rows[0]["ce"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_killed_and_resumed_ends_bit_identical(tmp_path, records, processor, whole, at):
    def kill(step, total, note):
        if step == at:
            raise Killed

    teacher = make_model(processor, 1)
    student = make_model(processor)
    with pytest.raises(Killed):
        train(make_job(tmp_path, records, kill), student, processor, SETTINGS, teacher)
    model = make_model(processor)
    train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    assert_same(weights(model), whole[0])
    assert (tmp_path / "a.jsonl").read_text() == whole[1]


@pytest.mark.slow
def test_killed_during_a_save(tmp_path, records, processor, whole, monkeypatch):
    """A checkpoint is whole or absent: dying before the rename leaves the one before."""
    real, calls = os.replace, []

    def replace(source, target):
        if "checkpoint-4" in str(target):
            calls.append(target)
            raise Killed
        return real(source, target)

    student, teacher = make_model(processor), make_model(processor, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(Killed):
            train(make_job(tmp_path, records), student, processor, SETTINGS, teacher)
    assert calls
    found = (tmp_path / "a" / "checkpoints").glob("checkpoint-*")
    assert [path.name for path in found] == ["checkpoint-2"]
    model = make_model(processor)
    train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    assert_same(weights(model), whole[0])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tmp_path, records, processor, whole):
    """Training goes on from the one before, says so, and ends with the same weights."""

    def kill(step, total, note):
        if step == 5:
            raise Killed

    student, teacher = make_model(processor), make_model(processor, 1)
    with pytest.raises(Killed):
        train(make_job(tmp_path, records, kill), student, processor, SETTINGS, teacher)
    last = tmp_path / "a" / "checkpoints" / "checkpoint-4"
    data = bytearray((last / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (last / "model.safetensors").write_bytes(data)
    model = make_model(processor)
    with pytest.warns(UserWarning, match=r"checkpoint-4: damaged, the checksum of model.*going on"):
        train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    assert_same(weights(model), whole[0])
    assert (tmp_path / "a.jsonl").read_text() == whole[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_stops(tmp_path, records, processor, whole, number):
    def send(step, total, note):
        if step == 3:
            os.kill(os.getpid(), number)

    student, teacher = make_model(processor), make_model(processor, 1)
    with pytest.raises(Preempted, match=r"step [34]") as error:
        train(make_job(tmp_path, records, send), student, processor, SETTINGS, teacher)
    assert error.value.exit_code == 75
    model = make_model(processor)
    train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    assert_same(weights(model), whole[0])


@pytest.mark.slow
def test_full_disk_keeps_the_old_checkpoint(tmp_path, records, processor, monkeypatch):
    real = checkpoint.seal

    def full(folder, made_by):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(folder, made_by)

    monkeypatch.setattr(checkpoint, "seal", full)
    student, teacher = make_model(processor), make_model(processor, 1)
    with pytest.raises(SetupError, match=r"No space left.*the one before it is whole"):
        train(make_job(tmp_path, records), student, processor, SETTINGS, teacher)
    assert (tmp_path / "a" / "checkpoints" / "checkpoint-2" / "model.safetensors").exists()


@pytest.mark.slow
def test_accumulation_changes_nothing(tmp_path, records, processor):
    """One step of 6 records is the same whether cut into 1, 2 or 6 micro-batches."""
    results = []
    for index, (batch, accumulation) in enumerate([(6, 1), (3, 2), (1, 6)]):
        model = make_model(processor)
        settings = SETTINGS.model_copy(
            update={
                "batch_size": batch,
                "gradient_accumulation": accumulation,
                "epochs": 1,
                "learning_rate": 1e-3,
            }
        )
        job = make_job(tmp_path, records[:6], name=f"run{index}")
        train(job, model, processor, settings, make_model(processor, 1))
        row = json.loads((tmp_path / f"run{index}.jsonl").read_text().splitlines()[0])
        results.append((row["loss"], row["grad_norm"]))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


def test_nan_stops_the_run(tmp_path, records, processor):
    model = make_model(processor)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ClinkdError, match="the loss is nan at step 1"):
        train(make_job(tmp_path, records), model, processor, TrainConfig(log_steps=1))


def test_one_process_takes_one_gpu(tmp_path, records, processor, monkeypatch):
    """The Trainer's own choice would spread the model over all that it sees."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 4, raising=False)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    job = make_job(tmp_path, records)
    assert trainer_module._arguments(job, SETTINGS, tmp_path, 20).n_gpu == 1


def test_deepspeed_does_not_round_what_a_cache_says():
    """Its Trainer casts every float of a batch to the model's type."""
    trainer = object.__new__(AnswerTrainer)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    trainer.is_deepspeed_enabled = True
    settings = SimpleNamespace(dtype=lambda: torch.bfloat16)
    plugin = SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=settings))
    trainer.accelerator = SimpleNamespace(state=plugin)
    exact = torch.tensor([15.03, 14.97])
    batch = {"pixel_values": exact, "teacher_lse": exact, "teacher_ids": torch.ones(2).int()}
    found = trainer._prepare_inputs(batch)
    assert found["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(found["teacher_lse"], exact)
    assert found["teacher_lse"].dtype == torch.float32
    assert found.keys() == batch.keys()


def test_too_long_a_record_is_named(tmp_path, records, processor):
    job, settings = make_job(tmp_path, records), TrainConfig(max_length=8)
    with pytest.raises(DataError, match=r"record '.*' has .* tokens, over max_length 8"):
        train(job, make_model(processor), processor, settings)


def test_forward_equals_transformers_own_loss(records, processor):
    model = make_model(processor)
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 512)
    batch = collate([dataset[i] for i in range(5)], processor.tokenizer.pad_token_id)
    expected = model(**batch).loss
    with answer_forward(model, len(processor.tokenizer)):
        found = model(**batch)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    assert hasattr(model(**batch), "logits")  # and the model is itself again
