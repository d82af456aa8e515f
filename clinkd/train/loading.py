"""Processes that decode images ahead of training."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clinkd.errors import ClinkdError, SetupError

DIED = "DataLoader worker"  # how torch begins what it says of such a process


def prepare_worker(first: Any, worker: int) -> None:
    """What such a process does at its start, besides what `first` does with its number.

    SIGTERM from anybody but the training process is passed over: `timeout`, systemd and schedulers
    send it to all processes of a job, training wants to save then, and torch takes a dead worker
    for an error in it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    if first is not None:
        first(worker)


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of such a process read as if they had come here: torch puts a traceback before them.

    Raises:
        SetupError: a process died.
    """
    try:
        yield
    except ClinkdError as error:
        if not str(error).startswith("Caught "):
            raise
        name = re.escape(type(error).__name__)
        said = re.split(rf"^[\w.]*\b{name}: ", str(error), maxsplit=1, flags=re.MULTILINE)[-1]
        raise type(error)(said.strip()) from None
    except RuntimeError as error:
        if not str(error).startswith(DIED):
            raise
        raise SetupError(
            f"{str(error).rstrip('. ')}. With parallel.dataloader_workers=0 there is none"
        ) from None
