"""How questions become model input: the one place that training and generation share."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
ROLES = ("user", "assistant")


def chat_messages(
    turns: Sequence[str], num_images: int, system: str | None = None
) -> list[dict[str, Any]]:
    """Chat messages for a processor's chat template.

    Images stand before the first question, unless the questions say where with `<image>`.

    Args:
        turns: a question, its answer, the next question, and so on.
        system: the message before the first turn; None: the template's own, if it has one.

    Raises:
        ValueError: the questions name another number of images than there are.
    """
    named = sum(turn.count(IMAGE_PLACEHOLDER) for turn in turns[::2])
    if named not in (0, num_images):
        raise ValueError(
            f"the questions have {named} {IMAGE_PLACEHOLDER} marks for {num_images} images"
        )
    chat = [] if system is None else [{"role": "system", "content": [_text(system)]}]
    for index, turn in enumerate(turns):
        if index % 2:
            content = [_text(turn)]
        elif named:
            content = _marked(turn)
        else:
            content = [{"type": "image"}] * (num_images if index == 0 else 0)
            content = [*content, _text(turn.strip())]
        chat.append({"role": ROLES[index % 2], "content": content})
    return chat


def _marked(question: str) -> list[dict[str, str]]:
    """A question whose images stand where it says."""
    content = []
    for index, part in enumerate(question.split(IMAGE_PLACEHOLDER)):
        if index > 0:
            content.append({"type": "image"})
        if part.strip():
            content.append(_text(part.strip()))
    return content


def _text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def encode_prompt(
    processor: Any,
    turns: Sequence[str],
    images: Sequence[Image.Image],
    system: str | None = None,
) -> dict[str, Any]:
    """Model inputs of the last question, up to where its answer starts; batch dimension 1.

    Args:
        turns, system: of `chat_messages`; the last turn is the question.

    Returns:
        What the processor makes: `input_ids` [1, S], `attention_mask` [1, S],
        `mm_token_type_ids` [1, S] and, with images, `pixel_values` [patches, features] and
        `image_grid_thw` [images, 3].
    """
    text = processor.apply_chat_template(
        chat_messages(turns, len(images), system), tokenize=False, add_generation_prompt=True
    )
    return dict(
        processor(text=[text], images=list(images) or None, return_tensors="pt", padding=False)
    )
