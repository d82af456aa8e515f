"""`clinkd data`: convert, check, describe and split data sets."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from clinkd.data.files import require_lines
from clinkd.errors import ConfigError, DataError

app = typer.Typer(
    help="Convert, check, describe and split data sets. Formats: clinkd, bird, llava, llava-med, "
    "sharegpt, swift; files: .jsonl, .json, .parquet. See docs/data.md.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Root = Annotated[
    Path | None,
    typer.Option("--root", help="folder of all images; default: that of the first file"),
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="file to read")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="file to write")],
    source_format: Annotated[
        str, typer.Option("--from", metavar="FORMAT", help="format of IN")
    ] = "clinkd",
    target_format: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="format of OUT")
    ] = "clinkd",
    source_boxes: Annotated[
        str | None,
        typer.Option(
            "--from-boxes", metavar="BOXES", help="how IN writes boxes: qwen2, box, qwen2.5, qwen3"
        ),
    ] = None,
    target_boxes: Annotated[
        str | None, typer.Option("--boxes", metavar="BOXES", help="how OUT shall write them")
    ] = None,
    root: Root = None,
    task: Annotated[
        str | None, typer.Option(help="VG, ROC, RC or MIA, for rows that name none")
    ] = None,
    pixels: Annotated[
        str, typer.Option(help="qwen2.5 boxes count pixels of the 'resized' or 'original' image")
    ] = "resized",
    min_pixels: Annotated[int, typer.Option(min=1, help="of the resized image")] = 56 * 56,
    max_pixels: Annotated[int, typer.Option(min=1, help="of the resized image")] = 768 * 768,
    factor: Annotated[int, typer.Option(min=1, help="both sides are multiples of it")] = 28,
    skip_faulty: Annotated[
        bool, typer.Option("--skip-faulty", help="leave faulty rows out instead of stopping")
    ] = False,
) -> None:
    """Convert a data set from one project's format to another's.

    \b
    Med-GRIT for this package:
      clinkd data convert test_VG.json test.jsonl --from bird --task VG
    for LLaMA-Factory with Qwen2.5-VL, which counts pixels:
      clinkd data convert train.jsonl train.json --to sharegpt --boxes qwen2.5 --root images
    for ms-swift, and back:
      clinkd data convert train.jsonl swift.jsonl --to swift
      clinkd data convert swift.jsonl again.jsonl --from swift
    """
    from clinkd.data import formats

    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"OUT must be another file than IN, {source}")
    shared: dict[str, Any] = {
        "root": root or source.parent,
        "task": task,
        "pixels": pixels,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "factor": factor,
    }
    reading = formats.Options(boxes=_boxes(source_boxes), **shared)
    writing = formats.Options(boxes=_boxes(target_boxes), **shared)
    records = []
    faults: list[tuple[str, DataError]] = []
    for place, found in formats.scan_file(source, source_format, reading):
        if isinstance(found, DataError):
            faults.append((place, found))
        else:
            records.append(found)
    whys = {re.sub(r"^\S+: ", "", str(why)) for _, why in faults}  # without the row's id
    if len(whys) == 1 < len(faults) and not records:  # another format: one line tells it
        _print_faults([f"{source}: all {len(faults)} rows: {why}" for why in whys])
    else:
        _print_faults([f"{place}: {why}" for place, why in faults])
    if faults and not records and (others := _readable_as(source, reading)):
        typer.echo(f"its first row can be read with --from {' or '.join(others)}", err=True)
    if faults and not skip_faulty:
        raise DataError(
            f"{len(faults)} faults in {source}, nothing written; mend them, or leave those rows "
            "out with --skip-faulty"
        )
    formats.write_file(target, records, target_format, writing)
    left_out = f", {len(faults)} left out" if faults else ""
    typer.echo(f"{target}: {len(records)} records{left_out}")


@app.command()
def check(
    train: Annotated[Path, typer.Argument(help="file of records, or the training split")],
    test: Annotated[Path | None, typer.Argument(help="the test split: leaks are found too")] = None,
    root: Root = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="decode every image, not its header alone; slower")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the faults as JSON")] = False,
) -> None:
    """Find every fault of a data set, each with its file and line; exit code 3 if there is any.

    \b
      clinkd data check train.jsonl
      clinkd data check train.jsonl test.jsonl --root images --decode
    Looks for broken JSON, unknown tasks, duplicate ids, images that are missing, cut off, of
    another size than stated or outside the root, boxes outside the image or reversed or not those
    of the text, and patients, volumes or images that stand in both splits.
    """
    from clinkd.data.checks import ImageCheck, check_dataset

    for path in (train, test):
        if path is not None:
            require_lines(path)
    how: ImageCheck = "decode" if decode else "header"
    faults = check_dataset(train, test, root or train.parent, images=how)
    if as_json:
        rows = [{"place": fault.place, "message": fault.message} for fault in faults]
        typer.echo(json.dumps({"faults": rows}, indent=2, ensure_ascii=False))
    else:
        _print_faults([str(fault) for fault in faults])
        typer.echo(f"{len(faults)} faults" if faults else "no faults")
    if faults:
        raise typer.Exit(DataError.exit_code)


@app.command()
def stats(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="file of records")],
    source_format: Annotated[
        str, typer.Option("--from", metavar="FORMAT", help="its format")
    ] = "clinkd",
    root: Root = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count records by task and modality; sizes of boxes, lengths of texts.

    \b
      clinkd data stats train.jsonl
      clinkd data stats test_VG.json --from bird --json
    """
    from clinkd.data import formats
    from clinkd.data.stats import describe

    folder = root or source.parent
    options = formats.Options(root=folder)
    facts = describe(formats.read_file(source, source_format, options), folder)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_stats(facts)


