"""transformers' Trainer with the distillation loss over answer tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from clinkd.config import DistillConfig
from clinkd.data.collate import IGNORE_INDEX
from clinkd.data.records import Record
from clinkd.train.checkpoint import CheckpointTrainer
from clinkd.train.parallel import any_rank
from clinkd.train.sampler import BucketSampler
from clinkd.train.teachers import PREFIX, Teacher
from clinkd.train.watch import Watch

STATE = "trainer_state.json"  # the Trainer's own file in a checkpoint
_ROW = "open_row"  # in a checkpoint's state: what was summed since the last log line


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins.

    accelerate does so too, but not through the loader with which a run is taken up in the middle
    of an epoch on several processes.
    """

    def __init__(self, sampler: BucketSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class AnswerTrainer(CheckpointTrainer):
    """Loss on answer tokens, divided once by their number over the whole optimiser step."""

    def __init__(
        self,
        *args: Any,
        records: Sequence[Record],
        lengths: Sequence[int],
        teacher: Teacher | None = None,
        kd: DistillConfig | None = None,
        **kwargs: Any,
    ) -> None:
        """As the Trainer, and besides:

        Args:
            records: of the training set, for errors that name them.
            lengths: of its items, by which like ones come together.
            teacher, kd: what is distilled and how; both or neither.
        """
        super().__init__(*args, **kwargs)
        if (teacher is None) != (kd is None):
            raise ValueError("teacher and kd go together: give both or neither")
        # our loss divides by the step's token count itself; the Trainer must not divide again
        self.model_accepts_loss_kwargs = True
        self.records = records
        self.kd = kd
        self.teacher = teacher
        self._parts: list[Tensor] = []  # (CE, KD) of each micro-batch since the last log line
        self._places: list[Tensor] = []  # of the records in them
        # of the parts of this process, in one order however often a run is cut off
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self._sampler = BucketSampler(
            lengths, self.args.train_batch_size, self.args.data_seed, self.args.world_size
        )
        self.add_callback(_Epochs(self._sampler))
        self.watch: Watch | None = None
        self.logged_step = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        return self._sampler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; under DeepSpeed the Trainer's own also rounds all floats to the model's.

        What a cache says of the teacher stays as it is: a log-sum-exp of bfloat16 is off by 3 %.
        """
        told = {
            name: tensor.to(self.args.device)
            for name, tensor in inputs.items()
            if name.startswith(PREFIX)
        }
        others = {name: value for name, value in inputs.items() if name not in told}
        prepared: dict[str, Any] = super()._prepare_inputs(others)
        return prepared | told

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if model.training and num_items_in_batch is None:
            raise RuntimeError(
                "the Trainer gave no token count of the optimiser step: this version of "
                "transformers would divide the loss batch by batch"
            )
        places = inputs.pop("places")
        told = None if self.teacher is None else self.teacher(inputs)
        loss = model(**inputs, teacher=told, kd=self.kd, num_items=num_items_in_batch)
        if not model.training:
            alone: Tensor = loss.loss
            return alone
        self._parts.append(torch.stack([loss.ce.detach(), loss.kd.detach()]))
        self._sums += self._parts[-1]
        self._places.append(places)
        # gradients are averaged over processes, while num_items counts the tokens of all of them
        total: Tensor = loss.loss * self.accelerator.num_processes
        return total

    @torch.no_grad()
    def evaluation_loop(
        self, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """The loss of the held-out records, every token of each of them once.

        The Trainer's own takes the mean of batches, and counts some records twice where the
        processes cannot share them evenly. No logits exist to return. All processes make as many
        forward passes, as ZeRO-3 needs it; one that has no record left does so for nothing.
        """
        model = self._wrap_model(self.model, training=False)
        model.eval()
        size, count = self.args.per_device_eval_batch_size, len(self.eval_dataset)
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, tokens
        for start in range(0, count, size * self.args.world_size):
            first = start + size * self.args.process_index
            mine = range(first, min(first + size, count))
            items = [self.eval_dataset[place] for place in mine or range(1)]
            inputs = self._prepare_inputs(self.data_collator(items))
            tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
            loss = self.compute_loss(model, inputs)
            if mine:
                sums += torch.stack([loss.double() * tokens, tokens.double()])
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(1.0, tokens)}
        return EvalLoopOutput(None, None, metrics, count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._parts and "loss" in logs:
            steps = self.state.global_step - self.logged_step
            self._find_faulty(torch.stack(self._parts))
            total = self.accelerator.reduce(self._sums, "sum")
            ce, kd = (total / max(1, steps)).tolist()
            self.logged_step = self.state.global_step
            self._sums.zero_()
            part = 0.0 if self.kd is None else self.kd.kd_weight
            # the Trainer's own does not count the steps before a resumption
            logs |= {"loss": (ce + part * kd) / (1 + part), "ce": ce}
            logs |= {"kd": kd} if self.kd is not None else {}
            if self.watch is not None:
                logs |= self.watch.measure(self.state)  # before any callback sends them on
            self._parts.clear()
            self._places.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite()  # the checkpoints before it must not give way to such a one
        sums = self.accelerator.gather(self._sums[None])  # [processes, 2]
        row = {"since": self.logged_step, "sums": sums.tolist()}
        self.state.stateful_callbacks[_ROW] = row
        super()._save_checkpoint(model, trial)

    def take_up_row(self, checkpoint: Path) -> None:
        """Go on with the log line that a checkpoint was written before."""
        text = (checkpoint / STATE).read_text(encoding="utf-8")
        state = json.loads(text)
        row = state["stateful_callbacks"].get(_ROW)
        if row is None:  # of an earlier version: the line begins here
            self.logged_step = state["global_step"]
            return
        self.logged_step = row["since"]
        self._sums += torch.tensor(row["sums"][self.args.process_index], dtype=torch.float64).to(
            self._sums.device
        )

    def require_finite(self) -> None:
        """Raise on every rank where a weight of one is no number; all must ask."""
        learned = (p for p in self.model.parameters() if p.requires_grad)
        # of a weight that DeepSpeed has cut, this rank's share
        sums = [getattr(p, "ds_tensor", p).detach().sum(dtype=torch.float32) for p in learned]
        if not any_rank(not torch.stack(sums).isfinite().all()):
            return
        if self._parts:
            self._find_faulty(torch.stack(self._parts))
        if self.watch is not None:
            raise self.watch.not_finite("a weight is not finite", self.state.global_step)

    def _find_faulty(self, parts: Tensor) -> None:
        """Tell the watch which records the first micro-batch without a finite loss held."""
        finite = parts.isfinite().all(dim=1)
        if self.watch is not None and not finite.all():
            places = self._places[int(finite.int().argmin())].tolist()
            self.watch.faulty = [self.records[place].id for place in places]
