"""The embedded default: a small model of Qwen2-VL's architecture with random weights."""

from collections.abc import Iterable

import torch
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from clinkd.config import DemoModelConfig
from clinkd.data.tokenizer import train_tokenizer

HEAD_DIM = 32
# 0.02 suits a width of thousands; with more, a narrow model learns much sooner to read its question
INITIAL_STD = 0.08


def build_processor(
    texts: Iterable[str], vocabulary: int, min_pixels: int, max_pixels: int
) -> Qwen2VLProcessor:
    """Qwen2-VL's processor around a tokenizer trained on `texts`."""
    tokenizer = train_tokenizer(texts, vocabulary)
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=tokenizer.chat_template,
    )


def build_model(
    processor: Qwen2VLProcessor, size: DemoModelConfig, seed: int
) -> Qwen2VLForConditionalGeneration:
    """`Qwen2VLForConditionalGeneration` from random weights; the same seed, the same weights."""
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": size.width,
            "intermediate_size": 3 * size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.width // HEAD_DIM,
            "num_key_value_heads": max(1, size.width // HEAD_DIM // 2),
            "max_position_embeddings": 4096,
            "initializer_range": INITIAL_STD,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [HEAD_DIM // 2 - 2 * (HEAD_DIM * 3 // 16)]
                + 2 * [HEAD_DIM * 3 // 16],
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": size.vision_layers,
            "embed_dim": size.vision_width,
            "num_heads": size.vision_width // HEAD_DIM,
            "hidden_size": size.width,
            "mlp_ratio": 3,
            "initializer_range": INITIAL_STD,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=INITIAL_STD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model
