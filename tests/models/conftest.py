"""Small Qwen-VL models with random weights, and batches with several images a row."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, START, END, PAD = 10, 11, 12, 13, 0
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": True,
}


def _text(sections: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return {
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
        **more,
    }


def build(family: str, seed: int = 0, std: float = 0.1, window: int | None = None) -> Any:
    """A model of the family in float32 on the CPU, with weights large enough to matter.

    With a `window`, for Qwen2-VL, the second of its layers sees so many tokens.
    """
    torch.manual_seed(seed)
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
        text = _text([2, 3, 3])
        if window is not None:
            text |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **TOKENS)
        model = Qwen2VLForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        config = Qwen2_5_VLConfig(text_config=_text([2, 3, 3]), vision_config=vision, **TOKENS)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "patch_size": 14,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        }
        text = _text([4, 2, 2], head_dim=16)
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
        model = Qwen3VLForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    model.generation_config.pad_token_id = PAD
    return model.eval()


ROWS = [
    [5, 6, START] + [IMAGE] * 6 + [END, 7, 8, 9],
    [5, START] + [IMAGE] * 9 + [END, 4, START] + [IMAGE] * 2 + [END, 30, 31, 32, 33],
]
GRIDS = torch.tensor([[1, 4, 6], [1, 6, 6], [1, 2, 4]])  # merged 2 x 3; 3 x 3 and 1 x 2


def batch(side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """Two rows of unlike length with one and two images, padded on one side."""
    length = max(len(row) for row in ROWS)
    ids = torch.full((len(ROWS), length), PAD)
    mask = torch.zeros(len(ROWS), length, dtype=torch.long)
    for i, row in enumerate(ROWS):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    patches = int(GRIDS.prod(1).sum())
    pixels = torch.randn(patches, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": GRIDS,
        "pixel_values": pixels,
    }


def single(row: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """One row of `batch` alone, without padding."""
    full = batch(seed=seed)
    ids = torch.tensor([ROWS[row]])
    grids = (GRIDS[:1], GRIDS[1:])[row]
    start = int(GRIDS[:1].prod()) if row else 0
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": grids,
        "pixel_values": full["pixel_values"][start : start + int(grids.prod(1).sum())],
    }


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def build_model() -> Callable[..., Any]:
    return build


@pytest.fixture
def make_batch() -> Callable[..., dict[str, torch.Tensor]]:
    return batch


@pytest.fixture
def make_single() -> Callable[..., dict[str, torch.Tensor]]:
    return single


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Calls of the fused op as they come: causal, packed."""
    module = sys.modules["clinkd.models.attention"]
    run = module.rotary_attention
    found: list[tuple[bool, bool]] = []

    def counted(*args: Any, causal: bool = True, cu_seqlens: Any = None, **more: Any) -> Any:
        found.append((causal, cu_seqlens is not None))
        return run(*args, causal=causal, cu_seqlens=cu_seqlens, **more)

    monkeypatch.setattr(module, "rotary_attention", counted)
    return found
