"""One stage of training, exactly resumed."""

import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from clinkd.config import DistillConfig, TrainConfig
from clinkd.data.collate import AnswerDataset, collate
from clinkd.data.lengths import require_fit
from clinkd.data.packing import PackedRows, pack_rows
from clinkd.data.records import Record
from clinkd.data.teacher_cache import TeacherCache
from clinkd.errors import Preempted, SetupError
from clinkd.train.adapter import merged
from clinkd.train.answer_trainer import AnswerTrainer
from clinkd.train.checkpoint import save_model, whole_state
from clinkd.train.job import Job
from clinkd.train.loading import plain_errors
from clinkd.train.loss import answer_forward
from clinkd.train.manifest import latest_whole, require_same_run
from clinkd.train.parallel import deepspeed_config, from_first, is_first, world_size
from clinkd.train.sampler import Filled, Numbered
from clinkd.train.teachers import CachedRows, CachedTeacher, LiveTeacher, Teacher
from clinkd.train.watch import Watch

LETTERS_A_TOKEN = 4  # about, in English


def train(
    job: Job,
    model: PreTrainedModel,
    processor: Any,
    settings: TrainConfig,
    teacher: PreTrainedModel | TeacherCache | None = None,
    *,
    teacher_vocabulary: int | None = None,
) -> float:
    """Train on the records' answers, and from a teacher's distributions if one is given.

    Goes on from the last whole checkpoint of `job.output`; writes the finished model there.

    Args:
        settings: a `DistillConfig` where there is a teacher.
        teacher_vocabulary: tokens of a live teacher; default: as many as the student has.

    Returns:
        The mean loss of the last logged steps, a resumed run's earlier ones included.

    Raises:
        DataError: a record that does not fit, before any step.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was written.
        KeyboardInterrupt: Ctrl-C; so it was.
        ClinkdError: the loss is not finite.
        SetupError: no space left for a checkpoint; the last one is whole.
    """
    _require_logger(job)
    encoded = AnswerDataset(job.records, job.data_root, processor, settings.max_length)
    dataset: Any = encoded
    vocabulary = len(processor.tokenizer)
    told: Teacher | None = None
    if isinstance(teacher, TeacherCache):
        dataset, told = CachedRows(dataset, teacher), CachedTeacher(teacher)
    elif teacher is not None:
        told = LiveTeacher(teacher, min(vocabulary, teacher_vocabulary or vocabulary))
    require_fit(encoded)
    held = set(job.held_out)
    places = [i for i in range(len(dataset)) if i not in held]
    learned: Any = Numbered(dataset, places)
    if settings.packing:
        lengths = [encoded.length(job.records[place]) for place in places]
        learned = PackedRows(learned, pack_rows(lengths, settings.max_length, job.seed))
        lengths = [1] * len(learned)
    else:
        lengths = [_length(encoded, job.records[place]) for place in places]
    checkpoints = job.output / "checkpoints"
    arguments = _arguments(job, settings, checkpoints, len(learned))
    if arguments.world_size > 1 and lengths:
        learned = Filled(learned, min(range(len(lengths)), key=lengths.__getitem__))
    if isinstance(told, LiveTeacher):
        told.to(arguments.device)
    callback = Watch(job)
    callback.weights = sum(
        getattr(p, "ds_numel", p.numel())  # the former where DeepSpeed has cut it
        for name, p in model.named_parameters()
        if "embed_tokens" not in name
    )
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=learned,
        eval_dataset=Numbered(dataset, sorted(held)) if held else None,
        data_collator=partial(collate, pad_token_id=processor.tokenizer.pad_token_id),
        callbacks=[callback],
        processing_class=processor,
        records=job.records,
        lengths=lengths,
        teacher=told,
        kd=settings if told is not None and isinstance(settings, DistillConfig) else None,
        made_by={"processes": world_size(), "strategy": job.strategy},
    )
    trainer.remove_callback(PrinterCallback)  # our own log says it
    if settings.gradient_checkpointing:
        # the former from transformers 5.24 on
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)()
    last, problems = from_first(lambda: latest_whole(checkpoints))
    if is_first():
        for problem in problems:
            warnings.warn(f"{problem}; going on from {last}", stacklevel=2)
    if last is not None:
        require_same_run(last, trainer.made_by)
    done = int(last.name.rsplit("-", 1)[1]) if last else 0
    if is_first():
        job.log.forget(job.stage, after_step=done if last else -1)
    trainer.watch = callback
    if last is not None:
        trainer.take_up_row(last)
    whole_tower = job.strategy != "ddp"
    learning = answer_forward(model, vocabulary, whole_tower=whole_tower)
    with callback.signals(), learning, _logger_errors(job), plain_errors():
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.require_finite()
    if callback.preempted:
        step = trainer.state.global_step
        if callback.interrupted:
            raise KeyboardInterrupt
        raise Preempted(f"stage {job.stage}: stopped by a signal at step {step}, all saved")
    state = whole_state(trainer, model) if job.strategy == "zero3" else None
    if is_first():
        plain = merged(model, model.config._name_or_path)
        save_model(job.output, plain, processor, state)
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if job.wandb and is_first():
        import wandb

        wandb.finish()  # the next stage is a run of its own
    return callback.last_loss


