"""A tiny Qwen2-VL with a tokenizer of its own, so that nothing is downloaded."""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

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
