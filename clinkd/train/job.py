"""What one training stage works on and where it writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clinkd.data.records import Record
from clinkd.train.log import MetricsLog

Progress = Callable[[int, int, str], None]  # done steps, all steps, what to show beside them


@dataclass(frozen=True)
class Job:
    """What one training stage works on and where it writes.

    Attributes:
        stage: name in metrics.jsonl.
        output: folder of the finished model; checkpoints lie in `checkpoints/` beside its files.
        log: the run's metrics.jsonl.
        bfloat16: arithmetic on a GPU in bfloat16 (autocast); weights stay float32.
        strategy: `ddp`, or DeepSpeed's `zero1`, `zero2`, `zero3`.
        offload: DeepSpeed keeps the optimiser's states in host memory.
        held_out: places of records that nothing is learned from; their loss is logged with each
            checkpoint.
        tensorboard: folder of its event files.
        wandb: project of Weights & Biases.
        dataloader_workers: processes that decode images ahead of this one.
    """

    stage: str
    output: Path
    log: MetricsLog
    records: Sequence[Record]
    data_root: Path
    seed: int
    progress: Progress | None = None
    bfloat16: bool = False
    strategy: str = "ddp"
    offload: bool = False
    held_out: Sequence[int] = ()
    tensorboard: Path | None = None
    wandb: str | None = None
    dataloader_workers: int = 0
