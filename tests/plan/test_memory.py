"""Predicted memory against measured peaks of real training steps."""

import importlib.util
from pathlib import Path

import pytest
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from clinkd.config import DemoModelConfig, DistillConfig, TrainConfig, check
from clinkd.data.collate import AnswerDataset
from clinkd.data.records import read_records
from clinkd.models import apply
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.plan.memory import FLOAT32, device_memory
from clinkd.plan.sizes import model_size, record_size
from clinkd.rotary import PositionConfig
from clinkd.train.adapter import add_adapter
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers' and torch's
spec = importlib.util.spec_from_file_location("live", Path(__file__).with_name("live_bytes.py"))
live = importlib.util.module_from_spec(spec)
spec.loader.exec_module(live)

PIXELS = 224 * 224
COUNT = 6  # records, one batch


@pytest.fixture(scope="module")
def processor():
    texts = [
        turn.value
        for record in read_records(SAMPLE_FOLDER / "train.jsonl")
        for turn in record.conversations
    ]
    return build_processor(texts, 2000, PIXELS, PIXELS)


@pytest.fixture(scope="module")
def records(processor):
    """Of nearly one length: the plan takes each record of a batch for the longest."""
    found = [r for r in read_records(SAMPLE_FOLDER / "train.jsonl") if r.task == "RC"]
    return sorted(found, key=lambda r: len(r.question) + len(r.answer))[-COUNT:]


def build(family, processor, layers, width):
    if family == "qwen2_vl":
        size = DemoModelConfig(layers=layers, width=width, vision_layers=2, vision_width=64)
        return build_model(processor, size, 0)
    token = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 160,
        "out_hidden_size": width,
        "patch_size": 14,
    }
    tokens = {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    if family == "qwen2_5_vl":
        vision |= {"window_size": 112, "fullatt_block_indexes": [2]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        return Qwen2_5_VLForConditionalGeneration(config)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen3VLForConditionalGeneration(config)


CASES = {
    "all": {},
    "deep": {"layers": 8},
    "wide": {"layers": 2, "width": 512, "batch": 1},
    "checkpointing": {"layers": 6, "gradient_checkpointing": True},
    "accumulated": {"batch": 2, "gradient_accumulation": 3, "width": 256},
    "frozen vision": {"model.freeze_vision": True},
    "adapters": {"model.adapter": {"kind": "lora"}, "layers": 6},
    "teacher": {"teacher": 256},
    "packed": {"packing": True, "batch": 1, "layers": 6},
    "qwen2.5": {"family": "qwen2_5_vl"},
    "qwen2.5, checkpointing": {
        "family": "qwen2_5_vl",
        "gradient_checkpointing": True,
        "layers": 6,
    },
    "qwen3": {"family": "qwen3_vl", "teacher": 128},
}


@pytest.mark.parametrize("case", CASES)
def test_within_15_percent(case, tmp_path, processor, records, monkeypatch):
    wanted = dict(CASES[case])
    family, layers = wanted.pop("family", "qwen2_vl"), wanted.pop("layers", 4)
    width, batch, teacher = (
        wanted.pop(name, default)
        for name, default in (("width", 128), ("batch", COUNT), ("teacher", 0))
    )
    model_keys = {k.split(".")[1]: wanted.pop(k) for k in list(wanted) if k.startswith("model.")}
    config = check({"model": model_keys})
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 4096)
    if wanted.get("packing"):
        wanted["max_length"] = 3 * max(map(dataset.length, records[:COUNT]))  # three in a row
    common = {"epochs": 2, "batch_size": batch, "learning_rate": 1e-3, **wanted}
    settings = DistillConfig(**common) if teacher else TrainConfig(**common)

    model = apply(build(family, processor, layers, width), PositionConfig("paper"))
    told = apply(build(family, processor, 2, teacher), PositionConfig("paper")) if teacher else None
    if config.model.freeze_vision:
        model.model.visual.requires_grad_(False)
    sizes = [
        None
        if m is None
        else model_size(m.config, config.model.freeze_vision, config.model.adapter)
        for m in (model, told)
    ]
    model = add_adapter(model, config.model.adapter, 0)
    assert sizes[0].total == sum(p.numel() for p in model.parameters())
    assert sizes[0].trained == sum(p.numel() for p in model.parameters() if p.requires_grad)

    encode = AnswerDataset.__getitem__

    def on_the_host(self, index):
        with _disable_current_modes():
            return encode(self, index)

    monkeypatch.setattr(AnswerDataset, "__getitem__", on_the_host)
    shape = record_size(dataset, list(range(COUNT)))
    found = device_memory(sizes[0], sizes[1], shape, settings, config, kind=FLOAT32, cuda=False)
    job = Job("x", tmp_path / "out", MetricsLog(tmp_path / "log"), records, SAMPLE_FOLDER, 0)
    with live.LiveBytes() as memory:
        for each in filter(None, (model, told)):
            for parameter in each.parameters():
                memory.add(parameter)
        train(job, model, processor, settings, told)
    print(
        case,
        {k: round(v / 1e6, 1) for k, v in found.items()},
        sum(found.values()) / 1e6,
        memory.peak / 1e6,
    )
    assert sum(found.values()) == pytest.approx(memory.peak, rel=0.15)
