"""What goes on beside the training steps: log rows, progress, signals."""

import math
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clinkd.errors import ClinkdError
from clinkd.train.job import Job


class Watch(TrainerCallback):
    """Log rows, progress, a stop on NaN, and a checkpoint when a signal asks to stop."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.preempted = False
        self.last_loss = math.nan

    def signals(self) -> "Signals":
        return Signals(self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.job.progress is not None:
            self.job.progress(state.global_step, state.max_steps, f"loss {self.last_loss:.3f}")
        if self.preempted:
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
        if not logs or "loss" not in logs:
            return
        self.last_loss = logs["loss"]
        if state.is_world_process_zero:
            names = ("loss", "ce", "kd", "learning_rate", "grad_norm")
            row = {name: float(logs[name]) for name in names if name in logs}
            where = {"stage": self.job.stage, "step": state.global_step, "epoch": state.epoch}
            self.job.log.append(where | row)
        if not math.isfinite(self.last_loss):
            raise ClinkdError(
                f"stage {self.job.stage}: the loss is {self.last_loss} at step "
                f"{state.global_step}; lower learning_rate, or set CLINKD_CHECK=1 to find the row"
            )


class Signals:
    """While open, SIGTERM and SIGUSR1 ask for a checkpoint and a stop at the next step."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self.previous[number] = signal.signal(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.watch.preempted = True
