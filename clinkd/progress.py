"""What a person sees while a run works: bars on a terminal, one plain line a stage elsewhere.

Colours follow NO_COLOR (https://no-color.org); bars need a real terminal, so that a log file or a
pipe holds nothing but finished lines.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from clinkd.averages import comparable_average

Update = Callable[[int, int, str], None]  # done, all, what to show beside them

TASK_NAMES = {"VG": "grounding", "ROC": "classify region", "RC": "describe region", "MIA": "image"}
_MARKS = {"done": ("✓", "green"), "skipped": ("=", "cyan"), "failed": ("✗", "red")}
_PLAIN_WIDTH = 100  # columns of tables where there is no terminal to ask
_REDRAW_SECONDS = 0.1  # a bar is not drawn more often than this


def format_seconds(seconds: float) -> str:
    """A duration as a person writes it: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def stage_line(
    stage: str, summary: str = "", seconds: float | None = None, status: str = "done"
) -> Text:
    """One line that says what became of a stage.

    Args:
        seconds: how long it took; None leaves the time out.
        status: `done`, `skipped` (unchanged since an earlier run) or `failed`.

    Raises:
        ValueError: another status.
    """
    if status not in _MARKS:
        raise ValueError(f"status must be one of {', '.join(_MARKS)}, got {status!r}")
    mark, colour = _MARKS[status]
    took = "" if seconds is None else format_seconds(seconds)
    line = Text()
    line.append(f"{mark} ", style=f"bold {colour}")
    line.append(f"{stage:<13}", style="bold")
    line.append(f"{took:>12}  ", style="dim")
    line.append("unchanged; " if status == "skipped" and summary else "")
    line.append("unchanged" if status == "skipped" and not summary else "")
    line.append(" ".join(summary.split()))
    line.rstrip()
    return line


def results_table(metrics: Mapping[str, Any]) -> Table:
    """Models × tasks of `metrics.json`, baselines below, 95 % intervals beside the scores.

    A score that is missing is a dash, as is an average over fewer tasks than another model has;
    the last model is in bold type.
    """
    models: Mapping[str, Any] = metrics.get("models") or {}
    baselines: Mapping[str, Any] = metrics.get("baselines") or {}
    tasks = _tasks([*models.values(), *baselines.values()])
    table = Table(title="Score on the test split (0 to 100)", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for task, metric in tasks.items():
        table.add_column(Text(f"{task}\n{metric}"), justify="right", no_wrap=True)
    table.add_column("average", justify="right")
    for index, (name, model) in enumerate(models.items()):
        last = index == len(models) - 1
        cells = _cells(name, model, tasks)
        table.add_row(*cells, style="bold" if last else None, end_section=last)
    for name, model in baselines.items():
        table.add_row(*_cells(name, model, tasks), style="dim")
    return table


def _tasks(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every task that some model has, in the order of TASK_NAMES, with its metric's name."""
    found: dict[str, str] = {}
    for model in models:
        for task, result in (model.get("tasks") or {}).items():
            found.setdefault(str(task), str(result.get("metric") or ""))
    order = list(TASK_NAMES)
    return dict(
        sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else 99)
    )


def _cells(name: str, model: Mapping[str, Any], tasks: Mapping[str, str]) -> list[Text]:
    cells = [Text(str(model.get("label") or name))]
    for task in tasks:
        result = (model.get("tasks") or {}).get(task) or {}
        cells.append(Text(_score(result.get("score")) + _interval(result.get("ci95"))))
    return [*cells, Text(_score(comparable_average(model, tasks)))]


def _score(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"


def _interval(bounds: Any) -> str:
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return ""
    low, high = bounds
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return ""
    return f" ({low:.0f}–{high:.0f})"


class Console:
    """Where a run's lines, bars and tables go.

    Args:
        file: a text stream; default: standard output.
        quiet: show nothing at all.
    """

    def __init__(self, file: IO[str] | None = None, *, quiet: bool = False) -> None:
        self._rich = RichConsole(file=file, quiet=quiet, highlight=False, emoji=False)
        terminal = getattr(self._rich.file, "isatty", lambda: False)()
        # FORCE_COLOR makes rich call a pipe a terminal: colours are fine there, moving bars are not
        self.animated = bool(terminal) and not self._rich.is_dumb_terminal and not quiet
        _never_fail_to_encode(self._rich.file)
        if not terminal:
            self._rich.width = max(self._rich.width, _PLAIN_WIDTH)

    def print(self, value: Any = "") -> None:
        """Print a line of text or anything that rich can draw; markup in strings is not read."""
        if isinstance(value, str | Text):
            self._rich.print(Text(value) if isinstance(value, str) else value, soft_wrap=True)
        else:
            self._rich.print(value)

    @contextmanager
    def stage(self, stage: str) -> Iterator[Update]:
        """A bar while a stage works; yields what the stage calls with (done, all, note).

        Off a terminal nothing is shown until `stage_done`.
        """
        if not self.animated:
            yield ignore
            return
        bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<12}", markup=True),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=self._rich,
            transient=True,
            expand=True,
        )
        with bar:
            task = bar.add_task(stage, total=None, note="")
            state = {"drawn": -1.0, "total": -1.0}

            def update(done: int, total: int, note: str = "") -> None:
                now = time.monotonic()
                restarted = total != state["total"] or done == 0
                if not restarted and done < total and now - state["drawn"] < _REDRAW_SECONDS:
                    return
                if restarted and state["total"] >= 0:
                    bar.reset(task, total=total, completed=done, note=note)  # a part of its own
                else:
                    bar.update(task, total=total, completed=done, note=note)
                state["drawn"], state["total"] = now, float(total)

            yield update

    def stage_done(self, stage: str, summary: str, seconds: float) -> None:
        """Say that a stage is finished."""
        self.print(stage_line(stage, summary, seconds))

    def stage_skipped(self, stage: str, summary: str = "") -> None:
        """Say that a stage was left alone: its inputs are unchanged."""
        self.print(stage_line(stage, summary, status="skipped"))

    def stage_failed(self, stage: str, reason: str, seconds: float) -> None:
        """Say that a stage broke off, and why."""
        self.print(stage_line(stage, reason, seconds, status="failed"))

    def results(self, metrics: Mapping[str, Any]) -> None:
        """Draw the final table, then the plain sentences that judge it."""
        self.print()
        self.print(results_table(metrics))
        for verdict in metrics.get("verdicts") or []:
            self.print(f"- {verdict}")


def ignore(done: int, total: int, note: str = "") -> None:
    """Stands in for a bar where there is none."""


def _never_fail_to_encode(file: Any) -> None:
    """A stream that cannot write `✓` (an ASCII locale) gets `?` instead of an exception."""
    try:
        "✓–…".encode(getattr(file, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")
