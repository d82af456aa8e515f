"""Files of rows: JSON lines, one JSON list, or Parquet; each row with the place where it stands."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clinkd.data.files import atomic_write, write_jsonl
from clinkd.data.records import MAX_LINE_BYTES, scan_lines
from clinkd.errors import ConfigError, DataError, SetupError

SUFFIXES = (".jsonl", ".json", ".parquet")
_WRITTEN = 4096  # rows of a Parquet file that are written at a time
# Of a Parquet file that is read: few kilobytes can say that a long text stands in every row.
_READ = 64  # rows in memory at a time
_MOST_BYTES = 256 << 20  # of so many rows
_MOST_COLUMN_BYTES = 1 << 30  # of one column in a row group, not compressed


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
        for index, row in enumerate(_json_list(path)):
            yield f"{path}[{index}]", _writable(row)


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


def _writable(row: Any) -> Any:
    """The row, or a DataError where it holds what JSON lines cannot: a NaN, half a character."""
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except TypeError as error:  # a Parquet column of times or bytes
        return DataError(f"holds what is no JSON: {error}")
    except UnicodeEncodeError as error:
        return DataError(f"not valid UTF-8 text: {error.reason}")
    except (ValueError, RecursionError) as error:
        return DataError(f"not usable JSON: {error}")
    return row


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
            _require_size(path, file.metadata)
            start = 0
            for batch in file.iter_batches(batch_size=_READ):
                if batch.nbytes > _MOST_BYTES:
                    raise DataError(
                        f"{path}[{start}]: rows {start} to {start + batch.num_rows - 1} hold "
                        f"{batch.nbytes >> 20} MiB, over {_MOST_BYTES >> 20}"
                    )
                for index in range(batch.num_rows):
                    yield _parquet_row(batch.slice(index, 1))
                start += batch.num_rows
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet (truncated?): {error}") from None


def _require_size(path: Path, metadata: Any) -> None:
    """Refuse a column that a reader would have to hold whole before its first row."""
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            found = metadata.row_group(group).column(column)
            if found.total_uncompressed_size > _MOST_COLUMN_BYTES:
                raise DataError(
                    f"{path}: column {found.path_in_schema!r} of row group {group} has "
                    f"{found.total_uncompressed_size >> 20} MiB, over {_MOST_COLUMN_BYTES >> 20}; "
                    "write the file with smaller row groups"
                )


def _parquet_row(row: Any) -> Any:
    """A batch of one row as it was written, or what is wrong with it."""
    if row.nbytes > MAX_LINE_BYTES:
        return DataError(f"the row has over {MAX_LINE_BYTES} bytes")
    try:
        [value] = row.to_pylist()
        return _writable(_without_nulls(value))
    except DataError as error:
        return error
    except UnicodeDecodeError as error:
        return DataError(f"not valid UTF-8 text: {error.reason}")
    except (ValueError, OverflowError) as error:  # a time that Python has no date for
        return DataError(f"cannot be read: {error}")


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it was written: columns have a null where a row lacks the key."""
    row = {key: value for key, value in row.items() if value is not None}
    extra = row.pop("extra", None)
    if extra is None:
        return row
    try:
        others = json.loads(extra)
    except (TypeError, ValueError, RecursionError):
        others = None
    if not isinstance(others, dict):
        raise DataError(f"column 'extra' must hold a JSON object as text, got {extra!r:.80}")
    return row | others


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
            if len(batch) == _WRITTEN:
                writer.write_table(table(batch))
                batch = []
        writer.write_table(table(batch))
