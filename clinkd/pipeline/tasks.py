"""What the processes of a run share: to train a model, to ask the teacher, to answer questions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from clinkd import generate
from clinkd.config import DEMO
from clinkd.data.collate import AnswerDataset
from clinkd.data.select import held_out_places
from clinkd.data.teacher_cache import TeacherCache
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.paths import data_root
from clinkd.pipeline.steps import (
    asked_records,
    asks_live,
    cached_records,
    load_model,
    load_processor,
    load_teacher,
    open_cache,
    shared_vocabulary,
    stage_records,
    start_of,
    uses_cache,
)
from clinkd.pipeline.workers import in_processes, process_count
from clinkd.progress import Update
from clinkd.train.adapter import add_adapter
from clinkd.train.job import Job
from clinkd.train.log import MetricsLog
from clinkd.train.teachers import fill_cache
from clinkd.train.trainer import train


@dataclass(frozen=True)
class TrainTask:
    """One training stage.

    Attributes:
        stage: teacher, distill or correct-k.
        start: name or folder of the model to begin with.
        output: folder of the finished one.
    """

    stage: str
    start: str
    output: str


@dataclass(frozen=True)
class CacheTask:
    """The shards that the run's teacher cache still lacks."""


@dataclass(frozen=True)
class AnswerTask:
    """A model's answers to a split.

    Attributes:
        model: name or folder.
        records: `train`, `test`, or `correct-k`: those that round k asks.
        output: the file of predictions.
        beams: of the search; 1 is greedy.
        final: keep the configured samples and let the configured selection choose.
    """

    model: str
    records: str
    output: str
    beams: int = 1
    final: bool = False


Task = TrainTask | CacheTask | AnswerTask


def run_task(folder: RunFolder, task: Task, progress: Update) -> str:
    """Do a task in this process, or in all those that `parallel` asks for; one line on it."""
    config = folder.config
    count = process_count(config)
    cut = config.parallel.strategy != "ddp" or config.parallel.teacher_place != "whole"
    if count == 1 and not (cut and isinstance(task, TrainTask)):
        return perform(folder, task, progress)
    summary = in_processes(folder.path, task, config, progress)
    if isinstance(task, AnswerTask):
        generate.join_parts(task.output, count)
    return summary


def perform(folder: RunFolder, task: Task, progress: Update, rank: int = 0, world: int = 1) -> str:
    """This process's part of a task; one line on it."""
    if isinstance(task, TrainTask):
        return _train(folder, task, progress)
    if isinstance(task, CacheTask):
        return _fill(folder, progress, rank, world)
    return _answer(folder, task, progress, rank, world)


def _train(folder: RunFolder, task: TrainTask, progress: Update) -> str:
    config = folder.config
    settings = getattr(config, task.stage.split("-")[0])
    records = stage_records(folder, task.stage)
    model, processor = load_model(config, task.start, training=True)
    if config.model.freeze_vision:
        model.model.visual.requires_grad_(False)
    model = add_adapter(model, config.model.adapter, config.seed)
    told: PreTrainedModel | TeacherCache | None = None
    tokens = None
    if task.stage == "distill" and uses_cache(config):
        told = open_cache(folder, records, processor)
    elif task.stage == "distill" and asks_live(config):
        told = load_teacher(config, str(folder.teacher))
        tokens = shared_vocabulary(folder, processor)
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
        held_out=held_out_places(records, settings.held_out, config.seed, data_root(config.data)),
        tensorboard=folder.path / "tensorboard",
        wandb=config.log.wandb,
        dataloader_workers=config.parallel.dataloader_workers,
    )
    loss = train(job, model, processor, settings, told, teacher_vocabulary=tokens)
    return f"{len(records)} records, loss {loss:.3f}"


def _fill(folder: RunFolder, progress: Update, rank: int, world: int) -> str:
    config = folder.config
    records = cached_records(folder)
    processor = load_processor(config, start_of(folder))
    cache = open_cache(folder, records, processor)
    if not cache.whole():
        model, _ = load_model(config, str(folder.teacher))
        dataset = AnswerDataset(
            records, data_root(config.data), processor, config.distill.max_length
        )
        tokens = shared_vocabulary(folder, processor)
        fill_cache(cache, model, dataset, config.distill.batch_size, progress, rank, world, tokens)
    return f"teacher cache of {len(records)} records"


def _answer(folder: RunFolder, task: AnswerTask, progress: Update, rank: int, world: int) -> str:
    """Write prediction rows in the records' order, or those of this process's part of them."""
    config = folder.config.generate
    model, processor = load_model(folder.config, task.model)
    scorer: Any = None
    if task.final and config.asks_scorer:
        name = f"local-dir:{folder.scorer}" if config.scorer == DEMO else config.scorer
        scorer = generate.ClipScorer.load(name, model.device)
    records = asked_records(folder, task.records)
    generate.answer_records(
        model.eval(),
        processor,
        records,
        data_root(folder.config.data),
        task.output,
        beams=task.beams,
        samples=config.num_samples if task.final else 1,
        max_new_tokens=config.max_new_tokens,
        length_penalty=config.length_penalty,
        batch_size=config.batch_size,
        scorer=scorer,
        selection=config.selection if task.final else "beam",
        mix=config.mix,
        progress=progress,
        rank=rank,
        world=world,
    )
    return f"{len(records)} answers"
