"""Atomic writes: the old file or the new one, and a reason in plain words."""

import errno
import json
import os
import resource
import signal

import pytest

from clinkd.data import files
from clinkd.data.files import (
    atomic_write,
    read_jsonl,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)
from clinkd.errors import DataError, SetupError


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_write_and_replace(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one\n")
    write_text(path, "zwei ü\n")
    assert path.read_text(encoding="utf-8") == "zwei ü\n"
    assert leftovers(path.parent) == []


def test_an_error_in_the_middle_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def rows():
        yield {"a": 1}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_jsonl(path, rows())
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_not_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_disk_full_keeps_the_old_file(tmp_path):
    """A real limit of the system on the size of files stands for the full disk."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SetupError, match=r"a\.txt cannot be written: the file is larger"):
            write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_no_space_is_said_in_words(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SetupError, match="no space left on the disk; free some"):
        write_text(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    write_text(tmp_path / "a", "x")
    with pytest.raises(SetupError, match="a part of its path is a file"):
        write_text(tmp_path / "a" / "b" / "c.txt", "x")
    with pytest.raises(SetupError, match="cannot be written"):
        write_text(tmp_path / "a" / "b.txt", "x")


def test_a_folder_where_the_file_should_be(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(SetupError, match="it is a folder"):
        write_text(tmp_path / "a", "x")


def test_errors_of_other_files_stay_theirs(tmp_path):
    with (
        pytest.raises(IsADirectoryError),
        atomic_write(tmp_path / "a") as file,
        open(tmp_path.parent / "..", encoding="utf-8") as other,
    ):
        file.write(other.read())


def test_json_and_hash(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1]}
    with atomic_write(tmp_path / "b", "wb") as file:
        file.write(b"abc")
    assert sha256_file(tmp_path / "b").startswith("ba7816bf8f01cfea")


def test_read_jsonl_gives_back_what_write_jsonl_wrote(tmp_path):
    rows = [{"id": "ä"}, [1, 2.5], None]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows


def test_read_jsonl_names_the_line_that_is_not_json(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not valid JSON"):
        list(read_jsonl(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_jsonl(tmp_path / "missing.jsonl"))
