"""Builds report.html from a run folder: one page, nothing fetched, everything escaped."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from clinkd.data.files import write_text
from clinkd.evaluate.tables import plain
from clinkd.report import corrections, gallery, scores, selection
from clinkd.report.judge import MOST_JUDGED
from clinkd.report.paper import paper_tables
from clinkd.report.read import Row, Run, read_run

MOST_BYTES = 6_000_000  # of the page
_SPARE = 16_384  # of them, for what is said in place of the pictures that were left out

TEMPLATES = Path(__file__).parent / "templates"


def build_report(run_dir: Path, data_root: Path | None = None) -> Path:
    """Write `run_dir`/report.html from what the run folder holds; the page is replaced whole.

    A run that was stopped early gives a page that says what is missing.

    Args:
        data_root: folder that image paths are relative to; default: what config.yaml says.

    Returns:
        The page's path.

    Raises:
        DataError: `run_dir` does not exist.
        SetupError: the page cannot be written.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    page = render(run, Path(data_root) if data_root is not None else _data_root(run))
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def _data_root(run: Run) -> Path | None:
    """Where config.yaml says the images lie; None, with a notice, where it does not."""
    from clinkd.config import DataConfig
    from clinkd.pipeline.paths import data_root

    try:
        return data_root(DataConfig.model_validate(run.config.get("data", {})))
    except ValidationError:
        run.notices.append("config.yaml does not say where the images lie: no pictures.")
        return None


def render(run: Run, data_root: Path | None) -> str:
    """The page as HTML, under `MOST_BYTES`; the same run gives the same text."""
    chosen = gallery.choose(run.predictions)
    names = [name for row, _ in chosen for name in gallery.shown_images(row)]
    for rows in run.corrections.values():
        for row in corrections.examples(rows):
            names += gallery.image_names(row)[:1]
    pictures = gallery.Pictures(data_root, names)
    if pictures.missing:
        run.notices.append(
            f"{len(pictures.missing)} picture{'s'[: len(pictures.missing) > 1]} could not be read."
        )
    page = _page(run, chosen, pictures)
    if (over := len(page.encode()) - MOST_BYTES) > 0:
        pictures.save(over + _SPARE)
    if pictures.left_out:
        run.notices.append(
            f"{len(pictures.left_out)} picture{'s'[: len(pictures.left_out) > 1]} left out, or the "
            f"page would have more than {MOST_BYTES / 1e6:.0f} MB."
        )
        page = _page(run, chosen, pictures)
    return page


def _page(run: Run, chosen: list[tuple[Row, Row]], pictures: gallery.Pictures) -> str:
    cards = gallery.cards(chosen, pictures)
    found = scores.results(run.metrics)
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            style=Markup(style),
            script=Markup(script),
            policy=content_policy(style, script),
            run=run,
            about=_about(run),
            found=found,
            tiles=scores.task_tiles(found) if found else [],
            panels=scores.modality_panels(found) if found else [],
            extras=scores.extras_table(found) if found else [],
            paper=paper_tables(run.folder, found),
            selection=selection.selection(run.predictions, run.metrics),
            losses=scores.loss_panels(run),
            cards=cards,
            filters=_filters(cards),
            answered=len(run.predictions),
            most_judged=MOST_JUDGED,
            rounds=corrections.rounds(run.corrections, pictures),
            stages=_without_places(scores.stage_rows(run), run.config),
            settings=settings_table(run.config),
            difference=scores.difference,
        )
    )
    # half a surrogate pair, which JSON may hold, cannot be written as UTF-8
    return page.encode("utf-8", "replace").decode("utf-8")


def content_policy(style: str, script: str) -> str:
    """Content-Security-Policy: this style and this script, pictures in the page, nothing else."""
    return (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; "
        f"script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "signed": _signed, "whole": _whole, "kind": _kind}
    environment.filters["plain"] = plain
    return environment


def _score(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    """With a sign, and a real minus; none before a zero."""
    return "–" if value is None else f"{value:+z.1f}".replace("-", "−")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}".replace(",", " ")


_KINDS = {"ct": "CT", "mr": "MR", "mri": "MR", "x": "X-ray", "xray": "X-ray", "us": "ultrasound"}


def _kind(name: str) -> str:
    """A modality's name for people; unknown ones stay as the data writes them."""
    return _KINDS.get(name.lower(), name)


def _about(run: Run) -> dict[str, Any]:
    """What was run, in the words of the headline."""
    model = run.config.get("model")
    student = str(model.get("student") or "") if isinstance(model, Mapping) else ""
    starts = [str(entry.get("started") or "") for entry in run.stages.values()]
    machine, versions = run.book.get("machine"), run.book.get("versions")
    data = str(run.book.get("data") or "")
    modalities = {str(row.get("modality")) for row in run.predictions}
    return {
        "student": (
            "The embedded demo model" if student == "demo" else _place(student) or "Unknown model"
        ),
        "data": "the shipped sample" if data == "sample" else _end_of(data),
        "started": _moment(min((s for s in starts if s), default="")),
        "clinkd": str(run.book.get("clinkd") or ""),
        "seed": run.book.get("seed"),
        "modalities": len(modalities),
        "machine": _facts(machine),
        "versions": _facts(versions),
    }


def _moment(text: str) -> str:
    """An ISO time to the minute, in UTC; anything else as it is."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return text


def _facts(value: Any) -> list[tuple[str, str]]:
    items = value.items() if isinstance(value, Mapping) else ()
    return [(str(key).replace("_", " "), str(fact)) for key, fact in items]


def _filters(cards: list[dict[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """(attribute, label, values in the order shown) of the gallery's filter buttons."""
    order = [*scores.TASK_TITLES]
    return [
        ("task", "Task", sorted({c["task"] for c in cards}, key=order.index)),
        ("modality", "Modality", sorted({c["modality"] for c in cards})),
        (
            "verdict",
            "Answer",
            [v for v in ("right", "partly", "wrong") if any(c["verdict"] == v for c in cards)],
        ),
    ]


def settings_table(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of config.yaml with their keys in dots; values that stand alone come first."""
    alone = [(str(k), _value(v)) for k, v in config.items() if not isinstance(v, Mapping)]
    sections = [("run", alone)] if alone else []
    for name, section in config.items():
        if isinstance(section, Mapping):
            sections.append((str(name), _flat(section, "")))
    return sections


def _flat(section: Mapping[str, Any], before: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{key}.")
        else:
            rows.append((f"{before}{key}", _value(value)))
    return rows


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else _place(str(value))


def _place(name: str) -> str:
    """The end of a whole path: who is shown the page need not see more of this machine."""
    kind, colon, path = name.rpartition("local-dir:")  # of a scorer
    return f"{kind}{colon}…/{_end_of(path)}" if Path(path).is_absolute() else name


def _end_of(path: str) -> str:
    return "/".join([part for part in Path(path).parts if part != "/"][-2:])


def _without_places(stages: Row, config: Mapping[str, Any]) -> Row:
    """The stages' rows; where their summaries name a path of the config, its end."""
    paths = [text for text in _texts(config) if Path(text).is_absolute()]
    for row in stages["rows"]:
        for path in sorted(paths, key=len, reverse=True):
            row["summary"] = row["summary"].replace(path, _place(path))
    return stages


def _texts(section: Mapping[str, Any]) -> Iterator[str]:
    for value in section.values():
        if isinstance(value, Mapping):
            yield from _texts(value)
        elif isinstance(value, str):
            yield value.rpartition("local-dir:")[-1]
