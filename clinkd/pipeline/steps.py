"""What several stages do: load a model, train it, let it answer, ask the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel

from clinkd import generate, models
from clinkd.config import DEMO, RunConfig
from clinkd.data.collate import AnswerDataset
from clinkd.data.files import read_jsonl
from clinkd.data.records import Record, Turn, read_records
from clinkd.data.select import held_out_places
from clinkd.data.teacher_cache import TeacherCache
from clinkd.generate.select import Selection
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.paths import data_root
from clinkd.pipeline.workers import process_count, train_in_processes
from clinkd.progress import Update
from clinkd.rotary import PositionConfig
from clinkd.train.adapter import add_adapter, quantisation
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


def load_processor(config: RunConfig, path: str) -> Any:
    """A checkpoint's processor with the configured image sizes."""
    return AutoProcessor.from_pretrained(
        path,
        size={"shortest_edge": config.model.min_pixels, "longest_edge": config.model.max_pixels},
    )


def load_model(
    config: RunConfig, path: str, *, training: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A model with its positions applied, and its processor.

    For training the weights are float32 whatever the arithmetic: bfloat16 would round most steps of
    a small learning rate away. With `model.adapter.kind` qlora they are 4 bits, and frozen.
    """
    dtype = torch.float32 if training else getattr(torch, config.model.dtype)
    extra = quantisation(config.model.adapter) if training else {}
    model = models.load(path, positions=positions_of(config), dtype=dtype, **extra)
    sharded = training and config.parallel.strategy == "zero3"  # DeepSpeed cuts and moves it
    if torch.cuda.is_available() and not extra and not sharded:
        model = model.cuda()
    return model, load_processor(config, path)


@dataclass(frozen=True)
class TrainTask:
    """One training stage of a run, as another process can be told of it.

    Attributes:
        stage: teacher, distill or correct-k.
        start: name or folder of the model to begin with.
        output: folder of the finished one.
    """

    stage: str
    start: str
    output: str


def train_stage(folder: RunFolder, task: TrainTask, progress: Update) -> float:
    """Train in this process, or in those that `parallel` asks for; the last loss."""
    config = folder.config
    if task.stage == "distill" and uses_cache(config):
        processor = load_processor(config, task.start)
        open_cache(folder, stage_records(folder, task.stage), processor, progress)
    if process_count(config) > 1 or config.parallel.strategy != "ddp":
        return train_in_processes(folder.path, task, config, progress)
    return train_here(folder, task, progress)


def train_here(folder: RunFolder, task: TrainTask, progress: Update) -> float:
    """This process's part of the training."""
    config = folder.config
    settings = getattr(config, task.stage.split("-")[0])
    records = stage_records(folder, task.stage)
    model, processor = load_model(config, task.start, training=True)
    if config.model.freeze_vision:
        model.model.visual.requires_grad_(False)
    model = add_adapter(model, config.model.adapter, config.seed)
    told: PreTrainedModel | TeacherCache | None = None
    if task.stage == "distill" and config.distill.pseudo_labels != "hard":
        if uses_cache(config):
            told = open_cache(folder, records, processor)
        else:
            told = load_model(config, str(folder.teacher))[0]
    job = Job(
        stage=task.stage,
        output=Path(task.output),
        log=MetricsLog(folder.path / "metrics.jsonl"),
        records=records,
        data_root=data_root(config.data),
        seed=config.seed,
        progress=progress,
        bfloat16=config.model.dtype == "bfloat16",
        strategy=config.parallel.strategy,
        offload=config.parallel.offload,
        held_out=held_out_places(records, settings.held_out, config.seed),
        tensorboard=folder.path / "tensorboard",
        wandb=config.log.wandb,
    )
    return train(job, model, processor, settings, told)


def uses_cache(config: RunConfig) -> bool:
    """Whether distillation reads the teacher from files."""
    settings = config.distill
    return settings.teacher_cache != "none" and settings.pseudo_labels != "hard"


def stage_records(folder: RunFolder, stage: str) -> list[Record]:
    """What a training stage learns from."""
    if stage == "teacher":
        return read_records(folder.data("teacher"))
    if stage != "distill":
        return read_records(folder.correction(int(stage.split("-")[1])) / "data.jsonl")
    records = read_records(folder.data("train"))
    if folder.config.distill.pseudo_labels != "soft":
        records += _hard_labels(folder, records, folder.config.distill.min_confidence)
    return records


def _hard_labels(folder: RunFolder, records: Sequence[Record], least: float) -> list[Record]:
    """Records that carry the teacher's confident answers in place of the truth."""
    by_id = {record.id: record for record in records}
    out = []
    for row in read_jsonl(folder.path / "pseudo" / "labels.jsonl"):
        if row["confidence"] >= least and row["response"].strip():
            record = by_id[row["id"]]
            turns = (*record.conversations[:-1], Turn("gpt", row["response"]))
            out.append(replace(record, id=f"{record.id}#pseudo", conversations=turns))
    return out


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


def open_cache(
    folder: RunFolder, records: Sequence[Record], processor: Any, fill: Update | None = None
) -> TeacherCache:
    """The run's teacher cache for its settings.

    Args:
        fill: let the teacher write what is missing, and tell this of it.

    Raises:
        DataError: what is there was made from something else.
    """
    config = folder.config
    root = data_root(config.data)
    spec = cache_spec(config.distill, config.model, records, root, processor, folder.teacher)
    name = f"top-{spec.width}-at-{spec.temperature:g}" if spec.kind == "top-k" else "hidden"
    cache = TeacherCache(folder.path / "teacher-cache" / name, spec)
    if fill is not None and not cache.whole():
        model, _ = load_model(config, str(folder.teacher))
        dataset = AnswerDataset(records, root, processor, config.distill.max_length)
        fill_cache(cache, model, dataset, config.distill.batch_size, fill)
    return cache
