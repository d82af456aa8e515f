"""Whether a run's records and images are those of its last start.

`images.json` in the run folder keeps size, time and SHA-256 of every image's file. Only a file of
another size or time, or in another data folder, is read again, so that one that was copied costs a
reading alone.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clinkd.config import SAMPLE, RunConfig
from clinkd.data.files import sha256_file, write_text
from clinkd.data.images import resolve_image, split_name
from clinkd.data.records import read_records
from clinkd.data.select import limit_records
from clinkd.errors import DataError
from clinkd.pipeline.paths import SAMPLE_FOLDER, data_root, records_file
from clinkd.progress import Update

TABLE = "images.json"
READERS = 8  # threads: many files lie far away
_AT_ONCE = 64  # images that a thread is given
Mark = list[Any]  # bytes, time in nanoseconds, SHA-256


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        hashes: of each split: its records, and the files of their images.
        changed: images that are not what they were at the last start.
        table: what `images.json` is to hold; None for the shipped sample, which does not change.
    """

    hashes: dict[str, str]
    changed: list[str]
    table: dict[str, Any] | None

    def save(self, run: Path) -> None:
        """Remember them for the next start."""
        if self.table is not None and self.table != _read(run / TABLE):
            write_text(run / TABLE, json.dumps(self.table, ensure_ascii=False))


def read_inputs(config: RunConfig, run: Path, progress: Update) -> Inputs:
    """Hash the files of records, and those images that are not known from the last start.

    A file that is not there is taken for what it was: who needs it says so. Of a reading that is
    cut off `images.json` keeps the images that nobody had read before.
    """
    data, before = config.data, _read(run / TABLE)
    root, known = data_root(data), before.get("files", {})
    folder = os.path.realpath(root)
    same_folder = before.get("root") == folder  # elsewhere size and time tell nothing
    hashes: dict[str, str] = {}
    table: dict[str, Any] = {}
    files: dict[str, Mark | None] = {}
    look = partial(_mark, root, known, same_folder)
    try:
        for split, name, limit in (
            ("train", data.train, data.train_limit),
            ("test", data.test, data.test_limit),
        ):
            path = records_file(name, split)
            hashes[split] = sha256_file(path)
            if name == SAMPLE and root == SAMPLE_FOLDER:
                continue
            drawn = [hashes[split], limit, config.seed if limit else None]
            entry = before.get(split, {})
            if entry.get("of") != drawn:
                entry = {"of": drawn, "names": _names(path, limit, config.seed, root)}
            table[split], names = entry, entry["names"]
            _read_marks(names, look, files, progress)
            told = json.dumps([hashes[split], [(each, _sha(files[each])) for each in names]])
            hashes[split] = hashlib.sha256(told.encode()).hexdigest()
    except BaseException:
        if files and (same_folder or not known):
            _keep(run, {**before, "root": folder, **table, "files": files | known})
        raise
    changed = sorted(n for n, mark in files.items() if _sha(known.get(n)) not in (None, _sha(mark)))
    return Inputs(hashes, changed, {"root": folder, **table, "files": files} if table else None)


def _sha(mark: Mark | None) -> Any:
    return None if mark is None else mark[-1]


def _names(path: Path, limit: int | None, seed: int, root: Path) -> list[str]:
    """The files of the images that a split's records name, each once."""
    try:
        records = limit_records(read_records(path), limit, seed)
    except DataError:
        return []  # `prepare` says what is wrong
    return sorted({split_name(name, root)[0] for record in records for name in record.images})


def _keep(run: Path, table: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # what ends the reading says more
        write_text(run / TABLE, json.dumps(table, ensure_ascii=False))


def _read_marks(
    names: Sequence[str],
    look: Callable[[str], Mark | None],
    files: dict[str, Mark | None],
    progress: Update,
) -> None:
    """Add the marks of those that `files` does not have yet."""
    new = [name for name in names if name not in files]
    parts = [new[start : start + _AT_ONCE] for start in range(0, len(new), _AT_ONCE)]
    stopped = threading.Event()  # else a stop would wait for the parts that are under way

    def read(part: Sequence[str]) -> list[Mark | None]:
        return [look(name) for name in part if not stopped.is_set()]

    done = 0
    with ThreadPoolExecutor(READERS) as readers:
        try:
            for part, marks in zip(parts, readers.map(read, parts), strict=True):
                files.update(zip(part, marks, strict=True))
                done += len(part)
                progress(done, len(new), "images")
        except BaseException:
            stopped.set()
            raise


def _mark(root: Path, known: dict[str, Mark], same_folder: bool, name: str) -> Mark | None:
    before = known.get(name)
    try:
        path = resolve_image(root, name)
        there = os.stat(path)
        now = [there.st_size, there.st_mtime_ns]
        same = same_folder and before and before[:2] == now
        return before if same else [*now, sha256_file(path)]
    except (DataError, OSError):
        return before


def _read(path: Path) -> dict[str, Any]:
    """The table of the last start; an empty one where there is none, or it is damaged."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if _is_table(found) else {}


def _is_table(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        return False
    splits = (found[split] for split in ("train", "test") if split in found)
    return all(_is_mark(mark) for mark in found["files"].values()) and all(
        isinstance(split, dict)
        and isinstance(split.get("names"), list)
        and all(isinstance(name, str) for name in split["names"])
        for split in splits
    )


def _is_mark(mark: Any) -> bool:
    return mark is None or (isinstance(mark, list) and [type(x) for x in mark] == [int, int, str])
