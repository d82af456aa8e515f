"""A run over several machines: the first one leads, the others do their share of its tasks.

Each machine starts the same command with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in its
environment, as torchrun names them, and sees the same run folder. The first one does the run; the
others wait for the tasks that take all processes. They talk through torch's TCPStore, in JSON.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clinkd._version import __version__
from clinkd.data.files import sha256_file
from clinkd.errors import ConfigError, DataError, SetupError

JOIN_SECONDS = 600.0  # for the last machine to come, and for a shared folder to show a file
POLL_SECONDS = 0.2


@dataclass
class Machines:
    """This machine's place among `count`, and the store between them."""

    count: int
    rank: int
    address: str
    store: Any
    tasks: int = field(default=0)  # given or taken so far

    def give(self, **task: Any) -> None:
        """Tell the others of a task."""
        self.store.set(f"task/{self.tasks}", json.dumps(task))
        self.tasks += 1

    def take(self) -> dict[str, Any]:
        """Wait for the next task, for as long as the first machine lives.

        Raises:
            SetupError: it is gone.
        """
        key = f"task/{self.tasks}"
        while not self._there(key):
            time.sleep(POLL_SECONDS)
        self.tasks += 1
        task: dict[str, Any] = json.loads(self.store.get(key))
        return task

    def tell(self, error: tuple[str, str] | None) -> None:
        """Say how the last task went here: kind and message of an error, or None."""
        self.store.set(f"done/{self.tasks - 1}/{self.rank}", json.dumps(error))

    def others(self) -> tuple[bool, tuple[str, str] | None]:
        """Whether all other machines are through with the last task, and the first error."""
        through = True
        for rank in range(self.count):
            key = f"done/{self.tasks - 1}/{rank}"
            if rank == self.rank:
                continue
            if not self._there(key):
                through = False
                continue
            error = json.loads(self.store.get(key))
            if error is not None:
                return through, (error[0], f"machine {rank}: {error[1]}")
        return through, None

    def _there(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except dist.DistError:
            raise SetupError(
                f"the first machine ({self.address}) is gone; start the run again on all of them"
            ) from None


@lru_cache
def machines() -> Machines | None:
    """The machines that the environment names; None for this one alone.

    Raises:
        ConfigError: a variable is missing or wrong.
        SetupError: the first machine cannot be reached, or some do not come.
    """
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    if values["NNODES"] in ("", "1"):
        return None
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ConfigError(f"NNODES={values['NNODES']} needs {', '.join(missing)} too")
    try:
        count, rank, port = (int(values[name]) for name in ("NNODES", "NODE_RANK", "MASTER_PORT"))
    except ValueError:
        raise ConfigError("NNODES, NODE_RANK and MASTER_PORT must be whole numbers") from None
    if not 0 <= rank < count:
        raise ConfigError(f"NODE_RANK must be 0 to {count - 1}, got {rank}")
    address = values["MASTER_ADDR"]
    make_store: Any = getattr(dist, "TCPStore")  # noqa: B009 - not in its types
    try:
        store = make_store(
            address, port, count, is_master=rank == 0, timeout=timedelta(seconds=JOIN_SECONDS)
        )
    except (dist.DistError, RuntimeError) as error:
        where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
        text = str(error).splitlines()[0]
        raise SetupError(f"{count} machines do not meet at {where}: {text}") from None
    return Machines(count, rank, address, store)


@contextmanager
def leading() -> Iterator[None]:
    """While open, the other machines wait for tasks; afterwards they go."""
    found = machines()
    try:
        yield
    finally:
        if found is not None:
            found.give(end=True)
            time.sleep(5 * POLL_SECONDS)  # the store lives here: let them read it


def describe(run: Path, count: int, port: int, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A task as it is given to the others."""
    return {
        "version": __version__,
        "run": str(run),
        "config": sha256_file(run / "config.yaml"),
        "count": count,
        "port": port,
        "kind": kind,
        "fields": fields,
    }


def require_same_run(run: Path, task: dict[str, Any]) -> None:
    """Make sure that this machine sees the run of the first one.

    Raises:
        SetupError: another version of clinkd.
        DataError: the run folder is not there, or another.
    """
    if task["version"] != __version__:
        raise SetupError(f"this is clinkd {__version__}, on the first machine {task['version']}")
    path = run / "config.yaml"
    end = time.monotonic() + JOIN_SECONDS / 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    same = str(run) == task["run"] and path.exists()
    if not same or sha256_file(path) != task["config"]:
        raise DataError(
            f"{run} is not the first machine's run folder {task['run']}: it must lie on a file "
            "system that all machines share, and all must be started with the same command"
        )
