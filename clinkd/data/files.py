"""Atomic writes: a reader sees the old file or the new one, never half of one; JSON lines back."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from clinkd.errors import ConfigError, DataError, SetupError

_CAUSES = {
    errno.ENOSPC: "no space left on the disk; free some and start again",
    errno.EDQUOT: "the disk quota is used up; free some space and start again",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "the file is larger than this file system or user may write",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EEXIST: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.ENOENT: "its folder cannot be made",
    errno.ENAMETOOLONG: "its name is too long",
}


def require_lines(path: Path) -> None:
    """Raise where a file of records is none of JSON lines by its name, with what makes one of it.

    Raises:
        ConfigError: it is JSON, Parquet or CSV.
    """
    suffix = path.suffix.lower()
    if suffix in (".json", ".parquet"):
        raise ConfigError(
            f"{path}: records are read from JSON lines; first: clinkd data convert {path} "
            f"{path.with_suffix('.jsonl')}"
        )
    if suffix in (".csv", ".tsv", ".xlsx"):
        raise ConfigError(
            f"{path}: records are read from JSON lines, one object a line; its keys: docs/data.md"
        )


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    Whatever goes wrong, `path` keeps its old contents and the temporary file is removed.

    Args:
        path: the file to write; missing parent folders are made.
        mode: "w" (UTF-8 text) or "wb".

    Raises:
        SetupError: it cannot be written: no space, no permission, a folder in its place.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.tmp")
    with _named_causes(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def _named_causes(path: Path, temporary: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into a SetupError; leave all else alone."""
    try:
        yield
    except OSError as error:
        ours = {path, temporary, *path.parents}
        if error.errno not in _CAUSES or (error.filename and Path(error.filename) not in ours):
            raise  # of another file that the caller had open meanwhile
        raise SetupError(f"{path} cannot be written: {_CAUSES[error.errno]}") from error


def sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Put all that lies in a folder on the disk: the files first, then the folders' entries."""
    paths = list(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (*(path for path in paths if path.is_dir()), folder):
        sync_folder(path)


def copy_file(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Copy a file atomically."""
    with open(source, "rb") as original, atomic_write(path, "wb") as file:
        shutil.copyfileobj(original, file, 1 << 20)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON document atomically, readable by people, NaN refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The JSON value of each line of a file; empty lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line is not JSON; it is named by its number.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _value(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: must be UTF-8 text") from None


def _value(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}; make the file anew") from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
