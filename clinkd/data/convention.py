"""The boxes of a text as a model family writes them; records hold all in one form, `qwen2`.

Here a text goes to a model, and its answer comes back: everything else sees the form of records.
"""

from collections.abc import Sequence
from typing import Any

from clinkd.data.boxes import PATTERNS, Convention, strip_boxes
from clinkd.data.formats_boxes import Size, convert_boxes, resized_size

_FAMILIES: dict[str, Convention] = {"Qwen2_5_VLProcessor": "qwen2.5", "Qwen3VLProcessor": "qwen3"}
NO_SIZE = (1000, 1000)  # of a text without boxes


def convention_of(processor: Any) -> Convention:
    """What the family of a processor writes; see `clinkd.data.boxes`."""
    return _FAMILIES.get(type(processor).__name__, "qwen2")


def to_model(text: str, processor: Any, sizes: Sequence[Size]) -> str:
    """A text of a record, with its boxes as the model writes them.

    Args:
        sizes: (width, height) in pixels of the record's images.

    Raises:
        ValueError: boxes of a model that counts pixels, and no one size to count them in; a box
            outside the image.
    """
    convention = convention_of(processor)
    if convention == "qwen2" or not ("box_start" in text or "object_ref" in text):
        return text
    has_boxes = PATTERNS["qwen2"].search(text) is not None
    size = _seen(processor, convention, sizes) if has_boxes else NO_SIZE
    return convert_boxes(text, "qwen2", convention, size)


def from_model(text: str, processor: Any, sizes: Sequence[Size]) -> str:
    """A model's answer with its boxes as records have them, also those that are none.

    An answer whose pixels are of nobody knows which image loses its boxes: as thousandths they
    would be wrong ones.
    """
    convention = convention_of(processor)
    if convention == "qwen2" or "bbox_2d" not in text:
        return text
    try:
        size = _seen(processor, convention, sizes)
    except ValueError:
        return strip_boxes(text)
    return convert_boxes(text, convention, "qwen2", size, strict=False)


def _seen(processor: Any, convention: Convention, sizes: Sequence[Size]) -> Size | None:
    """The one size in which the model sees the images, where its boxes count pixels."""
    if convention != "qwen2.5":
        return None
    images = processor.image_processor
    limits = (images.size["shortest_edge"], images.size["longest_edge"])
    factor = images.patch_size * images.merge_size
    seen = {resized_size(size, factor, *limits) for size in sizes}
    if len(seen) != 1:
        raise ValueError(
            f"boxes in pixels of {len(seen)} sizes: the model counts those of one image"
        )
    return seen.pop()
