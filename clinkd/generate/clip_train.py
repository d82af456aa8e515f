"""A small CLIP model trained on the training split, for where no pretrained one is at hand."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clinkd.data.boxes import strip_boxes
from clinkd.data.files import write_json
from clinkd.data.images import load_image
from clinkd.data.records import Record
from clinkd.errors import DataError

IMAGE_SIZE = 112
CONTEXT = 48  # tokens of CLIP's BPE
LOG_EVERY = 10
KEPT_IMAGES = 4096  # as tensors of 150 kB; a training split may have many times as many
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "layers": 3,
        "width": 96,
        "head_width": 32,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}


def clip_texts(records: Sequence[Record]) -> dict[str, str]:
    """What `train_clip` learns from, by id: answers without boxes to questions about one image."""
    found = {r.id: strip_boxes(r.answer) for r in records if len(r.images) == 1}
    return {name: text for name, text in found.items() if text}


def train_clip(
    records: Sequence[Record],
    data_root: str | Path,
    output: str | Path,
    *,
    steps: int = 300,
    batch_size: int = 48,
    learning_rate: float = 1e-3,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Train open_clip's model contrastively on images and answers, boxes taken out.

    A batch holds different images and different texts: two records of one image would teach that
    one of its two right texts is wrong.

    Args:
        output: folder in open_clip's layout, loaded with `local-dir:`.
        log: called with rows of the training log.

    Raises:
        DataError: fewer than two different images, or answers.
    """
    import open_clip  # a second that every stage would pay

    texts = clip_texts(records)
    usable = [r for r in records if r.id in texts]
    if min(len(set(texts.values())), len({r.images[0] for r in usable})) < 2:
        raise DataError(
            "train_clip needs at least 2 records with one image and an answer each, and with "
            "different images and different answers"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**MODEL)
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=False, mean=MEAN, std=STD)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)

    @lru_cache(maxsize=KEPT_IMAGES)
    def pixels(name: str) -> Tensor:
        found: Tensor = transform(load_image(data_root, name))
        return found

    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(usable, texts, batch_size, generator)
    model.train()
    for step in range(1, steps + 1):
        batch = next(batches)
        images = torch.stack([pixels(r.images[0]) for r in batch])
        image, text, scale = model(images, tokenizer([texts[r.id] for r in batch]))[:3]
        loss = loss_of(image, text, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if log is not None and (step % LOG_EVERY == 0 or step == steps):
            rate = schedule.get_last_lr()[0]
            log({"stage": "clip", "step": step, "loss": loss.item(), "learning_rate": rate})
        if progress is not None:
            progress(step, steps, f"scorer, loss {loss.item():.2f}")
    _save(model, Path(output))


def _batches(
    records: Sequence[Record], texts: dict[str, str], size: int, generator: torch.Generator
) -> Any:
    """Endless batches of different images and texts."""
    while True:
        batch: list[Record] = []
        seen: set[str] = set()
        for index in torch.randperm(len(records), generator=generator).tolist():
            record = records[index]
            if record.images[0] in seen or texts[record.id] in seen:
                continue
            seen |= {record.images[0], texts[record.id]}
            batch.append(record)
            if len(batch) == size:
                break
        yield batch


def _save(model: torch.nn.Module, folder: Path) -> None:
    """The layout that open_clip reads from hubs and folders; the config, looked for, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    write_json(folder / "open_clip_config.json", json.loads(json.dumps(config)))
