"""`clinkd plan`: published sizes, arithmetic, the command and its errors."""

import json

import pytest
from PIL import Image
from transformers import Qwen2VLConfig
from typer.testing import CliRunner

from clinkd.cli import app
from clinkd.config import AdapterConfig, DistillConfig, TrainConfig, check
from clinkd.errors import DataError, SetupError
from clinkd.plan.memory import FLOAT32, PARTS, device_memory
from clinkd.plan.sizes import RecordSize, model_size

RECORDS = RecordSize(length=400, answer=60, patches=1024, mean_length=350, mean_answer=40)
PAPER = {"model": {"dtype": "bfloat16", "student": "x"}}


def published(width, inner, heads, kv, vocabulary, tied):
    text = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
        },
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": width}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


@pytest.fixture(scope="module")
def small():
    config = published(1536, 8960, 12, 2, 151_936, True)
    return model_size(config, False, AdapterConfig())


@pytest.fixture(scope="module")
def large():
    config = published(3584, 18944, 28, 4, 152_064, False)
    return model_size(config, False, AdapterConfig())


def test_published_parameter_counts(small, large):
    assert small.total == 2_208_985_600  # the hub's figures of Qwen2-VL-2B and 7B
    assert large.total == 8_291_375_616


def plan(size, strategy="zero3", world=1, teacher=None, settings=None, cached=None, **model):
    tree = {"parallel": {"strategy": strategy}, "distill": {"teacher_cache": "hidden"}}
    config = check(tree | {"model": PAPER["model"] | model})
    settings = settings or DistillConfig(batch_size=4, gradient_accumulation=4)
    return device_memory(size, teacher, RECORDS, settings, config, world, cached=cached)


def test_adam_in_float32_takes_sixteen_bytes_a_weight(small):
    config = check({})
    settings = TrainConfig(batch_size=1, gradient_accumulation=2)
    found = device_memory(small, None, RECORDS, settings, config, kind=FLOAT32)
    assert found["weights"] == found["gradients"] == 4 * small.total
    assert found["optimiser"] == 8 * small.total


def test_what_is_cut_over_the_processes(large):
    one = {s: plan(large, s) for s in ("ddp", "zero1", "zero2", "zero3")}
    eight = {s: plan(large, s, 8) for s in one}
    assert eight["ddp"]["optimiser"] == one["ddp"]["optimiser"]
    for strategy in ("zero1", "zero2", "zero3"):
        assert eight[strategy]["optimiser"] == pytest.approx(one[strategy]["optimiser"] / 8)
    assert eight["zero2"]["gradients"] < one["zero2"]["gradients"] / 2
    assert eight["zero3"]["weights"] < one["zero3"]["weights"] / 2
    totals = [sum(eight[s].values()) for s in ("ddp", "zero1", "zero2", "zero3")]
    assert totals == sorted(totals, reverse=True)
    for strategy in one:
        assert eight[strategy]["activations"] == one[strategy]["activations"]


def test_a_live_teacher_is_whole_or_cut(small, large):
    found = plan(small, "zero2", 8, teacher=large)
    assert found["teacher"] == 2 * large.total
    assert plan(small, "zero2", 8)["teacher"] == 0
    assert plan(small, "zero2", 8, cached=large)["teacher"] == 2 * large.head
    share = 2 * (large.total // 8 + 10**9 + large.head)  # and what is gathered at a time
    assert plan(small, "zero3", 8, teacher=large)["teacher"] == share


def test_checkpointing_and_adapters_save_what_they_say(small):
    plain = plan(small, "ddp")
    less = plan(small, "ddp", settings=DistillConfig(gradient_checkpointing=True))
    assert less["activations"] < plain["activations"] / 4
    adapter = AdapterConfig(kind="lora")
    size = model_size(small.config, False, adapter)
    assert size.trained == size.adapters < small.total / 50
    found = plan(size, "ddp", adapter=adapter.model_dump())
    assert found["optimiser"] < plain["optimiser"] / 50


def test_four_bits_of_matrices_alone(large):
    """7B: 7.2 billion weights of layers at half a byte; embedding and head in float32, and the
    head again as autocast has it."""
    adapter = AdapterConfig(kind="qlora")
    size = model_size(large.config, False, adapter)
    found = plan(size, "ddp", adapter=adapter.model_dump())
    head = 152_064 * 3584
    matrices = size.linear - head
    rest = size.total - matrices
    assert found["weights"] == pytest.approx(matrices / 2 + 4 * rest + 2 * head)
    assert 8.5e9 < found["weights"] < 9.6e9


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: {train_limit: 40, test_limit: 4}")
    return path


def test_the_command(config):
    found = json.loads(run(str(config), "--json").stdout)
    assert set(found["stages"]) == {"teacher", "distill", "correct"}
    assert found["records"]["all"] == found["records"]["measured"] == 40
    for stage in found["stages"].values():
        assert set(stage["memory"]["1"]) == set(PARTS)
        assert stage["steps"]["1"] >= stage["steps"]["8"]
    assert found["stages"]["distill"]["steps"]["1"] == 20  # 40 records by 4, twice
    assert found["stages"]["distill"]["steps"]["8"] == 4
    assert found["disk"]["teacher cache"] == found["correction"]["calls"] == 0
    cut = json.loads(run(str(config), "parallel.strategy=zero2", "--json").stdout)
    weights = found["disk"]["checkpoints"] // (3 * 12)  # float32 ones and Adam's two
    # DeepSpeed's own beside them, twice in float32
    assert cut["disk"]["checkpoints"] == 3 * 20 * weights
    text = run(str(config)).stdout
    assert "zero3" in text
    assert "the card it fits: 40 or 80 GB" in text
    assert "…" not in text  # every cell is whole


def test_the_cost_of_correction_is_an_upper_bound(config):
    corrector = "correct.corrector={kind: endpoint, url: 'http://localhost:1/v1', model: m, "
    prices = "input_price: 1.0, output_price: 2.0, max_tokens: 100}"
    money = json.loads(run(str(config), corrector + prices, "--json").stdout)["correction"]
    assert money["calls"] == 80  # two rounds of forty
    assert money["received"] == 8000
    assert money["cost"] == pytest.approx((money["sent"] + 2 * money["received"]) / 1e6)


def test_a_folder_without_a_model_is_named(config, tmp_path):
    result = run(str(config), f"model.student={tmp_path}")
    assert isinstance(result.exception, SetupError)
    assert f"{tmp_path}: no model config can be read" in str(result.exception)


def test_records_that_a_run_would_refuse_are_named(config, tmp_path):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A scan."}]
    row = {"id": "a", "image": "thin.png", "task": "MIA", "conversations": turns}
    Image.new("RGB", (600, 2)).save(tmp_path / "thin.png")
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    result = run(str(config), f"data.train={path}")
    assert isinstance(result.exception, DataError)
    assert "a: image 'thin.png' is 600 × 2: over 200 times as long" in str(result.exception)
    path.write_text("", encoding="utf-8")
    result = run(str(config), f"data.train={path}")
    assert isinstance(result.exception, DataError)
    assert f"data.train: {path} holds no record" in str(result.exception)
