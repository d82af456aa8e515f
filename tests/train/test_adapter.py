"""Adapters: only they learn, checkpoints hold nothing else, the result is a plain model."""

import json

import pytest
import torch
from safetensors import safe_open

from clinkd import models
from clinkd.config import AdapterConfig, DemoModelConfig, DistillConfig
from clinkd.data.records import read_records
from clinkd.data.select import held_out_places
from clinkd.errors import ClinkdError, ConfigError, Preempted, SetupError
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.rotary import PositionConfig
from clinkd.train.adapter import add_adapter, quantisation
from clinkd.train.checkpoint import save_model
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
SIZE = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32, vocabulary=500)
LORA = AdapterConfig(kind="lora", rank=4, alpha=8, dropout=0.0)
SETTINGS = DistillConfig(epochs=2, learning_rate=1e-2, batch_size=4, save_steps=2, log_steps=1)


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[::80]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, SIZE.vocabulary, 3136, 56 * 56)


def make_model(processor, seed=0):
    return apply(build_model(processor, SIZE, seed), PositionConfig("paper"))


def make_job(tmp_path, records, progress=None, **more):
    log = MetricsLog(tmp_path / "log.jsonl")
    return Job("distill", tmp_path / "out", log, records, SAMPLE_FOLDER, 0, progress, **more)


def whole(tmp_path, records, processor):
    model = add_adapter(make_model(processor), LORA, seed=3)
    train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    return model


def test_the_result_is_a_plain_model_that_answers_as_the_adapted_one(tmp_path, records, processor):
    model = whole(tmp_path, records, processor)
    plain = models.load(tmp_path / "out")
    assert not hasattr(plain, "get_base_model")
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        found = plain(input_ids=ids).logits
        before = make_model(processor)(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - before).abs().max() > 1e-2  # it has learned
    changed = {
        name
        for (name, a), b in zip(
            plain.named_parameters(), make_model(processor).parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert changed
    assert all("language_model" in name and "_proj" in name for name in changed)


def test_a_stopped_run_goes_on_from_its_adapters(tmp_path, records, processor):
    (tmp_path / "a").mkdir()
    expected = whole(tmp_path / "a", records, processor).state_dict()

    def stop(done, total, _):
        if done == 4:
            raise Preempted("now")

    model = add_adapter(make_model(processor), LORA, seed=3)
    with pytest.raises(Preempted):
        train(
            make_job(tmp_path, records, stop), model, processor, SETTINGS, make_model(processor, 1)
        )
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    with safe_open(checkpoint / "adapter.safetensors", "pt") as file:
        assert all("lora" in name for name in file.keys())  # noqa: SIM118
    assert not (checkpoint / "model.safetensors").exists()
    model = add_adapter(make_model(processor), LORA, seed=3)
    train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_frozen_weights_in_four_bits(tmp_path, records, processor):
    """Adapters learn beside them; the result is the checkpoint's own weights with them added."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    config = LORA.model_copy(update={"kind": "qlora"})
    save_model(tmp_path / "start", make_model(processor), processor)
    model = models.load(tmp_path / "start", dtype=torch.float32, **quantisation(config))
    model = add_adapter(model, config, seed=3)
    projection = model.base_model.model.model.language_model.layers[0].mlp.up_proj
    assert isinstance(projection.base_layer, Linear4bit)
    frozen = projection.base_layer.weight.data.clone()
    train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
    assert torch.equal(projection.base_layer.weight.data, frozen)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["ce"] < rows[0]["ce"] - 0.2
    plain, start = (models.load(tmp_path / name, dtype=torch.float32) for name in ("out", "start"))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    added = plain.get_parameter(name) - start.get_parameter(name)
    learnt = projection.lora_B.default.weight @ projection.lora_A.default.weight * 2  # alpha / rank
    torch.testing.assert_close(added, learnt, rtol=2e-2, atol=4e-3)  # it was added in bfloat16


def test_what_cannot_be_had(processor, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.adapter\.targets"):
        add_adapter(make_model(processor), LORA.model_copy(update={"targets": "nothing"}), 0)
    for targets in (".*lm_head", ".*embed_tokens"):  # one tensor, which a merge would change twice
        with pytest.raises(ConfigError, match="share their weights"):
            add_adapter(make_model(processor), LORA.model_copy(update={"targets": targets}), 0)
    untied = make_model(processor)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError, match="fits lm_head: the loss reads its weights"):
        add_adapter(untied, LORA.model_copy(update={"targets": ".*lm_head"}), 0)
    monkeypatch.setattr("clinkd.train.adapter.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install clinkd\[qlora\]"):
        quantisation(AdapterConfig(kind="qlora"))
    with pytest.raises(SetupError, match=r"pip install clinkd\[lora\]"):
        add_adapter(make_model(processor), LORA, 0)


def test_held_out_groups_are_not_learned_from(tmp_path, records, processor):
    places = held_out_places(records, 0.3, seed=0)
    groups = {records[place].group for place in places}
    assert 0 < len(places) < len(records)
    assert places == [i for i, record in enumerate(records) if record.group in groups]
    assert held_out_places(records, 0.0, seed=0) == []
    with pytest.raises(ConfigError, match="held_out needs records of at least two groups"):
        held_out_places(records[:1], 0.1, seed=0)
    job = make_job(tmp_path, records, held_out=places, tensorboard=tmp_path / "board")
    train(job, make_model(processor), processor, SETTINGS, make_model(processor, 1))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated][:2] == [2, 4]
    assert evaluated[-1]["eval_loss"] > 0
    steps = 2 * -(-(len(records) - len(places)) // SETTINGS.batch_size)
    assert max(row["step"] for row in rows) == steps
    assert list((tmp_path / "board" / "distill").glob("events.*"))


def test_a_loss_that_is_not_finite_names_the_records(tmp_path, records, processor):
    model = make_model(processor)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ClinkdError, match=r"the loss is nan at step 1; the first such batch held "):
        train(make_job(tmp_path, records), model, processor, SETTINGS, make_model(processor, 1))
