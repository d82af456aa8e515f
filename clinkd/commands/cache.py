"""`clinkd cache`: what is in a run's teacher cache, and how good it is."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The teacher's answers kept on disk (distill.teacher_cache). See docs/distillation.md.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NAMES = {
    "kd_exact": "KD from the teacher itself, mean over tokens",
    "kd_cached": "KD from the cache, mean",
    "kd_error_mean": "difference of a token's KD, mean",
    "kd_error_max": "difference of a token's KD, largest",
    "gradient_error": "difference of the gradient, relative",
    "mass": "teacher's probability inside the kept logits, mean",
    "mass_least": "the same, least",
}


@app.command()
def check(
    run: Annotated[Path, typer.Argument(help="the run folder")],
    records: Annotated[
        int, typer.Option(min=1, help="compare the loss of so many records with the exact one")
    ] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Verify a run's cache against its data, settings and checksums, and report its error.

    The error is that of the distillation term at the run's temperature and divergence, against the
    teacher itself, which is loaded for it.
    """
    from clinkd.pipeline.runner import quiet_libraries

    quiet_libraries()
    from clinkd.pipeline.cache_check import check_cache  # here: it imports torch

    found = check_cache(run, records)
    if as_json:
        typer.echo(json.dumps(found))
        return
    size = f"{found['bytes'] / 1e6:.1f} MB"
    typer.echo(
        f"{found['kind']} cache of {found['records']} records in {found['shards']} shards, {size}"
    )
    if "tokens" not in found:
        typer.echo(f"not whole: {found['missing']} shards are missing; `clinkd distill` goes on")
        raise typer.Exit(3)
    typer.echo(f"fits this run, all checksums right; on {found['tokens']} answer tokens:")
    for name, text in NAMES.items():
        if name in found:
            typer.echo(f"  {text:52} {found[name]:.3g}")
