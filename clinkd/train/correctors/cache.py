"""Replies that were paid for once, kept in a file that only grows."""

import fcntl
import hashlib
import json
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clinkd.errors import DataError, SetupError
from clinkd.train.correctors.limits import Spending


@dataclass(frozen=True, slots=True)
class StoredReply:
    """What a model replied, as it came; `finish` is why it stopped."""

    text: str
    finish: str = "stop"
    model: str = ""
    paid: Spending = field(default_factory=Spending)


def reply_key(**question: Any) -> str:
    """Name of a reply: SHA-256 of all that it depends on, as JSON."""
    text = json.dumps(question, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ReplyCache:
    """JSON lines, each on disk before the next call is made: a crash loses the calls under way.

    A line is a reply by its key, or what a try has cost that brought none (`lost`). A last line
    that a crash cut in half is taken away; damage elsewhere is an error.

    Args:
        path: made if it does not exist, unless `read_only`.

    Raises:
        DataError: the file and line that is none of ours.
        SetupError: another process writes it, or it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.spent = Spending()
        self._replies: dict[str, StoredReply] = {}
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()
        try:
            if read_only:
                self._load(self.path.read_bytes())
            else:
                self._open()
        except FileNotFoundError:
            raise SetupError(f"there is no cache of replies {self.path} to answer from") from None
        except OSError as error:
            raise SetupError(f"{self.path} cannot be used: {error.strerror}") from None

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._replies)

    def close(self) -> None:
        """Let other processes write the file."""
        if self._file is not None:
            with suppress(OSError):  # what a full disk did not take was told when it was written
                self._file.close()
            self._file = None

    def get(self, key: str) -> StoredReply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: StoredReply) -> None:
        """Keep a reply, on disk when this returns."""
        row = {"key": key, "text": reply.text, "finish": reply.finish, "model": reply.model}
        with self._lock:
            self._append(row | _counts(reply.paid))
            self._replies[key] = reply
            self.spent += reply.paid

    def lose(self, paid: Spending) -> None:
        """Keep account of what brought no reply."""
        if paid != Spending():
            with self._lock:
                self._append({"lost": True} | _counts(paid))
                self.spent += paid

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (as long as the cache)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            content = self._file.read()
            whole = content.rfind(b"\n") + 1
            self._load(content[:whole])
            self._file.truncate(whole)
        except BlockingIOError:
            self.close()
            raise SetupError(f"another process is using the cache {self.path}") from None
        except BaseException:
            self.close()
            raise

    def _load(self, content: bytes) -> None:
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                row = json.loads(line)
                paid = Spending(int(row["calls"]), int(row["sent"]), int(row["received"]))
                if "lost" not in row:
                    reply = StoredReply(row["text"], row["finish"], row["model"], paid)
                    self._replies[str(row["key"])] = reply
            except (ValueError, TypeError, KeyError, RecursionError):
                raise DataError(
                    f"{self.path}:{number}: not a line of a cache of replies; mend or remove it"
                ) from None
            self.spent += paid

    def _append(self, row: dict[str, Any]) -> None:
        if self._file is None:
            raise ValueError(f"the cache {self.path} is closed, or open for reading only")
        try:
            self._file.write((json.dumps(row) + "\n").encode())  # ASCII: splitlines stays true
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SetupError(f"{self.path} cannot be written: {error.strerror}") from None


def _counts(paid: Spending) -> dict[str, int]:
    return {"calls": paid.calls, "sent": paid.sent, "received": paid.received}
