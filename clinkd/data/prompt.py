"""How a question becomes model input: the one place that training and generation share."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"


def messages(question: str, num_images: int, answer: str | None = None) -> list[dict[str, Any]]:
    """Chat messages for a processor's chat template.

    Images stand first unless the question says where with `<image>`.

    Raises:
        ValueError: the question names another number of images than there are.
    """
    named = question.count(IMAGE_PLACEHOLDER)
    if named not in (0, num_images):
        raise ValueError(
            f"the question has {named} {IMAGE_PLACEHOLDER} marks for {num_images} images"
        )
    content: list[dict[str, str]] = []
    if named == 0:
        content += [{"type": "image"}] * num_images
        content.append({"type": "text", "text": question.strip()})
    else:
        for index, part in enumerate(question.split(IMAGE_PLACEHOLDER)):
            if index > 0:
                content.append({"type": "image"})
            if part.strip():
                content.append({"type": "text", "text": part.strip()})
    chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat


def encode_prompt(processor: Any, question: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Model inputs of one question, up to where the answer starts; batch dimension 1.

    Returns:
        What the processor makes: `input_ids` [1, S], `attention_mask` [1, S],
        `mm_token_type_ids` [1, S] and, with images, `pixel_values` [patches, features] and
        `image_grid_thw` [images, 3].
    """
    text = processor.apply_chat_template(
        messages(question, len(images)), tokenize=False, add_generation_prompt=True
    )
    return dict(
        processor(text=[text], images=list(images) or None, return_tensors="pt", padding=False)
    )
