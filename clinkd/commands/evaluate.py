"""`clinkd evaluate`: a prediction file, or the evaluation stage of a config."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clinkd.errors import ConfigError, DataError

metrics_app = typer.Typer(
    help="What metrics need beyond the package.", no_args_is_help=True, rich_markup_mode=None
)


@metrics_app.callback()
def metrics() -> None:
    """Keep `fetch` a command of its own while it is the only one."""


@metrics_app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="METRIC", help="spice")],
    source: Annotated[Path, typer.Option("--from", help="CoreNLP 3.6.0's zip file")],
    sha256: Annotated[str, typer.Option("--sha256", help="its sum, checked before use")],
) -> None:
    """Take the parser that SPICE needs out of a file you have, into the user cache."""
    from clinkd.evaluate.text.fetch import fetch_spice

    if name != "spice":
        raise ConfigError(f"nothing can be fetched for {name!r}; expected spice")
    for path in fetch_spice(source, sha256):
        typer.echo(str(path))


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="run folders or prediction files, two or more")
    ],
    protocol: Annotated[str, typer.Option("--protocol", help="bird, clinkd or strict")] = "clinkd",
    meteor: Annotated[str, typer.Option("--meteor", help="jar, python or auto")] = "auto",
    spice: Annotated[bool, typer.Option("--spice", help="SPICE's jar for RC")] = False,
    form: Annotated[
        str, typer.Option("--format", help="markdown, latex, csv or json")
    ] = "markdown",
    published: Annotated[
        bool, typer.Option("--published", help="the paper's figures beside them")
    ] = False,
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=0, help="resamples")] = 1000,
) -> None:
    """Tables of several runs, paired tests against the first, and the records that differ most."""
    from clinkd.evaluate import protocols
    from clinkd.evaluate.compare import compare as compare_rows
    from clinkd.evaluate.predictions import read_predictions
    from clinkd.evaluate.run import meteor_metric
    from clinkd.evaluate.score import score_model
    from clinkd.evaluate.tables import (
        FORMATS,
        long_table,
        models_by_task,
        render,
        tasks_by_modality,
    )

    if len(runs) < 2:
        raise ConfigError("compare needs two runs or more")
    if form not in FORMATS:
        raise ConfigError(f"unknown table format {form!r}; expected one of {', '.join(FORMATS)}")
    rules, metric = protocols.protocol(protocol), meteor_metric(meteor)
    rows = {str(run): read_predictions(_predictions(run)).rows for run in runs}
    if len(rows) < len(runs):
        raise ConfigError("the same run is named twice")
    models = {
        name: score_model(mine, rules, label=name, meteor=metric, spice=spice, bootstrap=bootstrap)
        for name, mine in rows.items()
    }
    first, *others = rows
    pairs = {
        name: compare_rows(
            rows[first], rows[name], rules, meteor=metric, spice=spice, bootstrap=bootstrap
        )
        for name in others
    }
    if form == "json":
        result = {"protocol": protocol, "models": models, "pairs": pairs}
        if published:
            result["published"] = json.loads(render(models_by_task({}, published=True), "json"))
        typer.echo(json.dumps(result, indent=2))
        return
    if form == "csv":
        tables = [long_table(models, pairs, published=published)]
    else:
        tables = [models_by_task(models, published=published)]
        tables += [tasks_by_modality(model) for model in models.values()]
    typer.echo("\n\n".join(render(table, form) for table in tables))
    apart = form != "markdown"  # prose would spoil a file of the tables
    for name, model in models.items():
        for note in model.get("notes", []):
            typer.echo(f"\n{name}: {note}", err=apart)
    for name, tasks in pairs.items():
        _show_pair(first, name, tasks, err=apart)


def _predictions(run: Path) -> Path:
    path = run / "predictions.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise DataError(f"{path}: no predictions there; `clinkd generate` makes them")
    return path


def _show_pair(first: str, second: str, tasks: dict[str, Any], *, err: bool = False) -> None:
    from clinkd.evaluate.tables import ONE_GROUP

    typer.echo(f"\n{second} against {first}:", err=err)
    for task, pair in tasks.items():
        sure = ""
        if pair.get("ci95"):
            low, high = pair["ci95"]
            sure = f", 95 % [{low:+.2f}, {high:+.2f}], p {pair['p']:.3g}"
        elif "ci95" in pair:
            sure = f", {ONE_GROUP}"
        score = f"{pair['metric']}: {pair['difference']:+.2f} (n {pair['n']}{sure})"
        typer.echo(f"{task} {score}", err=err)
        for row in pair["most_different"][:3]:
            typer.echo(
                f"    {row['id']} {row['difference']:+.1f}: truth {row['annotation']!r:.100}",
                err=err,
            )
            typer.echo(f"        {row['first']!r:.100} → {row['second']!r:.100}", err=err)


def evaluate_file(
    predictions: Path,
    *,
    reference: Path | None,
    protocol: str,
    task: str | None,
    meteor: str,
    spice: bool,
    skip_bad: bool,
    as_json: bool,
    boxes: str | None = None,
) -> None:
    """Score a prediction file and print the table.

    Args:
        boxes: convention of the boxes in the answers; see `read_predictions`.
    """
    from clinkd.data.records import read_records
    from clinkd.evaluate import protocols
    from clinkd.evaluate.predictions import read_predictions
    from clinkd.evaluate.run import meteor_metric
    from clinkd.evaluate.score import score_model

    rules = protocols.protocol(protocol)
    found = read_predictions(
        predictions,
        reference=read_records(reference) if reference else None,
        task=task,
        skip_bad=skip_bad,
        boxes=boxes,
    )
    metric = meteor_metric(meteor)
    model = score_model(found.rows, rules, label=predictions.name, meteor=metric, spice=spice)
    bad = [{"line": number, "why": why} for number, why in found.bad]
    if as_json:
        left_out = {"bad_lines": bad, "missing": found.missing}
        typer.echo(json.dumps({"protocol": protocol, **left_out, **model}, indent=2))
        return
    _show(model, protocol, bad, found.missing, protocols.DIFFERENCES)


def _show(
    model: dict[str, Any],
    protocol: str,
    bad: list[dict[str, Any]],
    missing: list[str],
    notes: tuple[str, ...],
) -> None:
    from clinkd.evaluate.tables import ONE_GROUP
    from clinkd.progress import Console

    console = Console()
    console.results({"models": {"model": model}})
    for task, result in model["tasks"].items():
        parts = ", ".join(
            f"{name} {part['score']:.1f} (n {part['n']})"
            for name, part in result["modalities"].items()
        )
        alone = f"; {ONE_GROUP}" if "ci95" in result and result["ci95"] is None else ""
        console.print(f"{task}: {parts}{alone}")
        for name, value in result.get("extras", {}).items():
            console.print(f"    {name} {value:.{0 if name.endswith('_n') else 1}f}")
    console.print("")
    console.print(f"protocol {protocol}:")
    for note in notes:
        if protocol in note:
            console.print(f"- {note}")
    for note in model.get("notes", []):
        console.print(f"warning: {note}")
    if bad:
        console.print(f"{len(bad)} malformed lines left out:")
        for row in bad[:20]:
            console.print(f"    line {row['line']}: {row['why']}")
    if missing:
        console.print(f"{len(missing)} records without a usable line, left out:")
        for name in missing[:20]:
            console.print(f"    {name}")


def is_config(path: Path) -> bool:
    """Whether a path names a config rather than predictions.

    Raises:
        ConfigError: neither a YAML nor a JSON-lines file by its name.
    """
    if path.suffix in (".yaml", ".yml"):
        return True
    if path.suffix in (".jsonl", ".json"):
        return False
    if path.is_dir():
        files = [path / "config.yaml", path / "predictions.jsonl"]
        files += sorted(path.glob("predictions/*.jsonl"))
        found = ", ".join(str(file) for file in files if file.is_file())
        raise ConfigError(
            f"{path} is a folder; give a run's config.yaml, for its own evaluation, or a file of "
            f"its predictions: {found or 'it holds neither'}"
        )
    raise ConfigError(f"{path}: must be predictions (.jsonl) or a config (.yaml)")
