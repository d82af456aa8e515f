"""Processes that decode images ahead of training: what goes wrong in one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from clinkd.errors import ClinkdError, SetupError

DIED = "DataLoader worker"  # how torch begins what it says of such a process


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
