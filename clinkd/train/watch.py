"""What goes on beside the training steps: log rows, progress, signals."""

import math
import multiprocessing
import signal
import threading
import time
from types import FrameType
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clinkd.errors import ClinkdError
from clinkd.train.job import Job
from clinkd.train.parallel import any_rank, world_size

NAMES = ("loss", "ce", "kd", "learning_rate", "grad_norm", "eval_loss")
# dense bf16 FLOP/s of the makers' data sheets: NVIDIA A100 (DS-10031-001), H100 SXM and H200
# (DS-11313-001), L40S (DS-11402-001), RTX 4090 (Ada whitepaper, appendix A, float32 sums)
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}


class Watch(TrainerCallback):
    """Log rows, progress, a stop on NaN, and a checkpoint when a signal asks to stop."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.preempted = False
        self.last_loss = math.nan
        self.speeds: dict[str, float] = {}
        self.faulty: list[str] = []  # records of the micro-batch whose loss is not finite
        self.weights = 0  # parameters that every token passes through
        self.signalled = False
        self.interrupted = False  # by Ctrl-C
        self._mark = (0, 0.0)  # tokens seen and time at the last row
        self._board: Any = None

    def signals(self) -> "Signals":
        return Signals(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._mark = (int(state.num_input_tokens_seen), time.monotonic())
        for row in state.log_history:  # of a run that is resumed, maybe at its end
            self.last_loss = row.get("loss", self.last_loss)
        if self.job.tensorboard is not None and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.job.tensorboard / self.job.stage
            self._board = SummaryWriter(str(folder), purge_step=state.global_step or None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._board is not None:
            self._board.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.job.progress is not None:
            self.job.progress(state.global_step, state.max_steps, self._note())
        if any_rank(self.signalled):  # a signal may have reached one of them at another step
            self.preempted = True
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        row = {name: float(logs[name]) for name in NAMES if name in logs}
        if not row:
            return
        self.last_loss = logs.get("loss", self.last_loss)
        if state.is_world_process_zero:
            where = {"stage": self.job.stage, "step": state.global_step, "epoch": state.epoch}
            self.job.log.append(where | row)
            if self._board is not None:
                speeds = self.speeds if "loss" in logs else {}
                for name, value in (row | speeds).items():
                    self._board.add_scalar(f"{self.job.stage}/{name}", value, state.global_step)
        if "loss" in logs and not math.isfinite(self.last_loss):
            raise self.not_finite(f"the loss is {self.last_loss}", state.global_step)

    def not_finite(self, what: str, step: int) -> ClinkdError:
        """The error that stops a stage."""
        told = f"; the first such batch held {', '.join(self.faulty)}" if self.faulty else ""
        return ClinkdError(
            f"stage {self.job.stage}: {what} at step {step}{told}; lower learning_rate, or set "
            "CLINKD_CHECK=1 to find the row"
        )

    def _note(self) -> str:
        """What stands beside the progress bar; nothing is known before the first row."""
        if math.isnan(self.last_loss):
            return ""
        rate = self.speeds.get("tokens_per_second")
        return f"loss {self.last_loss:.3f}" + (f", {rate:,.0f} tokens/s" if rate else "")

    def measure(self, state: TrainerState) -> dict[str, float]:
        """Since the last row: tokens a second over all processes, share of the peak, memory.

        Not in metrics.jsonl, which says the same however often a run was cut off.
        """
        tokens, before = int(state.num_input_tokens_seen), self._mark
        self._mark = (tokens, time.monotonic())
        rate = (tokens - before[0]) / max(1e-9, self._mark[1] - before[1])
        found = {"tokens_per_second": rate}
        if torch.cuda.is_available():
            found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            name = torch.cuda.get_device_name()
            peak = next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)
            if peak is not None:
                # 6 operations a token and weight, forward and backward (Kaplan et al. 2020)
                found["mfu"] = 6 * self.weights * rate / (peak * world_size())
        else:
            found["memory_gib"] = psutil.Process().memory_info().rss / 2**30
        self.speeds = found
        return found


class Signals:
    """While open, SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and a stop at the next step.

    A second Ctrl-C stops at once; so does the first in one of several processes, which the system
    also sends where their parent dies, and where the shell has it ignored nothing changes.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGUSR1]
            alone = multiprocessing.parent_process() is None
            if alone and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                numbers.append(signal.SIGINT)
            for number in numbers:
                self.previous[number] = signal.signal(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.watch.signalled:
            raise KeyboardInterrupt
        self.watch.signalled = True
        self.watch.interrupted = number == signal.SIGINT
