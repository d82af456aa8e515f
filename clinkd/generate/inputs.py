"""What a request becomes before the search: checked model inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from clinkd.data.images import to_rgb
from clinkd.data.prompt import encode_prompt
from clinkd.models import check_grids

Inputs = dict[str, Tensor]
_INPUTS = ("input_ids", "pixel_values", "image_grid_thw")


def encode_request(
    request: Mapping[str, Any], model: PreTrainedModel, processor: Any, max_new_tokens: int
) -> Inputs:
    """Model inputs of one request, without padding, checked and on the model's device.

    Args:
        request: as `BeamSearcher.generate` takes it.
        max_new_tokens: for which the context must have room.

    Raises:
        ValueError: the question, its tokens and its images do not fit together, or not the model.
    """
    if "input_ids" in request:
        inputs = {name: torch.as_tensor(request[name]) for name in _INPUTS if name in request}
        ids = inputs["input_ids"]
        if ids.dim() > 1 and len(ids) != 1:
            raise ValueError(f"input_ids must be one prompt, got shape {tuple(ids.shape)}")
        ids = ids.reshape(-1).long()
        if "attention_mask" in request:  # padding, on either side
            ids = ids[torch.as_tensor(request["attention_mask"]).reshape(-1).bool()]
        inputs["input_ids"] = ids[None]
    else:
        if processor is None:
            raise ValueError("a request without input_ids needs a processor")
        images = request.get("images", request.get("image"))
        images = [] if images is None else [images] if isinstance(images, Image.Image) else images
        images = [to_rgb(each) if isinstance(each, Image.Image) else each for each in images]
        if not isinstance(request["question"], str):
            raise ValueError(f"question must be a text, got {request['question']!r:.80}")
        if not request["question"].strip():
            raise ValueError("question must not be empty")
        turns = [*_history(request.get("history", ())), request["question"]]
        encoded = encode_prompt(processor, turns, images, request.get("system"))
        inputs = {name: encoded[name] for name in _INPUTS if name in encoded}
    _check(inputs, model, max_new_tokens)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _history(turns: Any) -> list[str]:
    """Questions and answers that came before."""
    pairs = isinstance(turns, list | tuple) and len(turns) % 2 == 0
    if not pairs or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(
            f"history must be a list of texts, a question and its answer in turn, got {turns!r:.80}"
        )
    return list(turns)


def _check(inputs: Inputs, model: PreTrainedModel, max_new_tokens: int) -> None:
    text = model.config.get_text_config()
    ids = inputs["input_ids"]
    length, most = ids.shape[1], text.max_position_embeddings
    if length == 0:
        raise ValueError("the prompt is empty")
    if length + max_new_tokens > most:
        raise ValueError(
            f"prompt of {length} tokens and {max_new_tokens} new ones exceed the "
            f"model's context of {most}; lower max_new_tokens or the image's max_pixels"
        )
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if windows and length + max_new_tokens > text.sliding_window:
        raise ValueError(
            f"prompt of {length} tokens and {max_new_tokens} new ones exceed the window of "
            f"{text.sliding_window} that layers of this model see; the search has no windows"
        )
    config = model.config
    count = int((ids == config.image_token_id).sum())
    grid = inputs.get("image_grid_thw")
    patches = 0 if grid is None else int(grid.prod(dim=1).sum())
    expected = patches // config.vision_config.spatial_merge_size**2
    if count != expected:
        raise ValueError(f"the prompt has {count} image tokens, its images make {expected}")
    given = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
    if given != patches:
        raise ValueError(f"pixel_values hold {given} patches, image_grid_thw says {patches}")
    if grid is not None:
        check_grids(model, grid)
    if bool((ids == config.video_token_id).any()):
        raise ValueError("the prompt has a video; give its frames as images")
    if int(ids.min()) < 0 or int(ids.max()) >= text.vocab_size:
        raise ValueError(f"input_ids must be 0 to {text.vocab_size - 1}")
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).to(torch.int32)


def reason(error: Exception) -> str:
    """Why a request was refused, in words."""
    return f"the request has no {error}" if isinstance(error, KeyError) else str(error)


def stop_tokens(
    model: PreTrainedModel, processor: Any, ids: Sequence[int] | None, texts: Sequence[str]
) -> tuple[int, ...]:
    """The tokens that end an answer: `ids`, by default the model's own, and those of `texts`."""
    if ids is None:
        own = model.generation_config.eos_token_id
        ids = [] if own is None else own if isinstance(own, list | tuple) else [own]
    found = [int(token) for token in ids]
    for text in texts:
        if processor is None:
            raise ValueError("stop_texts need a processor; without one give stop_ids")
        tokens = processor.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(f"stop_texts must be one token each, {text!r} is {len(tokens)}")
        found += tokens
    return tuple(dict.fromkeys(found))
