"""Reads a run folder as far as it got: what is absent or damaged is noted, not fatal."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clinkd.errors import DataError

Row = dict[str, Any]

# file, what a reader misses without it, the stage that writes it
_NEEDED = (
    ("metrics.json", "the scores", "evaluate"),
    ("predictions.jsonl", "the answers and the gallery", "generate"),
    ("metrics.jsonl", "the loss curves", "teacher"),
    ("run.json", "times, memory and versions", "prepare"),
    ("config.yaml", "the settings", "prepare"),
)


@dataclass
class Run:
    """What a run folder holds.

    Attributes:
        predictions: lines of predictions.jsonl, the final answers.
        others: lines of predictions/{name}.jsonl by name.
        corrections: lines of correction/round-k/corrections.jsonl by round.
        notices: plain sentences on what is missing or damaged.
    """

    folder: Path
    config: Row = field(default_factory=dict)
    book: Row = field(default_factory=dict)
    metrics: Row = field(default_factory=dict)
    log: list[Row] = field(default_factory=list)
    test: dict[str, Row] = field(default_factory=dict)
    predictions: list[Row] = field(default_factory=list)
    others: dict[str, list[Row]] = field(default_factory=dict)
    corrections: dict[int, list[Row]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, Row]:
        """The stage book, entries that are objects only."""
        stages = self.book.get("stages")
        entries = stages.items() if isinstance(stages, dict) else ()
        return {str(name): entry for name, entry in entries if isinstance(entry, dict)}


def read_run(folder: Path) -> Run:
    """Read every file of a run that the report shows.

    Raises:
        DataError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"run folder {folder} does not exist")
    run = Run(folder)
    for name, what, stage in _NEEDED:
        if not (folder / name).exists():
            run.notices.append(
                f"{name} is missing, and with it {what}: stage “{stage}” has not run."
            )
    run.config = _document(run, "config.yaml")
    run.book = _document(run, "run.json")
    run.metrics = _document(run, "metrics.json")
    run.log = _lines(run, "metrics.jsonl")
    run.test = {str(row.get("id")): row for row in _lines(run, "data/test.jsonl")}
    run.predictions = _lines(run, "predictions.jsonl")
    for path in sorted(folder.glob("predictions/*.jsonl")):
        run.others[path.stem] = _lines(run, f"predictions/{path.name}")
    for path in folder.glob("correction/round-*/corrections.jsonl"):
        number = path.parent.name.removeprefix("round-")
        if number.isdigit():
            run.corrections[int(number)] = _lines(run, str(path.relative_to(folder)))
    run.corrections = dict(sorted(run.corrections.items()))
    _note_unfinished(run)
    return run


def _note_unfinished(run: Run) -> None:
    for name, entry in run.stages.items():
        status = entry.get("status")
        if status != "done" and name != "report":  # the report is being written right now
            run.notices.append(f"Stage “{name}” is not finished (status: {status}).")


def _document(run: Run, name: str) -> Row:
    """One JSON or YAML object; an empty one, with a notice, where it cannot be read."""
    path = run.folder / name
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        run.notices.append(f"{name} is damaged and left out: {_first_line(error)}.")
        return {}
    if not isinstance(value, dict):
        run.notices.append(f"{name} is left out: it must hold an object.")
        return {}
    return value


def _lines(run: Run, name: str) -> list[Row]:
    """The whole objects of a JSON-lines file; the number of damaged lines becomes a notice."""
    path = run.folder / name
    if not path.exists():
        return []
    rows: list[Row] = []
    damaged = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    damaged += 1
    except OSError as error:
        run.notices.append(f"{name} cannot be read: {error.strerror}.")
    if damaged:
        run.notices.append(f"{name}: {damaged} damaged line{'s'[: damaged > 1]} left out.")
    return rows


def candidates_of(row: Row) -> list[Row]:
    """The candidates of a prediction; none where the line does not hold a list of objects."""
    found = row.get("candidates")
    whole = isinstance(found, list) and all(isinstance(each, dict) for each in found)
    return list(found) if whole and found else []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
