"""Records become batches: tokens, labels on the answers only, image patches."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clinkd.data.convention import convention_of, to_model
from clinkd.data.images import image_size, load_image
from clinkd.data.prompt import IMAGE_PLACEHOLDER, chat_messages
from clinkd.data.records import Record
from clinkd.errors import DataError

IGNORE_INDEX = -100
IMAGE_CACHE_BYTES = 256 << 20


class AnswerDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Records encoded for training, on demand; decoded images are kept up to a byte limit.

    Each item holds `input_ids` [S] int64, `labels` [S] int64 (`IGNORE_INDEX` outside the answers),
    `mm_token_type_ids` [S] (1 at image tokens), and with images `pixel_values` [patches, features]
    and `image_grid_thw` [images, 3].
    """

    def __init__(
        self, records: Sequence[Record], data_root: str | Path, processor: Any, max_length: int
    ) -> None:
        self.records = records
        self.data_root = Path(data_root)
        self.processor = processor
        self.max_length = max_length
        self._images: OrderedDict[tuple[str, ...], dict[str, Tensor]] = OrderedDict()
        self._image_bytes = 0
        self._tokens = lru_cache(maxsize=65536)(self._tokens_of)
        self._size = lru_cache(maxsize=65536)(lambda name: image_size(self.data_root, name))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        images = self._encode_images(record)
        merge = self.processor.image_processor.merge_size**2
        grids = images.get("image_grid_thw", ())
        input_ids, labels = self._encode_text(record, [int(g.prod()) // merge for g in grids])
        token_types = (input_ids == self.processor.image_token_id).to(torch.int32)
        item = {"input_ids": input_ids, "labels": labels, "mm_token_type_ids": token_types}
        return item | images

    def length(self, record: Record) -> int:
        """Tokens of a record; its images are not decoded.

        Raises:
            DataError: as for the record itself.
        """
        return len(self._encode_text(record, self.image_tokens(record))[0])

    def texts(self, record: Record) -> list[str]:
        """The turns of a record, their boxes as the model writes them.

        Raises:
            DataError: boxes that it cannot write.
        """
        texts = [turn.value for turn in record.conversations]
        if convention_of(self.processor) == "qwen2":
            return texts
        sizes = self.image_sizes(record)
        try:
            return [to_model(text, self.processor, sizes) for text in texts]
        except ValueError as error:
            raise DataError(f"record {record.id!r}: {error}") from None

    def image_tokens(self, record: Record) -> list[int]:
        """Merged patches of each image."""
        return [self._tokens(*size) for size in self.image_sizes(record)]

    def image_sizes(self, record: Record) -> list[tuple[int, int]]:
        """Width and height of each image, by the record's `size` or the file's header."""
        if len(record.images) == 1 and record.size is not None:
            return [record.size]
        return [self._size(name) for name in record.images]

    def _tokens_of(self, width: int, height: int) -> int:
        images = self.processor.image_processor
        patches: int = images.get_number_of_image_patches(height, width, {})
        return patches // int(images.merge_size) ** 2

    def _encode_images(self, record: Record) -> dict[str, Tensor]:
        if not record.images:
            return {}
        key = record.images
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        images = [load_image(self.data_root, name) for name in key]
        encoded = dict(self.processor.image_processor(images=images, return_tensors="pt"))
        self._images[key] = encoded
        self._image_bytes += _bytes(encoded)
        while self._image_bytes > IMAGE_CACHE_BYTES:
            self._image_bytes -= _bytes(self._images.popitem(last=False)[1])
        return encoded

    def _encode_text(self, record: Record, patches: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens and labels; each prompt is tokenised as generation does, up to the answer."""
        self.require_plain(record)
        chat = chat_messages(self.texts(record), len(patches), record.system)
        ids: list[int] = []
        labels: list[int] = []
        left = iter(patches)
        tokenizer = self.processor.tokenizer
        for prompt, answer in self.pieces(record.id, chat):
            prompt_ids = tokenizer(self._expand(prompt, left), add_special_tokens=False).input_ids
            answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
            ids += prompt_ids + answer_ids
            labels += [IGNORE_INDEX] * len(prompt_ids) + answer_ids
        if len(ids) > self.max_length:
            raise DataError(
                f"record {record.id!r} has {len(ids)} tokens, over max_length "
                f"{self.max_length}: raise max_length or lower model.max_pixels"
            )
        return torch.tensor(ids), torch.tensor(labels)

    def require_plain(self, record: Record) -> None:
        """Make sure that image tokens come from images alone.

        Raises:
            DataError: a text of the record holds them.
        """
        token = self.processor.image_token
        texts = (record.system or "", *(turn.value for turn in record.conversations))
        if any(token in text for text in texts):
            raise DataError(
                f"record {record.id!r}: its text holds {token!r}, which stands for the patches of "
                f"an image; write {IMAGE_PLACEHOLDER}"
            )

    def pieces(self, name: str, chat: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """What the chat template makes of each question and of its answer; images are one token.

        Args:
            name: of the record, for errors.

        Raises:
            DataError: the template changes what stands before a later turn.
        """
        rendered = ""
        for index, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            prompt = self._render(chat[:index], prompt=True)
            full = self._render(chat[: index + 1], prompt=False)
            if not (prompt.startswith(rendered) and full.startswith(prompt)):
                raise DataError(
                    f"record {name!r}: the model's chat template writes earlier turns anew when "
                    "later ones come, so that these would be learned from as they are never asked "
                    "for; make one record of each question"
                )
            yield prompt.removeprefix(rendered), full.removeprefix(prompt)
            rendered = full

    def _render(self, chat: list[dict[str, Any]], *, prompt: bool) -> str:
        """The chat as text; with `prompt`, up to where an answer starts."""
        text: str = self.processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def _expand(self, text: str, patches: Iterator[int]) -> str:
        """Repeat each image token as often as its image has merged patches."""
        parts = text.split(self.processor.image_token)
        out = parts[0]
        for part in parts[1:]:
            out += self.processor.image_token * next(patches) + part
        return out


def _bytes(encoded: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in encoded.values())


def collate(
    items: Sequence[dict[str, Tensor]] | Sequence[list[dict[str, Tensor]]], pad_token_id: int
) -> dict[str, Tensor]:
    """Pad records on the right and stack them, or lay packed rows end to end.

    Args:
        items: encoded records; or lists of them (`PackedRows`).

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` [B, S]; with images
        `pixel_values` [patches, features] and `image_grid_thw` [images, 3] of the whole batch;
        with a cached teacher `teacher_…` [answer tokens, …], in the order of the batch; `places`
        of the records, where items have theirs. Packed rows give B = 1, no padding, and
        `segments` [1, S]: the number of each token's record.
    """
    if items and isinstance(items[0], list):
        return _end_to_end([item for row in items for item in row])  # type: ignore[misc]
    return _padded(items, pad_token_id)  # type: ignore[arg-type]


def _end_to_end(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch = {
        name: torch.cat([item[name] for item in items])[None]
        for name in ("input_ids", "mm_token_type_ids", "labels")
    }
    batch["segments"] = torch.repeat_interleave(lengths)[None]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch | _joined(items)


def _padded(items: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    def pad(name: str, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [item[name] for item in items], batch_first=True, padding_value=value
        )

    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch = {
        "input_ids": pad("input_ids", pad_token_id),
        "mm_token_type_ids": pad("mm_token_type_ids", 0),
        "labels": pad("labels", IGNORE_INDEX),
    }
    length = batch["input_ids"].shape[1]
    batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    return batch | _joined(items)


def _joined(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What is of the whole batch, not of its rows."""
    others = [name for name in items[0] if name == "places" or name.startswith("teacher_")]
    found = {
        name: [item[name] for item in items if name in item]
        for name in ("pixel_values", "image_grid_thw", *others)
    }
    return {name: torch.cat(tensors) for name, tensors in found.items() if tensors}
