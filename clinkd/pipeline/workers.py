"""Training in several processes of this machine: a parent that holds the run folder waits."""

import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from clinkd import errors
from clinkd.config import RunConfig, load
from clinkd.errors import ClinkdError
from clinkd.progress import Update


def process_count(config: RunConfig) -> int:
    """Training processes on this machine."""
    wanted = config.parallel.processes
    return max(1, torch.cuda.device_count()) if wanted == "auto" else wanted


def train_in_processes(run: Path, task: Any, config: RunConfig, progress: Update) -> float:
    """Let processes do a training task of a run folder; its last loss.

    SIGTERM and SIGUSR1 are passed on to them. When one fails the others are stopped.

    Raises:
        ClinkdError: what a process raised, of the same kind.
    """
    count, port = process_count(config), _free_port()
    mp: Any = torch.multiprocessing  # its functions have no types
    context = mp.get_context("spawn")
    told: Any = context.Queue()
    workers = mp.spawn(_work, (count, port, str(run), task, told), count, join=False)
    found: dict[str, Any] = {}
    with _pass_signals_on(workers.processes):
        try:
            while not workers.join(timeout=0.2):
                _listen(told, found, progress)
        except Exception as error:  # of torch's: it names a process, not the cause
            _listen(told, found, progress)
            if "error" not in found:
                raise ClinkdError(f"a training process stopped: {error}") from None
    _listen(told, found, progress)
    if "error" in found:
        kind, message = found["error"]
        raise getattr(errors, kind)(message)
    return float(found["loss"])


def _listen(told: Any, found: dict[str, Any], progress: Update) -> None:
    """What the processes have said since."""
    while True:
        try:
            name, value = told.get(timeout=0.05)
        except queue.Empty:
            return
        if name == "progress":
            progress(*value)
        else:
            found.setdefault(name, value)


def _work(rank: int, count: int, port: int, run: str, task: Any, told: Any) -> None:
    """One training process."""
    from clinkd.pipeline.folder import RunFolder
    from clinkd.pipeline.runner import quiet_libraries
    from clinkd.pipeline.steps import train_here

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    quiet_libraries()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config = load(Path(run) / "config.yaml", [f"output={run}"])

    def progress(*update: Any) -> None:
        if rank == 0:
            told.put(("progress", update))

    try:
        loss = train_here(RunFolder(Path(run), config), task, progress)
        if rank == 0:
            told.put(("loss", loss))
    except ClinkdError as error:
        told.put(("error", (type(error).__name__, str(error))))
        told.close()
        told.join_thread()
        # all ranks agreed to stop where a signal came; elsewhere the parent stops the others
        os._exit(error.exit_code)
    dist.destroy_process_group()


@contextmanager
def _pass_signals_on(processes: list[Any]) -> Iterator[None]:
    def forward(number: int, _: Any) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port
