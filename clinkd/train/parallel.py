"""Several training processes: DeepSpeed's settings, and words that all ranks agree on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clinkd.errors import ClinkdError, SetupError
from clinkd.recipes import FOLDERS

T = TypeVar("T")


def deepspeed_config(strategy: str, offload: bool) -> dict[str, Any] | None:
    """DeepSpeed's configuration of a strategy; None for `ddp`.

    Raises:
        SetupError: the package came without its configs.
    """
    if strategy == "ddp":
        return None
    config: dict[str, Any] = json.loads(strategy_file(strategy).read_text(encoding="utf-8"))
    if offload:
        target = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_optimization"]["offload_optimizer"] = target
    return config


def strategy_file(strategy: str) -> Path:
    """DeepSpeed's settings of a strategy.

    Raises:
        SetupError: the package came without its configs.
    """
    for folder in FOLDERS:
        path = folder / "deepspeed" / f"{strategy}.json"
        if path.is_file():
            return path
    raise SetupError(f"configs/deepspeed/{strategy}.json is missing; install clinkd again")


def world_size() -> int:
    """Processes of this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, or the error that it meets; all ranks must ask."""
    if world_size() == 1:
        return make()
    found: list[Any] = [None, None]
    if is_first():
        try:
            found[0] = make()
        except ClinkdError as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    made: T = found[0]
    return made


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on some rank; all ranks must ask."""
    if world_size() == 1:
        return flag
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vote = torch.tensor(int(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote)
