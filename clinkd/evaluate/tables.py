"""Tables as in the paper, from any set of metrics: Markdown, LaTeX, CSV or JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clinkd.averages import comparable_average
from clinkd.data.records import TASKS
from clinkd.errors import ConfigError
from clinkd.evaluate.published import TABLE_1, TABLE_2

FORMATS = ("markdown", "latex", "csv", "json")
ONE_GROUP = "one group: no interval"
Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """A table: a title, column names, and rows whose first cell is a name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def models_by_task(models: Mapping[str, Mapping[str, Any]], *, published: bool = False) -> Table:
    """Table 1: models × tasks, and their mean; intervals in brackets where they were computed, and
    why there is none where the records are all of one group.

    Args:
        published: the paper's rows below, a dash where a figure could not be read.
    """
    rows: list[tuple[Cell, ...]] = []
    asked = {task for model in models.values() for task in model["tasks"]}
    for name, model in models.items():
        results = [model["tasks"].get(task) for task in TASKS]
        average = comparable_average(model, asked)
        rows.append((str(model.get("label") or name), *map(_scored, results), average))
    if published:
        for row in TABLE_1:
            rows.append((row.label, *(row.scores.get(task) for task in TASKS), row.mean))
    return Table("Models by task", ("Model", *TASKS, "Average"), tuple(rows))


def tasks_by_modality(model: Mapping[str, Any]) -> Table:
    """Tables 3 and 4: tasks × modalities of one model, with the plain mean of the row."""
    tasks = {task: model["tasks"][task] for task in TASKS if task in model["tasks"]}
    modalities = sorted({name for result in tasks.values() for name in result["modalities"]})
    rows: list[tuple[Cell, ...]] = []
    for task, result in tasks.items():
        cells = [result["modalities"].get(name, {}).get("score") for name in modalities]
        known = [cell for cell in cells if cell is not None]
        mean = round(sum(known) / len(known), 2) if known else None
        rows.append((f"{task} ({result['metric']})", *cells, mean, result["score"]))
    title = f"{model.get('label', 'Model')}: tasks by modality"
    return Table(title, ("Task", *modalities, "Mean of the row", "Score"), tuple(rows))


_LONG = (
    *("model", "task", "metric", "modality", "n", "score", "low", "high"),
    *("difference", "difference_low", "difference_high", "p"),
)


def long_table(
    models: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Mapping[str, Any]],
    *,
    published: bool = False,
) -> Table:
    """All figures of a comparison in one table, a score a row, as spreadsheets and pandas read it.

    A row is a model's task in one modality, in all of them (`all`), or its average over all tasks
    (`average`). Empty is what is not known or does not exist.

    Args:
        pairs: of each model but the first: what `compare` found against that one.
        published: the paper's rows below.
    """
    rows: list[tuple[Cell, ...]] = []
    asked = {task for model in models.values() for task in model["tasks"]}

    def add(*cells: Cell) -> None:
        rows.append((*cells, *[None] * (len(_LONG) - len(cells))))

    for name, model in models.items():
        label = str(model.get("label") or name)
        for task in (task for task in TASKS if task in model["tasks"]):
            result, pair = model["tasks"][task], pairs.get(name, {}).get(task, {})
            low, high = result.get("ci95") or (None, None)
            differs = (pair.get("difference"), *(pair.get("ci95") or (None, None)), pair.get("p"))
            head = (label, task, str(result["metric"]))
            add(*head, "all", result["n"], result["score"], low, high, *differs)
            for modality, part in result["modalities"].items():
                add(*head, modality, part["n"], part["score"])
        add(label, "average", None, "all", None, comparable_average(model, asked))
    for row in TABLE_1 if published else ():
        for task, score in (*row.scores.items(), ("average", row.mean)):
            add(row.label, task, None, "all", None, score)
    return Table("Scores", _LONG, tuple(rows))


