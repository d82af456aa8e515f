"""Packed rows: the loss, gradients and resumption of records side by side."""

import dataclasses
import json

import pytest
import torch

from clinkd.config import DemoModelConfig, DistillConfig, ModelConfig
from clinkd.data.collate import AnswerDataset, collate
from clinkd.data.records import Turn, read_records
from clinkd.data.teacher_cache import TeacherCache
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.rotary import PositionConfig
from clinkd.train.checkpoint import save_model
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.loss import answer_forward
from clinkd.train.teachers import (
    CachedRows,
    CachedTeacher,
    LiveTeacher,
    cache_spec,
    fill_cache,
    last_hidden,
)
from clinkd.train.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
SIZE = DemoModelConfig(layers=2, width=64, vision_layers=1, vision_width=32, vocabulary=500)
SETTINGS = DistillConfig(
    epochs=3, learning_rate=1e-2, batch_size=2, gradient_accumulation=2, save_steps=1, log_steps=1,
    temperature=2.0, max_length=150, packing=True,
)  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def records():
    found = read_records(SAMPLE_FOLDER / "train.jsonl")[:24]
    return [record if i % 5 else without_image(record) for i, record in enumerate(found)]


def without_image(record):
    turns = (Turn("human", record.question), *record.conversations[1:])
    return dataclasses.replace(record, images=(), size=None, conversations=turns)


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, SIZE.vocabulary, 3136, 112 * 112)


def make_model(processor, seed=0, preset="paper"):
    return apply(build_model(processor, SIZE, seed), PositionConfig(preset))


@pytest.fixture(scope="module")
def batches(records, processor):
    """Seven records side by side, and end to end in two rows."""
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 512)
    items = [dataset[i] for i in range(7)]
    pad = processor.tokenizer.pad_token_id
    return collate(items, pad), collate([items[:4], items[4:]], pad)


@pytest.mark.parametrize("preset", ["paper", "warm", "mrope", "gap2"])
def test_hidden_states_are_those_of_records_apart(batches, processor, preset):
    model = make_model(processor, preset=preset)
    apart, packed = batches
    assert packed["input_ids"].shape == (1, int(apart["attention_mask"].sum()))
    found, expected = (
        last_hidden(model, {k: v for k, v in batch.items() if k != "labels"})
        for batch in (packed, apart)
    )
    expected = expected[apart["attention_mask"].bool()]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "mrope"])
def test_loss_and_gradients_are_those_of_records_apart(batches, processor, preset):
    told = LiveTeacher(make_model(processor, 1, "warm"), len(processor.tokenizer))
    found = []
    for batch in batches:
        model = make_model(processor, preset=preset)
        with answer_forward(model, len(processor.tokenizer)):
            out = model(**batch, teacher=told(dict(batch)), kd=SETTINGS)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss.detach(), out.kd, grads))
    (loss, kd, grads), (packed_loss, packed_kd, packed_grads) = found
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_kd, kd, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-3, atol=1e-6)


def test_a_row_is_blind_to_the_others_in_it(batches, processor):
    """Another first record changes nothing of those behind it."""
    model = make_model(processor)
    batch = {k: v for k, v in batches[1].items() if k != "labels"}
    first = batch["segments"] == 0
    other = batch | {"input_ids": batch["input_ids"].clone()}
    text = first & (batch["mm_token_type_ids"] == 0)
    other["input_ids"][text] = 7
    a, b = last_hidden(model, batch), last_hidden(model, other)
    assert not torch.equal(a[first], b[first])
    assert torch.equal(a[~first], b[~first])


def run(tmp_path, name, records, processor, teacher, progress=None):
    model, log = make_model(processor, 2), MetricsLog(tmp_path / f"{name}.jsonl")
    job = Job("distill", tmp_path / name, log, records, SAMPLE_FOLDER, 0, progress, held_out=(3, 9))
    train(job, model, processor, SETTINGS, teacher)
    return model.state_dict(), [json.loads(line) for line in log.path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, records, processor):
    tmp_path = tmp_path_factory.mktemp("whole")
    return run(tmp_path, "a", records, processor, make_model(processor, 1))


def test_learns(whole):
    learnt = [row for row in whole[1] if "ce" in row]
    assert learnt[-1]["step"] > 6
    assert learnt[-1]["ce"] < learnt[0]["ce"]
    held_out = [row["eval_loss"] for row in whole[1] if "eval_loss" in row]
    assert held_out[-1] < held_out[0]


@pytest.mark.parametrize("at", [1, 4])
def test_killed_and_resumed_ends_bit_identical(tmp_path, records, processor, whole, at):
    def kill(step, total, note):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, "a", records, processor, make_model(processor, 1), kill)
    weights, rows = run(tmp_path, "a", records, processor, make_model(processor, 1))
    assert rows == whole[1]
    for name, tensor in whole[0].items():
        assert torch.equal(weights[name], tensor), name


@pytest.fixture
def cached(tmp_path, records, processor):
    """A teacher and the cache of what it says."""
    teacher, folder = make_model(processor, 1), tmp_path / "teacher"
    save_model(folder, teacher, processor)
    chosen = SETTINGS.model_copy(update={"teacher_cache": "hidden"})
    spec = cache_spec(chosen, ModelConfig(), records, SAMPLE_FOLDER, processor, folder)
    cache = TeacherCache(tmp_path / "cache", spec)
    fill_cache(cache, teacher, AnswerDataset(records, SAMPLE_FOLDER, processor, 2048), 4)
    return teacher, cache


def test_training_from_a_cache_is_the_same(tmp_path, records, processor, whole, cached):
    _, rows = run(tmp_path, "cached", records, processor, cached[1])
    for a, b in zip(rows, whole[1], strict=True):
        assert a.pop("stage") == b["stage"]
        assert a == pytest.approx({k: v for k, v in b.items() if k != "stage"}, rel=1e-3)


def test_cached_rows_keep_the_order_of_a_row(records, processor, cached):
    """What the cache says of a packed batch, token by token, is what the teacher says."""
    teacher, cache = cached
    dataset = CachedRows(AnswerDataset(records, SAMPLE_FOLDER, processor, 2048), cache)
    batch = collate([[dataset[9], dataset[3]], [dataset[14]]], processor.tokenizer.pad_token_id)
    found = CachedTeacher(cache)(batch)
    live = LiveTeacher(teacher, len(processor.tokenizer))(batch)
    torch.testing.assert_close(found["hidden"], live["hidden"], rtol=1e-4, atol=1e-5)
