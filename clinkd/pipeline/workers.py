"""Tasks done by several processes, of this machine and of others; a parent on each one waits."""

import atexit
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from clinkd import errors
from clinkd.config import RunConfig, load
from clinkd.errors import ClinkdError, Preempted, SetupError
from clinkd.pipeline.machines import describe, machines, require_same_run
from clinkd.progress import Update

Error = tuple[str, str]  # kind and message


def process_count(config: RunConfig) -> int:
    """Processes of the run, on all machines."""
    found = machines()
    return _local_count(config) * (1 if found is None else found.count)


def _local_count(config: RunConfig) -> int:
    wanted = config.parallel.processes
    return max(1, torch.cuda.device_count()) if wanted == "auto" else wanted


def _own_cores() -> int:
    """Those that this process may use: a scheduler often gives a few of a machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_processes(run: Path, task: Any, config: RunConfig, progress: Update) -> str:
    """Let all processes do their part of a task; what the first one says of it.

    SIGTERM and SIGUSR1 are passed on to them. When one fails the others are stopped.

    Raises:
        ClinkdError: what a process raised, of the same kind.
    """
    others = machines()
    count, port = _local_count(config), _free_port()
    if others is None:
        return _Share(run, task, count, "127.0.0.1", port).work(progress, lambda: (True, None))
    others.give(**describe(run, count, port, type(task).__name__, asdict(task)))
    share = _Share(run, task, count, others.address, port, 0, others.count)
    try:
        summary = share.work(progress, others.others)
    except ClinkdError as error:
        others.tell((type(error).__name__, str(error)))
        raise
    others.tell(None)
    return summary


def follow(config: RunConfig) -> None:
    """Do this machine's share of the first one's tasks until it is through.

    Raises:
        ClinkdError: what a process raised; the first machine hears it too.
    """
    from clinkd.pipeline import tasks

    others = machines()
    assert others is not None
    run = Path(config.output)
    while "end" not in (given := others.take()):
        try:
            require_same_run(run, given)
            if torch.cuda.is_available() and torch.cuda.device_count() < given["count"]:
                raise SetupError(
                    f"the first machine starts {given['count']} processes, one a GPU; this one "
                    f"has {torch.cuda.device_count()}"
                )
            task = getattr(tasks, given["kind"])(**given["fields"])
            place = (others.address, given["port"], others.rank, others.count)
            # the first machine alone stops the others: it waits for all of them
            _Share(run, task, given["count"], *place).work(
                lambda *_: None, lambda: (True, others.others()[1])
            )
        except ClinkdError as error:
            others.tell((type(error).__name__, str(error)))
            raise
        others.tell(None)


class _Share:
    """The processes of one machine."""

    def __init__(
        self,
        run: Path,
        task: Any,
        count: int,
        address: str,
        port: int,
        machine: int = 0,
        machine_count: int = 1,
    ) -> None:
        self.count = count
        mp: Any = torch.multiprocessing  # its functions have no types
        self.told: Any = mp.get_context("spawn").Queue()
        ranks = (machine * count, count * machine_count)
        arguments = (count, *ranks, address, port, str(run), task, self.told)
        self.workers: Any = mp.spawn(_work, arguments, count, join=False)
        self.error: Error | None = None
        self.summary = ""
        self.parts: dict[int, tuple[int, int, str]] = {}

    def work(self, progress: Update, others: Callable[[], tuple[bool, Error | None]]) -> str:
        """Wait for the processes, and for those of other machines.

        Args:
            others: whether they are through, and an error of theirs.
        """
        with _pass_signals_on(self.workers.processes) as seen:
            try:
                here = there = False
                while not (here and there):
                    here = self.workers.join(timeout=0.2)
                    self._listen(progress)
                    there, error = others()
                    if error is not None:
                        self.error = self.error or error
                        break
            except Exception as error:  # of torch's: it names a process, not the cause
                self._listen(progress)
                if self.error is None:
                    if seen:
                        raise Preempted("stopped by a signal, what was finished is saved") from None
                    if isinstance(error, ClinkdError):
                        raise
                    raise ClinkdError(f"a process stopped: {error}") from None
            finally:
                self._stop()
        self._listen(progress)
        if self.error is not None:
            kind, message = self.error
            raise getattr(errors, kind)(message)
        return self.summary

    def _listen(self, progress: Update) -> None:
        """What the processes have said since."""
        while True:
            try:
                name, rank, value = self.told.get(timeout=0.05)
            except queue.Empty:
                return
            if name == "progress":
                self.parts[rank] = value
                done = sum(part[0] for part in self.parts.values())
                total = sum(part[1] for part in self.parts.values())
                progress(done, total, value[2])
            elif name == "error":
                self.error = self.error or value
            elif value:
                self.summary = value

    def _stop(self) -> None:
        """Let a process that saves after a signal finish; one that hangs is ended."""
        for process in self.workers.processes:
            process.join(timeout=1)
            if process.is_alive():
                process.terminate()
        for process in self.workers.processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()


def _work(
    index: int,
    count: int,
    first: int,
    world: int,
    address: str,
    port: int,
    run: str,
    task: Any,
    told: Any,
) -> None:
    """One process: number `index` of `count` here, rank `first + index` of `world`."""
    from clinkd.pipeline.folder import RunFolder
    from clinkd.pipeline.runner import quiet_libraries
    from clinkd.pipeline.tasks import TrainTask, perform

    rank = first + index
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    quiet_libraries()
    if torch.cuda.is_available():
        torch.cuda.set_device(index)
    else:
        torch.set_num_threads(max(1, _own_cores() // count))
    together = isinstance(task, TrainTask)
    if together:  # the others finish when they finish: nothing may time out on the slowest
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config = load(Path(run) / "config.yaml", [f"output={run}"])

    def progress(*update: Any) -> None:
        if rank == 0 or not together:
            told.put(("progress", rank, update))

    code = 0
    try:
        summary = perform(RunFolder(Path(run), config), task, progress, rank, world)
        told.put(("summary", rank, summary if rank == 0 else ""))
    except ClinkdError as error:
        # all ranks agreed to stop where a signal came; elsewhere the parent stops the others
        told.put(("error", rank, (type(error).__name__, str(error))))
        code = error.exit_code
    if together and code == 0:
        dist.destroy_process_group()
    # Threads of gloo may still hold tensors: the interpreter's own end can abort in them, after
    # all is done (pytorch pull request 179291).
    atexit._run_exitfuncs()  # sends what `told` still holds
    sys.stdout.flush()
    os._exit(code)


@contextmanager
def _pass_signals_on(processes: list[Any]) -> Iterator[list[int]]:
    """Yields the signals that have come."""
    seen: list[int] = []

    def forward(number: int, _: Any) -> None:
        seen.append(number)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, forward)
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port
