"""Tiny models, with and without a tokenizer of their own, records and a scorer for them."""

import json

import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from clinkd.config import DemoModelConfig
from clinkd.data.records import Record, Turn
from clinkd.models.demo import build_model, build_processor

VOCABULARY, IMAGE_TOKEN = 120, 90


def make_model(seed=0, stops=1, scale=1.0):
    """Random weights; `scale` sharpens the distributions."""
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            bos_token_id=0,
            eos_token_id=list(range(1, 1 + stops)),
            pad_token_id=0,
        ),
        vision_config=dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64, mlp_ratio=2),
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        model.lm_head.weight.mul_(scale)
    model.generation_config.eos_token_id = list(range(1, 1 + stops))
    model.generation_config.pad_token_id = 0
    return model


def make_other(family):
    """A tiny Qwen2.5-VL or Qwen3-VL that takes the same requests."""
    model = make_model()
    text = model.config.text_config.to_dict()
    text = {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    tokens = {
        name: getattr(model.config, name)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id")
    }
    vision = dict(depth=2, num_heads=2, intermediate_size=32, patch_size=14, out_hidden_size=64)
    if family == "qwen2_5_vl":
        kind, config = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig
        vision |= dict(hidden_size=32, fullatt_block_indexes=[1], window_size=56)
    else:
        kind, config = Qwen3VLForConditionalGeneration, Qwen3VLConfig
        vision |= dict(hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=64)
        text |= dict(head_dim=16)
    torch.manual_seed(0)
    other = kind(
        config(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    ).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)
    other.generation_config = model.generation_config
    return other


def make_request(generator, images=1, length=12):
    """A random tokenised prompt with so many images of different sizes."""
    ids, pixels, grids = [], [], []
    for _ in range(images):
        h, w = (2 * int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
        grids.append([1, h, w])
        pixels.append(torch.randn(h * w, 1176, generator=generator))
        ids += torch.randint(2, 80, (2,), generator=generator).tolist()
        ids += [IMAGE_TOKEN] * (h * w // 4)
    extra = int(torch.randint(1, length, (), generator=generator))
    ids += torch.randint(2, 80, (extra,), generator=generator).tolist()
    request = {"id": f"r{generator.initial_seed()}-{len(ids)}", "input_ids": ids}
    if images:
        request |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    return request


def requests_of(seed, count=6, images=(0, 1, 1, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [make_request(generator, images[i % len(images)]) for i in range(count)]


QUESTIONS = ("Where is the liver?", "What is this?", "Describe the whole image, please.")


def make_records(root, count=11):
    generator = torch.Generator().manual_seed(0)
    records = []
    for index in range(count):
        pixels = torch.randint(0, 255, (40 + 8 * index, 60, 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / f"{index}.png")
        turns = (
            Turn("human", f"<image>\n{QUESTIONS[index % 3]}"),
            Turn("gpt", f"The liver. <|box_start|>({index},2),(30,40)<|box_end|>"),
        )
        boxes = ((index, 2, 30, 40),)
        records.append(Record(f"r{index}", (f"{index}.png",), "ct", "VG", "g", turns, boxes))
    return records


def make_processor():
    texts = [*QUESTIONS, "The liver. <|box_start|>(1,2),(30,40)<|box_end|>"] * 3
    return build_processor(texts, 400, 3136, 12544)


def make_demo(processor):
    size = DemoModelConfig(layers=2, width=64, vision_layers=1, vision_width=32, vocabulary=400)
    model = build_model(processor, size, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


class ColourScorer:
    """Stands in for CLIP: the share of a letter; NaN or an error where asked."""

    class backend:
        model = torch.nn.Linear(1, 1)

    def __init__(self, nan_on=None):
        self.nan_on = nan_on

    def parts(self, text):
        return [text]

    def score(self, image, texts):
        value = float("nan") if image.size == self.nan_on else 0.25
        return [value + 0.01 * len(text) for text in texts]


SETTINGS = dict(beams=2, samples=2, max_new_tokens=5, batch_size=2)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
