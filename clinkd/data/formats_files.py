"""Files of rows: JSON lines, one JSON list, or Parquet; each row with the place where it stands."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clinkd.data.files import atomic_write, write_jsonl
from clinkd.data.records import scan_lines
from clinkd.errors import ConfigError, DataError, SetupError

SUFFIXES = (".jsonl", ".json", ".parquet")
_BATCH = 4096  # rows of a Parquet file in memory at a time


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Each row's place (`file:line` or `file[index]`) and its value, or a DataError in its stead.

    Raises:
        DataError: the file cannot be read at all, or is no JSON list.
        ConfigError: another suffix than `SUFFIXES`.
        SetupError: a Parquet file without pyarrow.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix == ".jsonl":
        yield from ((f"{path}:{number}", value) for number, value in scan_lines(path))
    elif suffix == ".parquet":
        yield from ((f"{path}[{index}]", row) for index, row in enumerate(_parquet_rows(path)))
    else:
        yield from ((f"{path}[{index}]", row) for index, row in enumerate(_json_list(path)))


def write_rows(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows atomically in the container that the suffix names; raises as `read_rows`."""
    suffix = _suffix(Path(path))
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".parquet":
        _write_parquet(path, rows)
    else:
        with atomic_write(path) as file:  # one row a line: neither 300 MB at once nor unreadable
            start = "[\n"
            for row in rows:
                file.write(start + json.dumps(row, ensure_ascii=False, allow_nan=False))
                start = ",\n"
            file.write("\n]\n" if start != "[\n" else "[]\n")


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the name must end with one of {', '.join(SUFFIXES)}")
    return suffix


def _json_list(path: Path) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON (cut in half?): {error.msg} at column "
            f"{error.colno}; if it holds one object a line, name it .jsonl"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not usable JSON: {error}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: must hold a JSON list of records, not a {type(value).__name__}")
    return value


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise SetupError(
            f"Parquet files need pyarrow, which is not installed ({error}): "
            "pip install 'clinkd[parquet]'"
        ) from None
    return pyarrow


def _parquet_rows(path: Path) -> Iterator[Any]:
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    yield _without_nulls(row)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet (truncated?): {error}") from None


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it was written: columns have a null where a row lacks the key."""
    row = {key: value for key, value in row.items() if value is not None}
    extra = row.pop("extra", None)
    return row | json.loads(extra) if isinstance(extra, str) else row


def _write_parquet(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Columns for the keys of a record; whatever else rows hold goes into `extra` as JSON text."""
    arrow = _pyarrow()
    known = {
        "id": arrow.string(),
        "image": arrow.string(),
        "images": arrow.list_(arrow.string()),
        "modality": arrow.string(),
        "task": arrow.string(),
        "group": arrow.string(),
        "conversations": arrow.list_(
            arrow.struct({"from": arrow.string(), "value": arrow.string()})
        ),
        "messages": arrow.list_(arrow.struct({"role": arrow.string(), "content": arrow.string()})),
        "boxes": arrow.list_(arrow.list_(arrow.int32())),
        "size": arrow.list_(arrow.int32()),
        "extra": arrow.string(),
    }
    schema = arrow.schema(known)

    def table(batch: list[dict[str, Any]]) -> Any:
        for row in batch:
            rest = {key: row.pop(key) for key in list(row) if key not in known or key == "extra"}
            row["extra"] = json.dumps(rest, ensure_ascii=False, allow_nan=False) if rest else None
        try:
            return arrow.Table.from_pylist(batch, schema=schema)
        except (arrow.ArrowException, TypeError) as error:
            raise DataError(f"{path}: this format does not fit a Parquet table: {error}") from None

    with atomic_write(path, "wb") as file, arrow.parquet.ParquetWriter(file, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(dict(row))
            if len(batch) == _BATCH:
                writer.write_table(table(batch))
                batch = []
        writer.write_table(table(batch))
