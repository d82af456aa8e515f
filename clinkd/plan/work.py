"""A run's plan: steps of each stage, memory by number of GPUs and strategy, disk, money."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from clinkd.config import DEMO, RunConfig, TrainConfig
from clinkd.data.checks import check_dataset
from clinkd.data.collate import AnswerDataset
from clinkd.data.records import Record, read_records
from clinkd.data.select import limit_records
from clinkd.errors import DataError
from clinkd.pipeline.paths import data_root, records_file
from clinkd.pipeline.steps import asks_live, load_processor, read_config, uses_cache
from clinkd.plan.memory import device_memory, numbers
from clinkd.plan.sizes import ModelSize, RecordSize, model_size, record_size
from clinkd.train.correctors import Case
from clinkd.train.correctors.limits import Spending
from clinkd.train.correctors.prompt import messages
from clinkd.train.correctors.wire import estimate_tokens

GPUS = (1, 2, 4, 8, 16, 32, 64)
CARDS = (40, 80)  # GB
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
RESERVE = 0.08  # of a card: CUDA's context, the allocator's gaps
MEASURED = 64  # records that are encoded to learn how long they are


def make_plan(config: RunConfig) -> dict[str, Any]:
    """What a run of this configuration will take; no weights are loaded.

    Returns:
        `records` (their sizes), `models` (parameters by part), `stages` (records, steps and memory
        by part for each number of GPUs), `strategies` (peak bytes), `disk` and `correction`.

    Raises:
        DataError: records or images cannot be read.
        SetupError: a model's config cannot be read.
    """
    path = records_file(config.data.train, "train")
    train = limit_records(read_records(path), config.data.train_limit, config.seed)
    if not train:
        raise DataError(f"data.train: {path} holds no record")
    processor, student, teacher = _models(config, train)
    dataset = AnswerDataset(train, data_root(config.data), processor, 1 << 20)
    places = random.Random(config.seed).sample(range(len(train)), min(MEASURED, len(train)))
    measured = [train[place] for place in places]
    if faults := check_dataset(measured, None, dataset.data_root):
        raise DataError(f"{faults[0]}. List all: clinkd data check")
    shape = record_size(dataset, places)
    stages = _stages(config, train)
    live = asks_live(config)
    head_only = uses_cache(config) and config.distill.teacher_cache == "hidden"

    def memory(stage: str, config: RunConfig, world: int) -> dict[str, int]:
        trained = teacher if stage == "teacher" else student
        asked = teacher if stage == "distill" and live else None
        cached = teacher if stage == "distill" and head_only else None
        return device_memory(trained, asked, shape, stages[stage][1], config, world, cached=cached)

    return {
        "records": asdict(shape) | {"measured": len(places), "all": len(train)},
        "models": {"student": _parts(student), "teacher": _parts(teacher)},
        "stages": {
            name: {
                "records": count,
                "steps": {world: _steps(count, settings, world, shape) for world in GPUS},
                "memory": {world: memory(name, config, world) for world in GPUS},
            }
            for name, (count, settings) in stages.items()
        },
        "strategies": {
            strategy: {
                world: max(sum(memory(name, other, world).values()) for name in stages)
                for world in GPUS
            }
            for strategy in STRATEGIES
            if (other := _with_strategy(config, strategy)) is not None
        },
        "disk": _disk(config, student, teacher, shape, len(train)),
        "correction": _correction(config, train),
    }


def _models(config: RunConfig, train: Sequence[Record]) -> tuple[Any, ModelSize, ModelSize]:
    """The processor, and both models' sizes."""
    if config.model.student == DEMO:
        from clinkd.models.demo import build_model, build_processor

        demo, texts = config.model.demo, [t.value for r in train for t in r.conversations]
        bounds = (config.model.min_pixels, config.model.max_pixels)
        processor: Any = build_processor(texts, demo.vocabulary, *bounds)
        first = build_model(processor, demo, config.seed).config
    else:
        first = read_config(config.model.student)
        processor = load_processor(config, config.model.student)
    other = config.model.teacher
    second = first if other in (None, DEMO) else read_config(str(other))
    settings = (config.model.freeze_vision, config.model.adapter)
    return processor, model_size(first, *settings), model_size(second, *settings)