@app.command()
def split(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="file of records")],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="where the parts go")],
    test: Annotated[float, typer.Option(help="share of the test split")] = 0.1,
    valid: Annotated[float, typer.Option(help="share of a validation split; 0: none")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
    root: Root = None,
) -> None:
    """Split by patient or volume, every task and modality in its share.

    \b
      clinkd data split all.jsonl data --test 0.1 --valid 0.05 --seed 1
      clinkd data split all.jsonl data --root images
      clinkd data check data/train.jsonl data/test.jsonl --root images
    Writes data/train.jsonl, data/test.jsonl, data/valid.jsonl. Records with one `group`, or with
    one image file, stay together. The same seed gives the same split, whatever the order of lines.
    Image paths stay as they are: relative to the data root, not to the new folder; a
    config names that root in data.root.
    """
    from clinkd.data import split as splitting
    from clinkd.data.clusters import image_files
    from clinkd.data.records import read_records, write_records

    require_lines(source)
    records, folder = read_records(source), root or source.parent
    fractions = {"test": test} | ({"valid": valid} if valid else {})
    parts = splitting.split(records, fractions, seed, folder)
    for part in parts:
        if (output / f"{part}.jsonl").exists():
            raise ConfigError(f"{output / part}.jsonl exists already; name another folder")
    _note_missing(image_files(records, folder), folder)
    for part, chosen in parts.items():
        write_records(output / f"{part}.jsonl", chosen)
        tasks = Counter(record.task for record in chosen)
        shares = ", ".join(f"{task} {tasks[task]}" for task in sorted(tasks))
        groups = len({record.group for record in chosen})
        typer.echo(f"{output / part}.jsonl: {len(chosen)} records, {groups} groups ({shares})")


def _note_missing(files: dict[str, str], root: Path) -> None:
    """Say that images were told apart by their names alone: a link could be one file twice."""
    found = {name for name, file in files.items() if Path(file).is_absolute()}
    missing = [name for name in files if name not in found or Path(name).is_absolute()]
    if missing:
        typer.echo(
            f"{len(missing)} of {len(files)} images are not under {root}, {min(missing)!r} for "
            "one: they were told apart by their names, so links may hide that two are one file; "
            "say where they lie with --root FOLDER",
            err=True,
        )


def _readable_as(source: Path, options: Any) -> list[str]:
    """The formats in which a file's first row is none of the faults."""
    from clinkd.data import formats

    first = {name: next(formats.scan_file(source, name, options)) for name in formats.FORMATS}
    return [name for name, (_, found) in first.items() if not isinstance(found, DataError)]


def _boxes(name: str | None) -> Any:
    from clinkd.data.boxes import CONVENTIONS

    if name is not None and name not in CONVENTIONS:
        raise ConfigError(f"unknown boxes {name!r}; expected one of {', '.join(CONVENTIONS)}")
    return name


def _print_faults(faults: list[str]) -> None:
    for fault in faults:
        typer.echo(fault, err=True)


def _print_stats(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from clinkd.data.records import TASKS

    console = Console(highlight=False)
    table = Table("modality", box=None)
    for task in (*TASKS, "all"):
        table.add_column(task, justify="right")
    rows = facts["counts"]
    for modality, counts in rows.items():
        table.add_row(modality, *(str(counts[t]) for t in TASKS), str(sum(counts.values())))
    sums = [sum(counts[t] for counts in rows.values()) for t in TASKS]
    table.add_row("all", *map(str, sums), str(sum(sums)), style="bold")
    console.print(table)
    console.print(
        f"\n{facts['records']} records on {facts['images']} image files, {facts['groups']} groups, "
        f"{facts['boxes']} boxes, {facts['duplicate_questions']} duplicate questions\n"
    )
    table = Table("", box=None)
    names = ("box_area_percent", "question_words", "answer_words", "image_width", "image_height")
    for column in ("min", "p5", "median", "p95", "max", "mean"):
        table.add_column(column, justify="right")
    for name in names:
        if facts[name] is not None:
            table.add_row(name.replace("_", " "), *(f"{v:g}" for v in facts[name].values()))
    console.print(table)
