"""transformers' Trainer with the distillation loss, exact resumption and whole checkpoints."""

import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from clinkd.train.job import Job
from clinkd.train.loss import answer_forward
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
    dataset: Any = AnswerDataset(job.records, job.data_root, processor, settings.max_length)
    told: Teacher | None = None
    if isinstance(teacher, TeacherCache):
        dataset, told = CachedRows(dataset, teacher), CachedTeacher(teacher)
    elif teacher is not None:
        told = LiveTeacher(teacher)
    checkpoints = job.output / "checkpoints"
    arguments = _arguments(job, settings, checkpoints, len(dataset))
    callback = Watch(job)
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
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
    job.log.forget(job.stage, after_step=int(last.rsplit("-", 1)[1]) if last else -1)
    with callback.signals(), answer_forward(model):
        trainer.train(resume_from_checkpoint=last)
    if callback.preempted:
        step = trainer.state.global_step
        raise Preempted(f"stage {job.stage}: stopped by a signal at step {step}, all saved")
    save_model(job.output, model, processor)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return callback.last_loss


def save_model(folder: Path, model: PreTrainedModel, processor: Any) -> None:
    """Write a Hugging Face model folder; `config.json`, which loading starts from, comes last."""
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        files = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in files:
            os.replace(path, folder / path.name)
    except OSError as error:
        raise SetupError(f"{folder}: the model cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _arguments(
    job: Job, settings: TrainConfig, checkpoints: Path, records: int
) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
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
        logging_strategy="steps",
        logging_steps=min(settings.log_steps, steps),  # a short stage is logged as well
        logging_nan_inf_filter=False,  # a NaN must be seen, not smoothed over
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=not torch.cuda.is_available(),
    )


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
        self._logged_step = 0
        self._staging: str | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        dataset = self.train_dataset
        lengths = [len(r.question) + len(r.answer) for r in dataset.records]
        return BucketSampler(lengths, self.args.train_batch_size, self.args.data_seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        told = None if self.teacher is None else self.teacher(inputs)
        loss = model(**inputs, teacher=told, kd=self.kd, num_items=num_items_in_batch)
        self._parts.append(torch.stack([loss.ce.detach(), loss.kd.detach()]))
        # gradients are averaged over processes, while num_items counts the tokens of all of them
        total: Tensor = loss.loss * self.accelerator.num_processes
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._parts and "loss" in logs:
            steps = self.state.global_step - self._logged_step
            ce, kd = (torch.stack(self._parts).sum(dim=0) / max(1, steps)).tolist()
            self._logged_step = self.state.global_step
            logs |= {"ce": ce} | ({"kd": kd} if self.kd is not None else {})
            self._parts.clear()
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
        save_weights(self.model, str(folder / "model.safetensors"))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self.model, str(Path(resume_from_checkpoint) / "model.safetensors"))
        self._logged_step = int(resume_from_checkpoint.rsplit("-", 1)[1])

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
                _prune(root, self.args.save_total_limit)
        except OSError as error:
            raise SetupError(
                f"{root / name}: the checkpoint cannot be written ({error.strerror}); "
                "free some space and start again, the one before it is whole"
            ) from error
        finally:
            self._staging = None


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _prune(root: Path, keep: int) -> None:
    steps = sorted(int(path.name.rsplit("-", 1)[1]) for path in root.glob("checkpoint-*"))
    for step in steps[:-keep]:
        shutil.rmtree(root / f"checkpoint-{step}", ignore_errors=True)
