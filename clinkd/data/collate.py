"""Records become batches: tokens, labels on the answers only, image patches."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clinkd.data.images import load_image
from clinkd.data.prompt import messages
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

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        images = self._encode_images(record)
        input_ids, labels = self._encode_text(record, images)
        if len(input_ids) > self.max_length:
            raise DataError(
                f"record {record.id!r} has {len(input_ids)} tokens, over max_length "
                f"{self.max_length}: raise max_length or lower model.max_pixels"
            )
        token_types = (input_ids == self.processor.image_token_id).to(torch.int32)
        item = {"input_ids": input_ids, "labels": labels, "mm_token_type_ids": token_types}
        return item | images

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

    def _encode_text(self, record: Record, images: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens and labels; each prompt is tokenised as generation does, up to the answer."""
        chat: list[dict[str, Any]] = []
        ids: list[int] = []
        labels: list[int] = []
        rendered = ""
        grids = iter(images.get("image_grid_thw", ()))
        tokenizer = self.processor.tokenizer
        for index in range(0, len(record.conversations), 2):
            question, answer = record.conversations[index : index + 2]
            first = index == 0
            chat += messages(question.value, len(record.images) if first else 0)
            prompt = self._render(chat, prompt=True)
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer.value}]})
            full = self._render(chat, prompt=False)
            prompt_ids = tokenizer(
                self._expand(prompt.removeprefix(rendered), grids), add_special_tokens=False
            ).input_ids
            answer_ids = tokenizer(full.removeprefix(prompt), add_special_tokens=False).input_ids
            ids += prompt_ids + answer_ids
            labels += [IGNORE_INDEX] * len(prompt_ids) + answer_ids
            rendered = full
        return torch.tensor(ids), torch.tensor(labels)

    def _render(self, chat: list[dict[str, Any]], *, prompt: bool) -> str:
        text: str = self.processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def _expand(self, text: str, grids: Any) -> str:
        """Repeat each image token as often as its image has merged patches."""
        merge = self.processor.image_processor.merge_size**2
        parts = text.split(self.processor.image_token)
        out = parts[0]
        for part in parts[1:]:
            out += self.processor.image_token * (int(next(grids).prod()) // merge) + part
        return out


def _bytes(encoded: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in encoded.values())


def collate(items: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad on the right and stack.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` [B, S]; with images
        `pixel_values` [patches, features] and `image_grid_thw` [images, 3] of the whole batch;
        with a cached teacher `teacher_…` [answer tokens, …], in the order of the batch; `places`
        [B] of the records, where items have theirs.
    """

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
    others = [name for name in items[0] if name == "places" or name.startswith("teacher_")]
    for name in ("pixel_values", "image_grid_thw", *others):
        found = [item[name] for item in items if name in item]
        if found:
            batch[name] = torch.cat(found)
    return batch
