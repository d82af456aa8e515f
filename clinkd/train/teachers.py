"""What the student is told of the teacher at answer tokens: by a model at hand, or from a cache."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clinkd.config import DistillConfig, ModelConfig
from clinkd.data.collate import IGNORE_INDEX, AnswerDataset, collate
from clinkd.data.convention import convention_of
from clinkd.data.files import sha256_file
from clinkd.data.images import resolve_image
from clinkd.data.records import Record
from clinkd.data.teacher_cache import CacheSpec, TeacherCache, encode_top_k
from clinkd.models import packed_position_ids
from clinkd.train.sharded import engine_of, is_cut

# A batch's inputs -> the teacher's part of the loss at its answer tokens, in the batch's order:
# `hidden` [n, C] and `weight` [V, C], or `logits`, `ids` [n, K] and `lse` [n].
Teacher = Callable[[dict[str, Tensor]], dict[str, Tensor]]
PREFIX = "teacher_"  # of a cached teacher's tensors in a batch


def answer_rows(labels: Tensor) -> Tensor:
    """Places in `hidden[:, :-1].flatten(0, 1)` whose next token belongs to an answer."""
    return (labels[:, 1:].flatten() != IGNORE_INDEX).nonzero().squeeze(1)


def last_hidden(model: Any, inputs: dict[str, Tensor], *, whole_tower: bool = False) -> Tensor:
    """Last hidden states [B, S, C] of a batch; records in a packed row do not see each other.

    Args:
        whole_tower: run the vision tower even if there is no image: where processes gather
            parameters or reduce gradients together, each must take part in all of them.
    """
    inner, inputs = model.model, dict(inputs)
    segments = inputs.pop("segments", None)
    if segments is not None:
        # transformers finds the borders in position ids that come without a mask
        del inputs["attention_mask"]
        grids = inputs.get("image_grid_thw")
        inputs["position_ids"] = packed_position_ids(model, inputs["input_ids"], segments, grids)
    with _blank_image(inner) if whole_tower and "pixel_values" not in inputs else nullcontext():
        hidden: Tensor = inner(**inputs, use_cache=False).last_hidden_state
    return hidden


@contextmanager
def _blank_image(inner: Any) -> Iterator[None]:
    """While open, the words come with 0 times what the vision tower sees in a black patch.

    After the words and before the layers, as where there is an image: DeepSpeed wants one order.
    """
    vision = inner.config.vision_config
    merge, device = vision.spatial_merge_size, inner.visual.device
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(merge**2, features, device=device, dtype=inner.visual.dtype)
    grid = torch.tensor([[1, merge, merge]], device=device)

    def add(_: Any, __: Any, words: Tensor) -> Tensor:
        seen = inner.get_image_features(pixels, grid)
        deep = getattr(seen, "deepstack_features", None) or []  # Qwen3-VL
        return words + torch.stack([p.sum() for p in (*seen.pooler_output, *deep)]).sum() * 0.0

    handle = inner.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class LiveTeacher:
    """A frozen model that sees each batch.

    Args:
        model: whole, or loaded in `clinkd.train.sharded.cut_while_loading`; then all processes ask
            it together.
        vocabulary: tokens that teacher and student both have; rows of the head from there on pad it
            to a round size, or are tokens that the student cannot say.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.model: Any = model.eval().requires_grad_(False)
        self.cut = is_cut(model)
        if self.cut:
            # DeepSpeed gathers and frees by hooks on the whole model's own forward
            self.model.forward = self._say
            self.model = engine_of(model)

    def to(self, device: torch.device) -> None:
        """Move a whole model to where the batches are; DeepSpeed has placed the others."""
        if not self.cut:
            self.model.to(device)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        said: dict[str, Tensor] = self.model(**inputs) if self.cut else self._say(**inputs)
        return said

    def _say(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        model = self.model.module if self.cut else self.model
        hidden = last_hidden(model, inputs, whole_tower=self.cut)
        weight = model.lm_head.weight[: self.vocabulary]
        return {"hidden": hidden[:, :-1].flatten(0, 1)[answer_rows(labels)], "weight": weight}


class CachedTeacher:
    """A cache's rows, which `CachedRows` put into the batch."""

    def __init__(self, cache: TeacherCache) -> None:
        self.head = cache.head() if cache.spec.kind == "hidden" else None

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name in inputs if name.startswith(PREFIX)]
        found = {name.removeprefix(PREFIX): inputs.pop(name) for name in names}
        if self.head is not None:
            self.head = self.head.to(found["hidden"].device)
            found["weight"] = self.head
        return found


class CachedRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Records encoded for training, each with its rows of a cache."""

    def __init__(self, dataset: AnswerDataset, cache: TeacherCache) -> None:
        self.dataset = dataset
        self.cache = cache
        self.records = dataset.records

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.dataset[index]
        found = self.cache.read(index, _answers(item))
        return item | {PREFIX + name.removeprefix(PREFIX): t for name, t in found.items()}


def _answers(item: dict[str, Tensor]) -> Tensor:
    labels = item["labels"][1:]
    return labels[labels != IGNORE_INDEX]


def cache_spec(
    settings: DistillConfig,
    model: ModelConfig,
    records: Sequence[Record],
    data_root: Path,
    processor: Any,
    teacher: Path,
) -> CacheSpec:
    """What a cache for these settings holds, and hashes of all that it is made from.

    Args:
        teacher: folder of the fine-tuned teacher.
    """
    tokenizer = processor.tokenizer
    weights = sorted(teacher.glob("*.safetensors"))
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    top_k = settings.teacher_cache == "top-k"
    chosen = {}
    if settings.pseudo_labels == "both":
        chosen["min_confidence"] = str(settings.min_confidence)
    return CacheSpec(
        kind="top-k" if top_k else "hidden",
        records=len(records),
        width=settings.teacher_top_k if top_k else config["text_config"]["hidden_size"],
        sources={
            "data": _hash(_content(records, data_root)),
            "tokenizer": _hash([tokenizer.backend_tokenizer.to_str()]),
            "template": _hash([processor.chat_template or tokenizer.chat_template or ""]),
            "boxes": convention_of(processor),
            "image_sizes": f"{model.min_pixels} to {model.max_pixels} pixels",
            "positions": json.dumps(model.positions.model_dump(mode="json")),
            "max_length": str(settings.max_length),
            "teacher": _hash(_file_hash(path, path.stat().st_mtime_ns) for path in weights),
            **chosen,
        },
        dtype="float16" if top_k else model.dtype,
        temperature=settings.temperature if top_k else 1.0,
    )


def _content(records: Sequence[Record], data_root: Path) -> Iterator[str]:
    """Text of the records, and the sizes of their images."""
    for record in records:
        turns = [("system", record.system), *((t.role, t.value) for t in record.conversations)]
        sizes = [os.path.getsize(resolve_image(data_root, name)) for name in record.images]
        yield json.dumps([record.id, turns, record.images, sizes, record.size])


@lru_cache
def _file_hash(path: Path, changed: int) -> str:
    """Gigabytes that a stage asks for more than once."""
    return sha256_file(path)


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def fill_cache(
    cache: TeacherCache,
    teacher: PreTrainedModel,
    dataset: AnswerDataset,
    batch_size: int,
    progress: Callable[[int, int, str], None] | None = None,
    rank: int = 0,
    world: int = 1,
    vocabulary: int | None = None,
) -> None:
    """Write the shards that are missing; what is whole stays.

    Args:
        vocabulary: as of `LiveTeacher`; default: all tokens of the student.
        rank: of `world` processes, each of which writes every `world`-th shard.
    """
    tokenizer = dataset.processor.tokenizer
    vocabulary = len(tokenizer) if vocabulary is None else vocabulary
    live = LiveTeacher(teacher, vocabulary)
    spec = cache.spec
    if spec.kind == "hidden" and rank == 0 and not cache.has_head():
        cache.write_head(teacher.lm_head.weight[:vocabulary])
    pad = partial(collate, pad_token_id=tokenizer.pad_token_id)
    shards = [shard for shard in cache.missing() if shard % world == rank]
    done, total = 0, sum(len(cache.shard_range(shard)) for shard in shards)
    for shard in shards:
        places = list(cache.shard_range(shard))
        rows: list[dict[str, Tensor]] = []
        labels: list[Tensor] = []
        for start in range(0, len(places), batch_size):
            items = [dataset[place] for place in places[start : start + batch_size]]
            rows.append(_encode(live(_to(pad(items), teacher.device)), spec))
            labels += [_answers(item) for item in items]
            if progress is not None:
                progress(done + min(start + batch_size, len(places)), total, "teacher cache")
        cache.write(shard, {name: torch.cat([r[name] for r in rows]) for name in rows[0]}, labels)
        done += len(places)


def _encode(found: dict[str, Tensor], spec: CacheSpec) -> dict[str, Tensor]:
    if spec.kind == "hidden":
        return {"hidden": found["hidden"].to(getattr(torch, spec.dtype)).cpu()}
    logits = torch.nn.functional.linear(found["hidden"], found["weight"])
    return encode_top_k(logits, spec.width, spec.temperature)


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