def _parts(size: ModelSize) -> dict[str, int]:
    names = ("vision", "text", "words", "adapters", "total", "trained")
    return {name: getattr(size, name) for name in names}


def _stages(config: RunConfig, train: Sequence[Record]) -> dict[str, tuple[int, TrainConfig]]:
    """Records and settings of each stage that trains."""
    share = max(1, round(config.data.teacher_fraction * len(train)))
    learnt = len(train) * (1 if config.distill.pseudo_labels == "soft" else 2)
    found: dict[str, tuple[int, TrainConfig]] = {
        "teacher": (share, config.teacher),
        "distill": (learnt, config.distill),
    }
    if config.correct.rounds:
        found["correct"] = (len(train), config.correct)  # of each round
    return found


def _steps(records: int, settings: TrainConfig, world: int, shape: RecordSize) -> int:
    if settings.packing:  # rows, nearly full
        records = math.ceil(records * shape.mean_length / settings.max_length)
    one = settings.batch_size * settings.gradient_accumulation * world
    return math.ceil(math.ceil(records / one) * settings.epochs)


def _with_strategy(config: RunConfig, strategy: str) -> RunConfig | None:
    """The same run cut otherwise; None where that is refused."""
    tree = config.model_dump()
    tree["parallel"] |= {"strategy": strategy}
    tree["parallel"]["offload"] = tree["parallel"]["offload"] and strategy != "ddp"
    try:
        return RunConfig.model_validate(tree)
    except ValueError:
        return None


def _disk(
    config: RunConfig, student: ModelSize, teacher: ModelSize, shape: RecordSize, count: int
) -> dict[str, int]:
    """Bytes of the run folder when it is fullest."""
    largest = max(student.total, teacher.total)
    trained = max(student.trained, teacher.trained)
    saved = trained if student.adapters else largest
    if config.parallel.strategy == "ddp":
        one = 4 * saved + 8 * trained
    else:  # weights for loading, DeepSpeed's own, its float32 ones and Adam's two
        one = 2 * numbers(config).weight * largest + 12 * trained
    found = {
        # two are kept, the best beside them, and one is being written
        "checkpoints": (3 + bool(config.teacher.held_out)) * one,
        "models": 4 * (teacher.total + student.total * (1 + config.correct.rounds)),
        "teacher cache": 0,
    }
    tokens = shape.mean_answer * count
    if config.distill.teacher_cache == "top-k":
        found["teacher cache"] = int(tokens * config.distill.teacher_top_k * 4.5)
    elif config.distill.teacher_cache == "hidden":
        width = teacher.config.text_config.hidden_size
        bytes_ = 2 if config.model.dtype == "bfloat16" else 4
        found["teacher cache"] = int(tokens * width * bytes_ + teacher.head * 4)
    return found


def _correction(config: RunConfig, train: Sequence[Record]) -> dict[str, Any]:
    """The most that an endpoint could be asked and paid: every answer of every round is weak."""
    settings = config.correct.corrector
    if settings.kind != "endpoint" or not config.correct.rounds:
        return {"calls": 0, "sent": 0, "received": 0, "cost": 0.0}
    asked = min(len(train), config.correct.records_limit or len(train)) * config.correct.rounds
    some = random.Random(config.seed).sample(list(train), min(MEASURED, len(train)))
    cases = [Case(r.id, r.task, r.question, r.answer, r.answer) for r in some]
    images = [("",) * len(r.images) if settings.send_images else () for r in some]
    prompts = [messages(case, images=given) for case, given in zip(cases, images, strict=True)]
    sent = sum(map(estimate_tokens, prompts)) / len(prompts)
    most = Spending(asked, round(asked * sent), asked * settings.max_tokens)
    return asdict(most) | {"cost": most.cost(settings)}
