"""`clinkd ablate`: the paper's Table 2 on one's own data."""

import os
from pathlib import Path
from typing import Annotated

import typer

from clinkd.recipes import config_file


def ablate(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file with every part on: the cell 'all'", callback=config_file),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="settings of every cell")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="folder; a run folder a seed and cell in it")
    ] = Path("ablation"),
    seeds: Annotated[str, typer.Option("--seeds", help="numbers, with commas")] = "0,1,2",
    form: Annotated[
        str, typer.Option("--format", help="markdown, latex, csv or json")
    ] = "markdown",
    published: Annotated[
        bool, typer.Option("--published", help="the paper's figures beside them")
    ] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="accept cells of another config; redo the stages it concerns"
        ),
    ] = False,
) -> None:
    """Train and score base, + MCG-RoPE, + KD, + correction, + SASG and all, with several seeds.
    Started again, it goes on where it was."""
    from clinkd.config import load
    from clinkd.errors import ConfigError
    from clinkd.evaluate.tables import FORMATS, ablation_table, render
    from clinkd.pipeline.ablation import ablate as run_cells
    from clinkd.progress import Console

    if form not in FORMATS:
        raise ConfigError(f"unknown table format {form!r}; expected one of {', '.join(FORMATS)}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds must be numbers with commas, as in 0,1,2; got {seeds!r}") from (
            None
        )
    for override in overrides or []:
        if override.startswith(("output=", "seed=")):
            raise ConfigError(f"{override!r}: each cell has its own; give --output and --seeds")
    if os.environ.get("NNODES", "") not in ("", "1"):
        raise ConfigError("ablate works on one machine: unset NNODES")
    settings = load(config, overrides or [])
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = run_cells(settings, Console(), output, numbers, update=update)
    typer.echo(render(ablation_table(result, published=published), form))
