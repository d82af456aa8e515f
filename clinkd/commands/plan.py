"""`clinkd plan`: what a run will take, before it takes it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from clinkd.recipes import config_file


def plan(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file; `clinkd recipes cp` makes one", callback=config_file),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="settings that replace the file's"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict memory by part for 1 to 64 GPUs, what fits on 40 and 80 GB, steps, disk and the cost
    of correction. Reads the data, the images of some records and the models' configs; no weights.
    """
    from clinkd.config import load
    from clinkd.pipeline.runner import quiet_libraries
    from clinkd.progress import Console

    settings = load(config, overrides or [])
    quiet_libraries()
    from clinkd.plan.work import make_plan  # here: it imports torch

    found = make_plan(settings)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    for part in (_models(found), _stages(found), _fits(found, settings.parallel.strategy)):
        console.print(part)
    for line in _notes(found):
        console.print(line)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _models(found: dict[str, Any]) -> Table:
    table = _table("Parameters, millions", "", *found["models"]["student"])
    for name, parts in found["models"].items():
        table.add_row(name, *(f"{count / 1e6:,.1f}" for count in parts.values()))
    return table


def _stages(found: dict[str, Any]) -> Table:
    """Memory by part of one device, GB."""
    from clinkd.plan.memory import PARTS

    table = _table("Memory of one device at the peak, GB", "stage", "GPUs", "steps", *PARTS, "sum")
    for name, stage in found["stages"].items():
        for index, (world, parts) in enumerate(stage["memory"].items()):
            cells = [f"{parts[part] / 1e9:,.2f}" for part in PARTS]
            last = index == len(stage["memory"]) - 1
            table.add_row(
                "" if index else name, str(world), f"{stage['steps'][world]:,}", *cells,
                f"{sum(parts.values()) / 1e9:,.2f}", end_section=last,
            )  # fmt: skip
    return table


def _fits(found: dict[str, Any], chosen: str) -> Table:
    from clinkd.plan.work import CARDS, GPUS, RESERVE

    title = (
        f"Most memory of all stages, GB, and the card it fits: {' or '.join(map(str, CARDS))} GB"
    )
    table = _table(title, "strategy \\ GPUs", *map(str, GPUS))
    for strategy, peaks in found["strategies"].items():
        cells = []
        for peak in peaks.values():
            card = next((card for card in CARDS if peak <= card * 1e9 * (1 - RESERVE)), None)
            size = max(peak / 1e9, 0.01)
            cells.append(f"{size:{'.2f' if size < 1 else '.3g'}}: {card or 'no'}")
        table.add_row(strategy + (" (chosen)" if strategy == chosen else ""), *cells)
    return table


def _notes(found: dict[str, Any]) -> list[str]:
    records, disk, money = found["records"], found["disk"], found["correction"]
    lines = [
        f"records: {records['all']:,}; of {records['measured']} that were encoded the longest has "
        f"{records['length']:,} tokens ({records['mean_length']:,.0f} on average), most answer "
        f"tokens {records['answer']:,} ({records['mean_answer']:,.0f}), most image patches "
        f"{records['patches']:,}",
        "disk, at most: "
        + ", ".join(f"{name} {count / 1e9:,.2f} GB" for name, count in disk.items()),
    ]
    if "zero3" not in found["strategies"]:
        lines.append("zero1 to zero3 need model.adapter.kind none: left out")
    if money["calls"]:
        lines.append(
            f"correction, at most: {money['calls']:,} calls, {money['sent']:,} tokens sent, "
            f"{money['received']:,} received, cost {money['cost']:,.2f} at the configured prices"
        )
    return lines
