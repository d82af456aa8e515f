"""What memory depends on: a model's parts, and the longest records of the data."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clinkd.config import AdapterConfig
from clinkd.data.collate import IGNORE_INDEX, AnswerDataset


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a Qwen-VL model, counted on a model without storage, and its config.

    Attributes:
        vision: of the vision tower with its merger.
        text: of the language layers and norms.
        words: of the embedding and the output head; once where they are tied.
        adapters: of low-rank adapters; 0 without.
        trained: of all that get a gradient.
        linear: of all weights that autocast keeps a bfloat16 copy of.
        config: transformers' own.
    """

    vision: int
    text: int
    words: int
    adapters: int
    trained: int
    linear: int
    config: Any

    @property
    def total(self) -> int:
        return self.vision + self.text + self.words + self.adapters

    @property
    def head(self) -> int:
        """Numbers of the output head."""
        text = self.config.text_config
        return int(text.vocab_size) * int(text.hidden_size)


@dataclass(frozen=True)
class RecordSize:
    """The longest of some records, in tokens, and their means.

    Attributes:
        length: tokens of the longest.
        answer: answer tokens of the record with most of them.
        patches: of the largest images, before merging.
        mean_length: tokens a record.
        mean_answer: answer tokens a record.
    """

    length: int
    answer: int
    patches: int
    mean_length: float
    mean_answer: float


def model_size(config: Any, freeze_vision: bool, adapter: AdapterConfig) -> ModelSize:
    """Count a model's parameters.

    Args:
        config: of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    inner = model.model
    vision = _count(inner.visual)
    words = _count(inner.language_model.embed_tokens)
    text = _count(inner.language_model) - words
    if model.lm_head.weight is not inner.language_model.embed_tokens.weight:
        words += _count(model.lm_head)
    adapters = 0
    if adapter.kind != "none":
        wanted = re.compile(adapter.targets)
        linear = [m for name, m in model.named_modules() if wanted.fullmatch(name)]
        adapters = sum(adapter.rank * (m.in_features + m.out_features) for m in linear)
    whole = text + words + (0 if freeze_vision else vision)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    trained = adapters or whole
    return ModelSize(vision, text, words, adapters, trained, matrices, config)


def record_size(dataset: AnswerDataset, places: list[int]) -> RecordSize:
    """Encode some records, as training does, and measure them."""
    lengths, answers, patches = [], [], [0]
    for place in places:
        item = dataset[place]
        lengths.append(len(item["input_ids"]))
        answers.append(int((item["labels"] != IGNORE_INDEX).sum()))
        if "pixel_values" in item:
            patches.append(len(item["pixel_values"]))
    count = max(1, len(lengths))
    return RecordSize(
        max(lengths), max(answers), max(patches), sum(lengths) / count, sum(answers) / count
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
