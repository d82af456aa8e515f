"""The `clinkd` command. Nothing heavy is imported before a command runs."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from clinkd._version import __version__
from clinkd.commands.ablate import ablate
from clinkd.commands.ask import ask
from clinkd.commands.cache import app as cache_app
from clinkd.commands.data import app as data_app
from clinkd.commands.evaluate import compare, metrics_app
from clinkd.commands.llava_med import llava_med
from clinkd.commands.plan import plan
from clinkd.errors import ClinkdError, ConfigError
from clinkd.recipes import config_file

app = typer.Typer(
    name="clinkd",
    help="Distil, correct and fine-tune grounded medical vision-language models; pick the best "
    "answer; report. Start with: clinkd demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[
    Path,
    typer.Argument(help="YAML file; `clinkd recipes cp` makes one", callback=config_file),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="settings that replace the file's, as in seed=1"),
]
Update = Annotated[
    bool,
    typer.Option(
        "--update", help="accept a run folder of another config; redo the stages it concerns"
    ),
]


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="the run folder")] = Path("run"),
    quick: Annotated[
        bool, typer.Option("--quick", help="a few steps of everything, in two minutes")
    ] = False,
    update: Update = False,
) -> None:
    """Run everything on the shipped images with the embedded model; no GPU, no download."""
    from clinkd.recipes import recipe

    _execute(recipe("demo-quick" if quick else "demo"), [f"output={output}"], update=update)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    first: Annotated[str, typer.Option("--from", metavar="STAGE", help="start here")] = "prepare",
    last: Annotated[str, typer.Option("--to", metavar="STAGE", help="end here")] = "report",
    update: Update = False,
) -> None:
    """Run the stages of a config: prepare, teacher, pseudo-label, distill, correct, generate,
    evaluate, report. Stages whose inputs are unchanged are skipped."""
    _execute(config, overrides or [], first=first, last=last, update=update)


def _execute(
    config: Path,
    overrides: list[str],
    *,
    first: str = "prepare",
    last: str = "report",
    update: bool = False,
) -> None:
    from clinkd.config import load
    from clinkd.progress import Console

    if (config.parent / "run.json").is_file() and config.name == "config.yaml":
        overrides = [f"output={config.parent}", *overrides]  # a run's own, wherever it was moved
    settings = load(config, overrides)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console()
    from clinkd.pipeline.machines import leading, machines
    from clinkd.pipeline.runner import run as run_stages
    from clinkd.pipeline.workers import follow

    here = machines()
    if here is not None and here.rank > 0:
        follow(settings)
        return
    with leading():
        folder = run_stages(settings, console, first=first, last=last, update=update)
    if last in ("evaluate", "report"):
        console.results(json.loads((folder.path / "metrics.json").read_text(encoding="utf-8")))
    if last == "report":
        console.print(f"report: {folder.path / 'report.html'}")


def _add_stage(stage: str, summary: str) -> None:
    def command(config: Config, overrides: Overrides = None, update: Update = False) -> None:
        _execute(config, overrides or [], first=stage, last=stage, update=update)

    app.command(name=stage, help=summary, rich_help_panel="Stages")(command)


_add_stage("prepare", "Check the data and draw the teacher's share.")
_add_stage("teacher", "Fine-tune the teacher on its share of the training split.")
_add_stage("pseudo-label", "Let the teacher answer the training split.")
_add_stage("distill", "Train the student on the truth and the teacher's distributions.")
_add_stage("correct", "Correct the student's weak answers against the truth, and learn from them.")
_add_stage("generate", "Answer the test split: beams, and CLIP chooses.")
_add_stage("report", "Write the HTML report.")


@app.command()
def evaluate(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(help="predictions (.jsonl) or a config (.yaml)")],
    overrides: Overrides = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="records that hold the truth, by id")
    ] = None,
    protocol: Annotated[
        str, typer.Option("--protocol", help="bird, clinkd or strict; docs/evaluation.md")
    ] = "clinkd",
    task: Annotated[
        str | None, typer.Option("--task", help="VG, ROC, RC or MIA, for rows that name none")
    ] = None,
    meteor: Annotated[
        str, typer.Option("--meteor", help="jar, python or auto: the jar where Java is")
    ] = "auto",
    spice: Annotated[bool, typer.Option("--spice", help="SPICE's jar for RC")] = False,
    boxes: Annotated[
        str | None,
        typer.Option("--boxes", help="form of the answers' boxes: qwen2, box, qwen2.5 or qwen3"),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave malformed lines and missing records out")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    update: Update = False,
) -> None:
    """Score a prediction file by a published protocol, or do the evaluation stage of a config."""
    from clinkd.commands.evaluate import evaluate_file, is_config

    sources = {p.opts[0]: context.get_parameter_source(p.name) for p in context.command.params}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    if is_config(target):
        wrong = sorted(given - {"target", "overrides", "--update"})
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)}: of a prediction file; a config says evaluate.protocol, "
                "evaluate.meteor and evaluate.spice, as in evaluate.protocol=strict"
            )
        _execute(target, overrides or [], first="evaluate", last="evaluate", update=update)
        return
    if overrides or update:
        raise ConfigError(f"{target} is a prediction file: key=value and --update are of a config")
    evaluate_file(
        target,
        reference=reference,
        protocol=protocol,
        task=task,
        meteor=meteor,
        spice=spice,
        boxes=boxes,
        skip_bad=skip_bad,
        as_json=as_json,
    )


@app.command()
def validate(config: Config, overrides: Overrides = None) -> None:
    """Check a config without running it, and print all of it, defaults included."""
    from clinkd.config import dump, load

    typer.echo(dump(load(config, overrides or [])), nl=False)


@app.command()
def doctor() -> None:
    """Say what this machine has, and which implementation each op takes here, and why."""
    from clinkd.doctor import diagnose

    for line in diagnose():
        typer.echo(line)


app.command()(plan)
app.command()(ask)
app.command()(compare)
app.command()(ablate)
app.command("llava-med")(llava_med)
app.add_typer(metrics_app, name="metrics")
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")
recipes_app = typer.Typer(help="The configs that come with clinkd.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the configs."""
    from clinkd.recipes import recipes, summary

    for name, path in recipes().items():
        typer.echo(f"{name:24} {summary(path)}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="a name of `recipes ls`")]) -> None:
    """Print a config."""
    from clinkd.recipes import recipe

    typer.echo(recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="a name of `recipes ls`")],
    target: Annotated[Path, typer.Argument(help="file or folder to copy to")] = Path("."),
) -> None:
    """Copy a config to change it."""
    from clinkd.data.files import write_text
    from clinkd.recipes import recipe

    source = recipe(name)
    place = target / source.name if target.is_dir() else target
    if place.exists():
        raise ConfigError(f"{place} exists already; name another file")
    write_text(place, source.read_text(encoding="utf-8"))
    typer.echo(f"{place}: change it, then run: clinkd run {place}")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and an exit code."""
    try:
        app()
    except ClinkdError as error:
        typer.echo(f"clinkd: {error}", err=True)
        sys.exit(error.exit_code)
