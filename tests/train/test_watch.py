"""What is seen while a model trains, and what stops a step that would be wrong."""

import os
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments

from clinkd.config import DemoModelConfig, TrainConfig
from clinkd.data.records import read_records
from clinkd.errors import ClinkdError
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.train import watch
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.trainer import AnswerTrainer, train

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
SIZE = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32, vocabulary=500)


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:8]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, SIZE.vocabulary, 3136, 3136)


def make_job(tmp_path, records, progress=None):
    log = MetricsLog(tmp_path / "log.jsonl")
    board = tmp_path / "board"
    return Job(
        "teacher", tmp_path / "a", log, records, SAMPLE_FOLDER, 0, progress, tensorboard=board
    )


def test_tensorboard_has_speed_and_memory_beside_the_log(tmp_path, records, processor):
    seen = []
    job = make_job(tmp_path, records, lambda *update: seen.append(update))
    settings = TrainConfig(epochs=2, batch_size=4, log_steps=1)
    train(job, apply(build_model(processor, SIZE, 0)), processor, settings)
    board = EventAccumulator(str(tmp_path / "board" / "teacher"))
    board.Reload()
    rows = job.log.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("loss", "ce", "learning_rate", "grad_norm"):
        values = [event.value for event in board.Scalars(f"teacher/{name}")]
        assert values == [pytest.approx(row[name], rel=1e-5) for row in rows]
    assert all(event.value > 0 for event in board.Scalars("teacher/tokens_per_second"))
    assert all(0.1 < event.value < 20 for event in board.Scalars("teacher/memory_gib"))
    assert [update[:2] for update in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_share_of_the_peak_on_a_known_card(tmp_path, records, monkeypatch):
    """1,000 tokens in 2 seconds, 6 operations a token and weight, 312e12 a second at most."""
    times = iter([10.0, 12.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(watch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(watch.torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(watch.torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    callback = watch.Watch(make_job(tmp_path, records))
    callback.weights = 2_000_000_000
    arguments, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState()
    callback.on_train_begin(arguments, state, TrainerControl())
    state.num_input_tokens_seen = 1000
    assert callback.measure(state) == {
        "tokens_per_second": 500.0,
        "memory_gib": 3.0,
        "mfu": pytest.approx(6 * 2e9 * 500 / 312e12),
    }


def test_the_loss_before_the_first_row(tmp_path, records):
    """Unknown at the start of a run; of one that is resumed, that of its checkpoint."""
    notes = []
    callback = watch.Watch(make_job(tmp_path, records, lambda *update: notes.append(update[2])))
    arguments, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState()
    callback.on_step_end(arguments, state, TrainerControl())
    state.log_history = [{"loss": 2.5, "step": 1}, {"eval_loss": 2.0, "step": 1}]
    callback.on_train_begin(arguments, state, TrainerControl())
    assert callback.last_loss == 2.5
    callback.speeds = {"tokens_per_second": 1234.5}
    callback.on_step_end(arguments, state, TrainerControl())
    assert notes == ["", "loss 2.500, 1,234 tokens/s"]


def test_a_trainer_that_counts_no_tokens_is_refused(tmp_path, records, processor, monkeypatch):
    """It would divide the loss by each micro-batch's own tokens: seen at the first of them."""
    real = AnswerTrainer.compute_loss

    def without_count(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return real(self, model, inputs, return_outputs, None)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", without_count)
    model = apply(build_model(processor, SIZE, 0))
    with pytest.raises(RuntimeError, match="gave no token count of the optimiser step"):
        train(make_job(tmp_path, records), model, processor, TrainConfig())


def test_a_frozen_vision_tower_stays_as_it_was(tmp_path, records, processor):
    model = apply(build_model(processor, SIZE, 0))
    model.model.visual.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(make_job(tmp_path, records), model, processor, TrainConfig(learning_rate=1e-2))
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed
    assert not [name for name in changed if "visual" in name]


def poison(monkeypatch, step):
    """One weight stops being a number after a step."""
    real = watch.Watch.on_step_end

    def on_step_end(self, args, state, control, model=None, **more):
        if state.global_step == step:
            with torch.no_grad():
                model.lm_head.weight[5, 0] = torch.nan
        return real(self, args, state, control, **more)

    monkeypatch.setattr(watch.Watch, "on_step_end", on_step_end)


@pytest.mark.parametrize("step", [3, 4])
def test_no_model_or_checkpoint_with_nan_is_saved(tmp_path, records, processor, monkeypatch, step):
    """Between two log lines, and after the last one."""
    poison(monkeypatch, step)
    job = make_job(tmp_path, records)
    settings = TrainConfig(epochs=2, batch_size=4, log_steps=10, save_steps=2)
    with pytest.raises(ClinkdError, match=r"not finite|the loss is nan"):
        train(job, apply(build_model(processor, SIZE, 0)), processor, settings)
    assert not (tmp_path / "a" / "config.json").exists()
    kept = sorted(path.name for path in (tmp_path / "a" / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-2"]


def test_ctrl_c_saves_first_and_stops_at_the_second(tmp_path, records):
    callback = watch.Watch(make_job(tmp_path, records))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with watch.Signals(callback):
            os.kill(os.getpid(), signal.SIGINT)
            assert callback.signalled
            assert callback.interrupted
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # in the background of a shell's script
        with watch.Signals(callback):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