def ablation_table(result: Mapping[str, Any], *, published: bool = False) -> Table:
    """Table 2: cells × tasks, mean ± sd over seeds, and the gain of the average over the base.

    Args:
        result: ablation.json.
    """
    cells = result["cells"]
    first = next(iter(cells.values()))
    base = cells["base"]["scores"]["Average"]["mean"]
    rows: list[tuple[Cell, ...]] = []
    for cell in cells.values():
        shown = [_mean_sd(cell["scores"].get(name)) for name in (*TASKS, "Average")]
        gain = cell["scores"]["Average"]["mean"] - base
        rows.append((str(cell["label"]), *shown, "" if cell is cells["base"] else f"{gain:+.2f}"))
    if published:
        none = (None,) * len(TASKS)
        base = TABLE_2[0][1]
        for number, (label, average) in enumerate(TABLE_2):
            rows.append((label, *none, average, f"{average - base:+.2f}" if number else ""))
    heads = [
        f"{task} ({first['metrics'][task]})" if task in first["metrics"] else task for task in TASKS
    ]
    count = len(first["seeds"])
    title = f"Ablation: mean ± sd over {count} seed{'s' if count > 1 else ''}"
    return Table(title, ("Cell", *heads, "Average", "Gain"), tuple(rows))


def _mean_sd(score: Mapping[str, Any] | None) -> str | None:
    if score is None:
        return None
    return f"{score['mean']:.2f}" + ("" if score["sd"] is None else f" ± {score['sd']:.2f}")


def _scored(result: Mapping[str, Any] | None) -> Cell:
    if result is None or result["score"] is None:
        return None
    if result.get("ci95"):
        low, high = result["ci95"]
        return f"{result['score']:.2f} [{low:.2f}, {high:.2f}]"
    if "ci95" in result:
        return f"{result['score']:.2f} [{ONE_GROUP}]"
    return float(result["score"])


def _inert(cell: Cell) -> Cell:
    """With an apostrophe before a name that a spreadsheet would take for a formula (OWASP)."""
    if not isinstance(cell, str) or cell[:1] not in tuple("=+-@\t\r"):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def render(table: Table, form: str) -> str:
    """The table as text.

    Raises:
        ConfigError: an unknown format.
    """
    if form == "json":
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        return json.dumps({"title": table.title, "rows": rows}, ensure_ascii=False, indent=2)
    if form == "csv":  # numbers as they are, and nothing where there is none
        out = io.StringIO()
        inert = ([_inert(cell) for cell in row] for row in (table.columns, *table.rows))
        csv.writer(out, lineterminator="\n").writerows(inert)
        return out.getvalue().rstrip("\n")
    cells = [[_text(cell) for cell in row] for row in (table.columns, *table.rows)]
    if form == "markdown":
        head, *body = ([cell.replace("|", "\\|") for cell in row] for row in cells)
        rule = ["---", *["---:"] * (len(head) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
        return f"**{table.title}**\n\n" + "\n".join(lines)
    if form == "latex":
        head, *body = ([_tex(cell) for cell in row] for row in cells)
        lines = [" & ".join(row) + r" \\" for row in (head, *body)]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
        parts = [f"% {table.title}", begin, r"\hline", lines[0], r"\hline", *lines[1:]]
        return "\n".join([*parts, r"\hline", r"\end{tabular}"])
    raise ConfigError(f"unknown table format {form!r}; expected one of {', '.join(FORMATS)}")


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return plain(cell) if isinstance(cell, float) else str(cell)


def plain(value: float) -> str:
    """Two decimals; three where the number has them, as the paper's 60.845."""
    short = f"{value:.2f}"
    return short if abs(value - float(short)) < 1e-9 else f"{value:.3f}"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}


def _tex(text: str) -> str:
    marks: Sequence[str] = "&%$#_{}"
    return "".join(_TEX.get(c, f"\\{c}" if c in marks else c) for c in text)