def _length(dataset: AnswerDataset, record: Record) -> int:
    """About as many tokens as a record has, without a tokenizer."""
    letters = sum(len(turn.value) for turn in record.conversations)
    return letters // LETTERS_A_TOKEN + sum(dataset.image_tokens(record))


def _arguments(
    job: Job, settings: TrainConfig, checkpoints: Path, records: int
) -> TrainingArguments:
    world = world_size()
    step_records = settings.batch_size * settings.gradient_accumulation * world
    steps = math.ceil(math.ceil(records / step_records) * settings.epochs)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        # on a GPU the plain one makes a temporary copy of all weights
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        bf16=job.bfloat16 and torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if job.held_out else "no",
        eval_steps=settings.save_steps,
        per_device_eval_batch_size=settings.batch_size,
        prediction_loss_only=True,
        metric_for_best_model="eval_loss" if job.held_out else None,
        greater_is_better=False,
        include_num_input_tokens_seen="non_padding",
        logging_strategy="steps",
        logging_steps=min(settings.log_steps, steps),  # a short stage is logged as well
        logging_nan_inf_filter=False,  # a NaN must be seen, not smoothed over
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=job.dataloader_workers,
        # or each epoch starts new ones, which have no image yet and know no shard of a cache
        dataloader_persistent_workers=job.dataloader_workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=["wandb"] if job.wandb else [],
        run_name=job.stage,
        deepspeed=deepspeed_config(job.strategy, job.offload),
        ddp_backend="gloo" if world > 1 and not torch.cuda.is_available() else None,
        # a batch without images leaves the vision tower out
        ddp_find_unused_parameters=world > 1 and not all(r.images for r in job.records),
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    if job.dataloader_workers:  # those of Python 3.14 would be given all records as a pickle
        arguments.dataloader_multiprocessing_context = "fork"
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each of them warns
    if arguments.n_gpu > 1:  # else the Trainer spreads one process over all GPUs that it sees
        arguments._n_gpu = 1
    return arguments


def _require_logger(job: Job) -> None:
    if job.wandb and find_spec("wandb") is None:
        raise SetupError(
            f"log.wandb={job.wandb!r} needs Weights & Biases: pip install clinkd[wandb]"
        )
    if job.wandb:
        os.environ["WANDB_PROJECT"] = job.wandb
        # else some 30 lines a stage of what metrics.jsonl holds; warnings and errors still come
        os.environ.setdefault("WANDB_SHOW_INFO", "false")


@contextmanager
def _logger_errors(job: Job) -> Iterator[None]:
    """Turn what Weights & Biases refuses, as where it has no key, into a SetupError."""
    if not job.wandb:
        yield
        return
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise SetupError(
            f"log.wandb={job.wandb!r}: {error} WANDB_MODE=offline keeps all on this machine"
        ) from None
