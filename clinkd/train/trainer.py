"""transformers' Trainer with the distillation loss, exact resumption and whole checkpoints."""

import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from clinkd.config import DistillConfig, TrainConfig
from clinkd.data.collate import AnswerDataset, collate
from clinkd.data.teacher_cache import TeacherCache
from clinkd.errors import Preempted, SetupError
from clinkd.train.adapter import merged, trained_state
from clinkd.train.job import Job
from clinkd.train.loss import answer_forward
from clinkd.train.parallel import deepspeed_config, is_first, world_size
from clinkd.train.sampler import BucketSampler
from clinkd.train.teachers import CachedRows, CachedTeacher, LiveTeacher, Teacher
from clinkd.train.watch import Watch


def train(
    job: Job,
    model: PreTrainedModel,
    processor: Any,
    settings: TrainConfig,
    teacher: PreTrainedModel | TeacherCache | None = None,
) -> float:
    """Train on the records' answers, and from a teacher's distributions if one is given.

    Goes on from the last whole checkpoint of `job.output`; writes the finished model there.

    Args:
        settings: a `DistillConfig` where there is a teacher.

    Returns:
        The mean loss of the last logged steps.

    Raises:
        DataError: a record that does not fit, before any step.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was written.
        ClinkdError: the loss is not finite.
        SetupError: no space left for a checkpoint; the last one is whole.
    """
    _require_logger(job)
    dataset: Any = AnswerDataset(job.records, job.data_root, processor, settings.max_length)
    told: Teacher | None = None
    if isinstance(teacher, TeacherCache):
        dataset, told = CachedRows(dataset, teacher), CachedTeacher(teacher)
    elif teacher is not None:
        told = LiveTeacher(teacher)
    held = set(job.held_out)
    learned = Numbered(dataset, [i for i in range(len(dataset)) if i not in held])
    checkpoints = job.output / "checkpoints"
    arguments = _arguments(job, settings, checkpoints, len(learned))
    callback = Watch(job)
    callback.weights = sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name
    )
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=learned,
        eval_dataset=Numbered(dataset, sorted(held)) if held else None,
        data_collator=partial(collate, pad_token_id=processor.tokenizer.pad_token_id),
        callbacks=[callback],
        processing_class=processor,
        teacher=told,
        kd=settings if told is not None and isinstance(settings, DistillConfig) else None,
    )
    trainer.remove_callback(PrinterCallback)  # our own log says it
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    done = int(last.rsplit("-", 1)[1]) if last else 0
    if is_first():
        job.log.forget(job.stage, after_step=done if last else -1)
    trainer.watch, trainer.logged_step = callback, done
    with callback.signals(), answer_forward(model):
        trainer.train(resume_from_checkpoint=last)
    if callback.preempted:
        step = trainer.state.global_step
        raise Preempted(f"stage {job.stage}: stopped by a signal at step {step}, all saved")
    state = _whole_state(trainer, model) if job.strategy == "zero3" else None
    if is_first():
        plain = merged(model, model.config._name_or_path)
        save_model(job.output, plain, processor, state)
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return callback.last_loss


def save_model(
    folder: Path, model: PreTrainedModel, processor: Any, state: dict[str, Tensor] | None = None
) -> None:
    """Write a Hugging Face model folder; `config.json`, which loading starts from, comes last.

    Args:
        state: the weights, where the model itself holds a part of them.
    """
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging, state_dict=state)
        processor.save_pretrained(staging)
        files = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in files:
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SetupError(f"{folder}: the model cannot be written: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _whole_state(trainer: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of which each rank holds a part; all ranks must ask. Tied ones under one name."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    own = {name for name, _ in model.named_parameters()}
    own |= {name for name, _ in model.named_buffers()}
    # the ranks after the first get nothing
    return {name: tensor for name, tensor in (state or {}).items() if name in own}


def _arguments(
    job: Job, settings: TrainConfig, checkpoints: Path, records: int
) -> TrainingArguments:
    world = world_size()
    step_records = settings.batch_size * settings.gradient_accumulation * world
    steps = math.ceil(math.ceil(records / step_records) * settings.epochs)
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
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
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=["wandb"] if job.wandb else [],
        run_name=job.stage,
        deepspeed=deepspeed_config(job.strategy, job.offload),
        ddp_backend="gloo" if world > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=world > 1,  # a batch without images leaves the tower out
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=not torch.cuda.is_available(),
    )


