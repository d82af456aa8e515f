"""`clinkd evaluate`: a prediction file, or the evaluation stage of a config."""

import json
from pathlib import Path
from typing import Any

import typer

from clinkd.errors import ConfigError


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
) -> None:
    """Score a prediction file and print the table."""
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
    )
    metric = meteor_metric(meteor)
    model = score_model(found.rows, rules, label=predictions.name, meteor=metric, spice=spice)
    bad = [{"line": number, "why": why} for number, why in found.bad]
    if as_json:
        typer.echo(json.dumps({"protocol": protocol, "bad_lines": bad, **model}, indent=2))
        return
    _show(model, protocol, bad, protocols.DIFFERENCES)


def _show(
    model: dict[str, Any], protocol: str, bad: list[dict[str, Any]], notes: tuple[str, ...]
) -> None:
    from clinkd.progress import Console

    console = Console()
    console.results({"models": {"model": model}})
    for task, result in model["tasks"].items():
        parts = ", ".join(
            f"{name} {part['score']:.1f} (n {part['n']})"
            for name, part in result["modalities"].items()
        )
        console.print(f"{task}: {parts}")
        for name, value in result.get("extras", {}).items():
            console.print(f"    {name} {value:.1f}")
    console.print("")
    console.print(f"protocol {protocol}:")
    for note in notes:
        if protocol in note.split(":")[0] or note.startswith("all"):
            console.print(f"- {note}")
    if bad:
        console.print(f"{len(bad)} malformed lines left out:")
        for row in bad[:20]:
            console.print(f"    line {row['line']}: {row['why']}")


def is_config(path: Path) -> bool:
    """Whether a path names a config rather than predictions.

    Raises:
        ConfigError: neither a YAML nor a JSON-lines file by its name.
    """
    if path.suffix in (".yaml", ".yml"):
        return True
    if path.suffix in (".jsonl", ".json"):
        return False
    raise ConfigError(f"{path}: must be predictions (.jsonl) or a config (.yaml)")
