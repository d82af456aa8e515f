"""A teacher from a cache says what the teacher itself says, and only to those it was made for."""

import dataclasses
import json

import pytest
import torch

from clinkd.config import DemoModelConfig, DistillConfig, ModelConfig
from clinkd.data.collate import AnswerDataset, collate
from clinkd.data.records import Turn, read_records
from clinkd.data.teacher_cache import TeacherCache
from clinkd.errors import DataError
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.rotary import PositionConfig
from clinkd.train.checkpoint import save_model
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.loss import answer_forward
from clinkd.train.teachers import CachedRows, CachedTeacher, LiveTeacher, cache_spec, fill_cache
from clinkd.train.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
SIZE = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32, vocabulary=500)
MODEL = ModelConfig(min_pixels=3136, max_pixels=56 * 56)


def settings(kind, top_k=64, **more):
    return DistillConfig(
        epochs=1, learning_rate=1e-2, batch_size=3, temperature=2.0, log_steps=1,
        teacher_cache=kind, teacher_top_k=top_k, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:14]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, SIZE.vocabulary, MODEL.min_pixels, MODEL.max_pixels)


def make_model(processor, seed):
    return apply(build_model(processor, SIZE, seed), PositionConfig("paper"))


@pytest.fixture(scope="module")
def teacher(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = make_model(processor, 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # a teacher with an opinion
    save_model(folder, model, processor)
    return model, folder


def make_cache(path, records, processor, teacher, chosen):
    model, folder = teacher
    spec = cache_spec(chosen, MODEL, records, SAMPLE_FOLDER, processor, folder)
    spec = dataclasses.replace(spec, shard_records=5)
    cache = TeacherCache(path, spec)
    if not cache.whole():
        fill_cache(cache, model, AnswerDataset(records, SAMPLE_FOLDER, processor, 2048), 4)
    return cache


def loss_of(records, processor, teacher, cache, chosen):
    """Loss and gradient of the student's head for one batch, live and from the cache."""
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 2048)
    rows = CachedRows(dataset, cache)
    found = []
    for told, source in (
        (LiveTeacher(teacher[0], len(processor.tokenizer)), dataset),
        (CachedTeacher(cache), rows),
    ):
        student = make_model(processor, 2)
        batch = collate([source[i] for i in (7, 2, 11)], processor.tokenizer.pad_token_id)
        said = told(batch)
        with answer_forward(student, len(processor.tokenizer)):
            out = student(**batch, teacher=said, kd=chosen)
        out.loss.backward()
        found.append((out.loss.detach(), out.kd, student.lm_head.weight.grad))
    return found


def test_hidden_states_are_exact(tmp_path, records, processor, teacher):
    chosen = settings("hidden")
    cache = make_cache(tmp_path / "c", records, processor, teacher, chosen)
    live, cached = loss_of(records, processor, teacher, cache, chosen)
    for a, b in zip(live, cached, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # at other temperatures and divergences too: it is the same cache
    other = settings("hidden").model_copy(update={"temperature": 0.7, "divergence": "jsd"})
    live, cached = loss_of(records, processor, teacher, cache, other)
    torch.testing.assert_close(live[0], cached[0])


def test_top_k_is_as_near_as_its_mass(tmp_path, records, processor, teacher):
    errors = []
    for top_k in (16, 64, 256):
        chosen = settings("top-k", top_k)
        cache = make_cache(tmp_path / str(top_k), records, processor, teacher, chosen)
        live, cached = loss_of(records, processor, teacher, cache, chosen)
        errors.append(abs(live[1] - cached[1]).item() / live[1].item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_filling_goes_on_where_it_stopped(tmp_path, records, processor, teacher, monkeypatch):
    chosen = settings("hidden")
    make_cache(tmp_path / "whole", records, processor, teacher, chosen)
    write = TeacherCache.write

    def stop_at_the_second(self, shard, *rest):
        if shard == 1:
            raise KeyboardInterrupt
        write(self, shard, *rest)

    monkeypatch.setattr(TeacherCache, "write", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "cut", records, processor, teacher, chosen)
    monkeypatch.setattr(TeacherCache, "write", write)
    before = (tmp_path / "cut" / "shard-00000.safetensors").stat().st_mtime_ns
    make_cache(tmp_path / "cut", records, processor, teacher, chosen)
    assert (tmp_path / "cut" / "shard-00000.safetensors").stat().st_mtime_ns == before
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_training_from_the_cache_is_training_from_the_teacher(
    tmp_path, records, processor, teacher
):
    chosen = settings("hidden")
    cache = make_cache(tmp_path / "c", records, processor, teacher, chosen)
    logs = []
    for name, source in (("live", teacher[0]), ("cached", cache)):
        log = MetricsLog(tmp_path / f"{name}.jsonl")
        job = Job("distill", tmp_path / name, log, records, SAMPLE_FOLDER, 0, None)
        train(job, make_model(processor, 2), processor, chosen, source)
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert len(logs[0]) == len(logs[1]) == 5
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["kd"] == pytest.approx(b["kd"], rel=1e-4, abs=1e-7)
        assert a["kd"] > 0


@pytest.mark.parametrize("what", ["data", "tokenizer", "template", "image_sizes", "positions",
                                  "max_length", "teacher", "temperature", "width"])  # fmt: skip
def test_what_does_not_match_is_refused(what, tmp_path, records, processor, teacher):
    chosen = settings("top-k")
    cache = make_cache(tmp_path / "c", records, processor, teacher, chosen)
    model, folder = MODEL, teacher[1]
    if what == "data":
        turns = (records[0].conversations[0], Turn("gpt", "Something else."))
        records = [dataclasses.replace(records[0], conversations=turns), *records[1:]]
    elif what == "tokenizer":
        texts = [turn.value for record in records[:3] for turn in record.conversations]
        processor = build_processor(texts, 420, 3136, 3136)
    elif what == "template":
        processor = build_processor(
            [turn.value for record in records for turn in record.conversations], 500, 3136, 3136
        )
        processor.chat_template += " "
    elif what == "image_sizes":
        model = MODEL.model_copy(update={"max_pixels": 10_000})
    elif what == "positions":
        positions = MODEL.positions.model_copy(update={"preset": "gap2"})
        model = MODEL.model_copy(update={"positions": positions})
    elif what == "max_length":
        chosen = chosen.model_copy(update={"max_length": 99})
    elif what == "teacher":
        folder = tmp_path / "other"
        save_model(folder, make_model(processor, 5), processor)
    elif what == "temperature":
        chosen = chosen.model_copy(update={"temperature": 1.5})
    else:
        chosen = chosen.model_copy(update={"teacher_top_k": 32})
    spec = cache_spec(chosen, model, records, SAMPLE_FOLDER, processor, folder)
    spec = dataclasses.replace(spec, shard_records=5)
    with pytest.raises(DataError, match=rf"does not fit:.*{what} is"):
        TeacherCache(cache.folder, spec)


def test_a_damaged_head_is_refused(tmp_path, records, processor, teacher):
    cache = make_cache(tmp_path / "c", records, processor, teacher, settings("hidden"))
    cache.verify()
    path = cache.folder / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"head\.safetensors: its checksum is wrong"):
        cache.verify()