class Numbered(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Some records of a data set, each item with its place there, by which errors name it."""

    def __init__(self, dataset: Any, places: Sequence[int]) -> None:
        self.dataset = dataset
        self.places = places
        self.records = dataset.records

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.places[index]
        item: dict[str, Tensor] = self.dataset[place]
        return item | {"places": torch.tensor([place])}


class AnswerTrainer(Trainer):
    """Loss on answer tokens, divided once by their number over the whole optimiser step."""

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None = None,
        kd: DistillConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if (teacher is None) != (kd is None):
            raise ValueError("teacher and kd go together: give both or neither")
        # our loss divides by the step's token count itself; the Trainer must not divide again
        self.model_accepts_loss_kwargs = True
        self.kd = kd
        self.teacher = teacher
        self._parts: list[Tensor] = []  # (CE, KD) of each micro-batch since the last log line
        self._places: list[Tensor] = []  # of the records in them
        self.watch: Watch | None = None
        self.logged_step = 0
        self._staging: str | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        dataset = self.train_dataset
        records = [dataset.records[place] for place in dataset.places]
        lengths = [len(record.question) + len(record.answer) for record in records]
        return BucketSampler(lengths, self.args.train_batch_size, self.args.data_seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        places = inputs.pop("places")
        told = None if self.teacher is None else self.teacher(inputs)
        loss = model(**inputs, teacher=told, kd=self.kd, num_items=num_items_in_batch)
        if not model.training:
            alone: Tensor = loss.loss
            return alone
        self._parts.append(torch.stack([loss.ce.detach(), loss.kd.detach()]))
        self._places.append(places)
        # gradients are averaged over processes, while num_items counts the tokens of all of them
        total: Tensor = loss.loss * self.accelerator.num_processes
        return total

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The held-out loss of a batch, by its own tokens; no logits exist to return."""
        return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._parts and "loss" in logs:
            steps = self.state.global_step - self.logged_step
            parts = torch.stack(self._parts)
            finite = parts.isfinite().all(dim=1)
            if self.watch is not None and not finite.all():
                places = self._places[int(finite.int().argmin())].tolist()
                self.watch.faulty = [self.train_dataset.records[place].id for place in places]
            total = self.accelerator.reduce(parts.sum(dim=0), "sum")
            ce, kd = (total / max(1, steps)).tolist()
            self.logged_step = self.state.global_step
            logs |= {"ce": ce} | ({"kd": kd} if self.kd is not None else {})
            self._parts.clear()
            self._places.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights of a checkpoint, under the model's own names.

        `save_pretrained` writes the hub's older names, which the Trainer's resumption does not
        know: it would go on from the weights that the run had started with, with a warning alone.
        """
        if state_dict is not None:  # gathered by DeepSpeed, which restores from files of its own
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        adapters = trained_state(self.model)
        if adapters is not None:
            save_file(adapters, str(folder / "adapter.safetensors"))
        else:
            save_weights(self.model, str(folder / "model.safetensors"))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / "adapter.safetensors").exists():
            self.model.load_state_dict(load_file(folder / "adapter.safetensors"), strict=False)
        else:
            load_weights(self.model, str(folder / "model.safetensors"))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a folder that no resumption looks at, then rename: whole or absent."""
        root = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = str(root / ".staging")
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(root / name, ignore_errors=True)
                _sync_files(Path(self._staging))
                os.replace(Path(self._staging) / name, root / name)
                _prune(root, self.args.save_total_limit, self.state.best_model_checkpoint)
        except (OSError, SafetensorError, RuntimeError) as error:  # of three libraries
            reason = error.strerror if isinstance(error, OSError) else error
            raise SetupError(
                f"{root / name}: the checkpoint cannot be written ({reason}); "
                "free some space and start again, the one before it is whole"
            ) from error
        finally:
            self._staging = None


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _prune(root: Path, keep: int, best: str | None) -> None:
    """Keep the last checkpoints, and the best one where a held-out loss says which it is."""
    steps = sorted(int(path.name.rsplit("-", 1)[1]) for path in root.glob("checkpoint-*"))
    for step in steps[:-keep]:
        if best is None or Path(best).name != f"checkpoint-{step}":
            shutil.rmtree(root / f"checkpoint-{step}", ignore_errors=True)


def _require_logger(job: Job) -> None:
    if job.wandb and find_spec("wandb") is None:
        raise SetupError(f"log.wandb={job.wandb!r} needs Weights & Biases: pip install wandb")
    if job.wandb:
        os.environ["WANDB_PROJECT"] = job.wandb
