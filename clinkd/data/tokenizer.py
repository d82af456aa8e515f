"""A small BPE tokenizer with Qwen2-VL's special tokens, trained on the texts at hand."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from clinkd.errors import ConfigError

# Qwen2-VL's own, in its order (151643 … 151656 there)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# ChatML as Qwen2-VL writes it, without the default system prompt
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's splitting of words and digits.

    Args:
        texts: questions and answers of the training split.
        vocabulary: most tokens to learn, the 256 bytes and the special tokens included.
    """
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(SPECIAL_TOKENS),
            show_progress=False,
        ),
    )
    learnt = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def require_same_tokens(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Make sure that two tokenizers number their common tokens alike; one may have some more.

    Raises:
        ConfigError: they do not, so that there is no distribution to distil; the first difference.
    """
    first, second = student.get_vocab(), teacher.get_vocab()
    words = {number: word for word, number in first.items()}
    for word, number in sorted(second.items(), key=lambda item: item[1]):
        if number in words and words[number] != word:
            raise ConfigError(
                f"the teacher ({teacher_name}) and the student ({student_name}) have different "
                f"tokens: {number} is {word!r} for one and {words[number]!r} for the other; "
                "take two models of one family"
            )
