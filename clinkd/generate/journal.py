"""Lines that are appended block by block and become a file once all are there."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from clinkd.data.files import atomic_write


class Journal:
    """`.NAME.journal` beside a file: a header line, then one JSON line an id, in the ids' order.

    What a killed process left is taken up if its header is the same: whole blocks stay, a block
    that is not complete or ends in half a line is dropped. One line at a time is in memory.

    Args:
        output: the file to come.
        header: one line that says what the lines depend on.
        ids: of the lines to come; each line holds its own as "id".
        block: lines that are written together.
        rank: of `world` processes that each write a part of the file.
    """

    def __init__(
        self,
        output: Path,
        header: str,
        ids: Sequence[str],
        block: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.path = _path(output, rank, world)
        self.header = header.encode()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.done, end = self._recover(ids, block)
        if end == 0:
            self.path.write_bytes(self.header)
        else:
            os.truncate(self.path, end)

    def _recover(self, ids: Sequence[str], block: int) -> tuple[int, int]:
        """How many lines are there to stay, and at which byte they end; 0 bytes: start anew."""
        if not self.path.exists():
            return 0, 0
        with open(self.path, "rb") as file:
            if file.readline() != self.header:
                return 0, 0
            done, end = 0, file.tell()
            for count, name in enumerate(ids, start=1):
                line = file.readline()
                if not line.endswith(b"\n") or not _is_of(line, name):
                    break
                if count % block == 0 or count == len(ids):
                    done, end = count, file.tell()
            return done, end

    def append(self, lines: str) -> None:
        """Add a block and see it on the disk."""
        with open(self.path, "ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())


def join_parts(output: str | os.PathLike[str], world: int = 1) -> None:
    """Write the file from the journals of `world` processes, atomically, and remove all journals.

    Their headers are left out.
    """
    output = Path(output)
    with atomic_write(output, "wb") as target:
        for rank in range(world):
            with open(_path(output, rank, world), "rb") as source:
                source.readline()
                shutil.copyfileobj(source, target)
    for path in output.parent.glob(f".{output.name}.journal*"):  # another world's too
        path.unlink()


def _path(output: Path, rank: int, world: int) -> Path:
    part = "" if world == 1 else f"-{rank}-of-{world}"
    return output.with_name(f".{output.name}.journal{part}")


def _is_of(line: bytes, name: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("id") == name
