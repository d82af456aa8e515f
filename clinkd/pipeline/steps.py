"""What several stages do: load a model, train it, let it answer, ask the teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel

from clinkd import generate, models
from clinkd.config import DEMO, RunConfig, TrainConfig
from clinkd.data.collate import AnswerDataset
from clinkd.data.records import Record
from clinkd.data.teacher_cache import TeacherCache
from clinkd.generate.select import Selection
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.paths import data_root
from clinkd.progress import Update
from clinkd.rotary import PositionConfig
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.teachers import cache_spec, fill_cache
from clinkd.train.trainer import train


def start_of(folder: RunFolder) -> str:
    """The untrained student: a name or folder."""
    student = folder.config.model.student
    return str(folder.student("base")) if student == DEMO else student


def positions_of(config: RunConfig) -> PositionConfig:
    return PositionConfig(
        preset=config.model.positions.preset, pos_scale=config.model.positions.pos_scale
    )


def load_model(
    config: RunConfig, path: str, *, training: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A model with its positions applied, and its processor with the configured image sizes.

    For training the weights are float32 whatever the arithmetic: bfloat16 would round most steps of
    a small learning rate away.
    """
    dtype = torch.float32 if training else getattr(torch, config.model.dtype)
    model = models.load(path, positions=positions_of(config), dtype=dtype)
    processor = AutoProcessor.from_pretrained(
        path,
        size={"shortest_edge": config.model.min_pixels, "longest_edge": config.model.max_pixels},
    )
    if torch.cuda.is_available():
        model = model.cuda()
    return model, processor


def train_model(
    folder: RunFolder,
    stage: str,
    model: PreTrainedModel,
    processor: Any,
    records: Sequence[Record],
    settings: TrainConfig,
    progress: Update,
    output: Path | None = None,
    teacher_model: PreTrainedModel | TeacherCache | None = None,
) -> float:
    if folder.config.model.freeze_vision:
        model.model.visual.requires_grad_(False)
    job = Job(
        stage=stage,
        output=output or folder.teacher,
        log=MetricsLog(folder.path / "metrics.jsonl"),
        records=records,
        data_root=data_root(folder.config.data),
        seed=folder.config.seed,
        progress=progress,
        bfloat16=folder.config.model.dtype == "bfloat16",
    )
    return train(job, model, processor, settings, teacher_model)


def answer(
    folder: RunFolder,
    model: PreTrainedModel,
    processor: Any,
    records: Sequence[Record],
    output: Path,
    progress: Update,
    beams: int = 1,
    samples: int = 1,
    scorer: Any = None,
    selection: Selection = "beam",
) -> None:
    """Write a model's answers to records, as prediction rows in the records' order."""
    config = folder.config.generate
    generate.answer_records(
        model.eval(),
        processor,
        records,
        data_root(folder.config.data),
        output,
        beams=beams,
        samples=samples,
        max_new_tokens=config.max_new_tokens,
        length_penalty=config.length_penalty,
        batch_size=config.batch_size,
        scorer=scorer,
        selection=selection,
        mix=config.mix,
        progress=progress,
    )


def teacher_for(
    folder: RunFolder, records: Sequence[Record], processor: Any, progress: Update
) -> PreTrainedModel | TeacherCache:
    """The teacher itself, or a whole cache of what it says."""
    if folder.config.distill.teacher_cache == "none":
        return load_model(folder.config, str(folder.teacher))[0]
    cache = open_cache(folder, records, processor)
    if not cache.whole():
        model = load_model(folder.config, str(folder.teacher))[0]
        settings = folder.config.distill
        root = data_root(folder.config.data)
        dataset = AnswerDataset(records, root, processor, settings.max_length)
        fill_cache(cache, model, dataset, settings.batch_size, progress)
    return cache


def open_cache(folder: RunFolder, records: Sequence[Record], processor: Any) -> TeacherCache:
    """The run's cache for its settings, whole or not.

    Raises:
        DataError: what is there was made from something else.
    """
    config = folder.config
    root = data_root(config.data)
    spec = cache_spec(config.distill, config.model, records, root, processor, folder.teacher)
    name = f"top-{spec.width}-at-{spec.temperature:g}" if spec.kind == "top-k" else "hidden"
    return TeacherCache(folder.path / "teacher-cache" / name, spec)
