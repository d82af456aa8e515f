"""Whether records fit a model, known before any of their images is decoded."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from clinkd.data.collate import AnswerDataset
from clinkd.data.images import image_size
from clinkd.data.prompt import messages
from clinkd.data.records import Record
from clinkd.errors import DataError
from clinkd.positions import check_grids
from clinkd.rotary import PositionConfig

NFC_GROWTH = 3  # normalising makes UTF-8 text at most three times as long


def require_fit(dataset: AnswerDataset) -> None:
    """Make sure that every record can be encoded, before the first training step.

    A byte-level tokenizer makes at most a token of each byte; only records that this bound leaves
    in doubt are encoded.

    Raises:
        DataError: a record of over `max_length` tokens, or with image tokens in its text, which
            would not match its images; it is named.
    """

    @lru_cache(maxsize=1024)
    def frame(turns: int, images: int) -> int:
        """Bytes that the chat template puts around texts; an image token counts as one more."""
        chat = messages("", images)
        for index in range(1, turns):
            role = ("user", "assistant")[index % 2]
            chat.append({"role": role, "content": [{"type": "text", "text": ""}]})
        return len(dataset.render(chat, prompt=False).encode())

    for index, record in enumerate(dataset.records):
        dataset.require_plain(record)
        texts = [turn.value for turn in record.conversations]
        most = sum(len(t) if t.isascii() else NFC_GROWTH * len(t.encode()) for t in texts)
        most += frame(len(texts), len(record.images)) + sum(dataset.image_tokens(record))
        if most > dataset.max_length:
            dataset.length(index)


def require_places(
    records: Sequence[Record],
    root: str | Path,
    processor: Any,
    positions: PositionConfig,
) -> None:
    """Make sure that every image has a place in the positions, and no text holds image tokens.

    Raises:
        DataError: a record whose image is too long for its width, or whose text stands for patches;
            it is named.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    dataset = AnswerDataset(records, root, processor, max_length=1)
    images = processor.image_processor
    factor = images.patch_size * images.merge_size

    @lru_cache(maxsize=65536)
    def fault(width: int, height: int) -> str | None:
        sides = smart_resize(
            height, width, factor, images.size["shortest_edge"], images.size["longest_edge"]
        )
        try:
            grid = (sides[0] // factor, sides[1] // factor)
            check_grids([grid], positions.rule, positions.pos_scale)
        except ValueError as error:
            return str(error)
        return None

    for record in records:
        dataset.require_plain(record)
        for name in record.images:
            size = record.size if len(record.images) == 1 else None
            if why := fault(*(size or image_size(root, name))):
                raise DataError(
                    f"record {record.id!r}: image {name!r} is too long for its width: {why} "
                    "(model.positions.pos_scale), or leave the record out"
                )
