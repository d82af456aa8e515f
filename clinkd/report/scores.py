"""What the page says in numbers: headline, table, modalities, curves, stages."""

import math
from collections.abc import Mapping
from typing import Any

from clinkd.averages import comparable_average
from clinkd.data.records import TASKS
from clinkd.progress import format_seconds
from clinkd.report import charts
from clinkd.report.read import Row, Run

TASK_TITLES = {
    "VG": "Visual grounding",
    "ROC": "Referring object classification",
    "RC": "Referring captioning",
    "MIA": "Medical image analysis",
}
_FINAL = ("sasg", "corrected", "distilled", "teacher")  # the last of these that a run reached
_CURVES = (("loss", "loss"), ("ce", "cross-entropy"), ("kd", "distillation (KD)"))


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of 400 digits
        return None


def results(metrics: Row) -> Row | None:
    """Everything the table and the headline need; None where there are no scores."""
    known = models(metrics.get("models"))
    baselines = models(metrics.get("baselines"))
    if not known:
        return None
    everyone = [*known.values(), *baselines.values()]
    tasks = [t for t in TASKS if any(t in m["tasks"] for m in everyone)]
    for model in everyone:
        model["average"] = comparable_average(model, tasks)
    verdicts = metrics.get("verdicts")
    final = next((name for name in _FINAL if name in known), list(known)[-1])
    for name, model in known.items():
        model["final"] = name == final
    return {
        "models": known,
        "baselines": baselines,
        "tasks": tasks,
        "final": known[final],
        "base": known.get("base") if final != "base" else None,
        "teacher": known.get("teacher") if final != "teacher" else None,
        "metrics": {
            t: next(m["tasks"][t]["metric"] for m in everyone if t in m["tasks"]) for t in tasks
        },
        "verdicts": [str(v) for v in verdicts] if isinstance(verdicts, list) else [],
        "protocol": str(metrics.get("protocol") or ""),
        "method": _method(object_(metrics.get("settings"))),
    }


def _method(settings: Row) -> Row:
    """How the scores were made: plain settings, and lists of sentences."""
    plain = {k: v for k, v in settings.items() if not isinstance(v, list | dict)}
    listed = [str(item) for v in settings.values() if isinstance(v, list) for item in v]
    facts = [(str(k).replace("_", " "), str(v)) for k, v in plain.items()]
    return {"facts": facts, "notes": listed}


def models(value: Any) -> dict[str, Row]:
    """Models of metrics.json with every number checked."""
    found: dict[str, Row] = {}
    for name, model in object_(value).items():
        if not isinstance(model, dict):
            continue
        tasks = object_(model.get("tasks"))
        found[str(name)] = {
            "key": str(name),
            "label": str(model.get("label") or name),
            "average": number(model.get("average")),
            "tasks": {t: _result(r) for t, r in tasks.items() if isinstance(r, dict)},
            "final": False,
        }
    return found


def _result(result: Row) -> Row:
    interval = result.get("ci95")
    bounds = [number(b) for b in interval] if isinstance(interval, list) else []
    return {
        "metric": str(result.get("metric") or "score"),
        "score": number(result.get("score")),
        "n": number(result.get("n")),
        "ci95": bounds if len(bounds) == 2 and None not in bounds else None,
        "alone": "ci95" in result and interval is None,  # one group, which has no interval
        "modalities": {
            str(m): {"score": number(r.get("score")), "n": number(r.get("n"))}
            for m, r in object_(result.get("modalities")).items()
            if isinstance(r, dict)
        },
        "extras": {str(k): v for k, v in object_(result.get("extras")).items()},
    }


def object_(value: Any) -> Row:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def task_tiles(found: Row) -> list[Row]:
    """One tile a task: the final score among the others."""
    tiles = []
    for task in found["tasks"]:
        own = found["final"]["tasks"].get(task, {})
        marks = {
            name: (found[name] or {}).get("tasks", {}).get(task, {}).get("score")
            for name in ("base", "teacher")
        }
        baseline = best_baseline(found["baselines"], task)
        marks["baseline"] = baseline[1] if baseline else None
        score = own.get("score")
        tiles.append(
            {
                "task": task,
                "title": TASK_TITLES.get(task, task),
                "metric": found["metrics"][task],
                "score": score,
                "n": own.get("n"),
                "ci95": own.get("ci95"),
                "alone": own.get("alone", False),
                "gain": difference(score, marks["base"]),
                "marks": marks,
                "baseline": baseline,
                "standing": standing(score, own.get("ci95"), baseline),
                "strip": charts.range_strip(score, own.get("ci95"), marks),
            }
        )
    return tiles


def standing(
    score: float | None, interval: list[float] | None, baseline: tuple[str, float] | None
) -> str | None:
    """In a word, how a score compares with its best trivial baseline: below, unclear or above.

    Unclear is above it, but with the baseline inside the 95 % interval.
    """
    if score is None or baseline is None:
        return None
    if score <= baseline[1]:
        return "below"
    return "unclear" if interval is not None and interval[0] <= baseline[1] else "above"


def best_baseline(baselines: Mapping[str, Row], task: str) -> tuple[str, float] | None:
    """(label, score) of the strongest trivial baseline of a task."""
    scores = [
        (model["label"], model["tasks"][task]["score"])
        for model in baselines.values()
        if model["tasks"].get(task, {}).get("score") is not None
    ]
    return max(scores, key=lambda pair: pair[1]) if scores else None


def difference(a: float | None, b: float | None) -> float | None:
    """a - b, or None where one is missing."""
    return None if a is None or b is None else a - b


def modality_panels(found: Row) -> list[Row]:
    """One panel a task: a row per modality, most questions first."""
    panels = []
    for task in found["tasks"]:
        own = found["final"]["tasks"].get(task, {}).get("modalities", {})
        base = _modalities_of(found["base"], task)
        baselines = [_modalities_of(model, task) for model in found["baselines"].values()]
        rows = []
        for modality, result in sorted(own.items(), key=lambda kv: (-(kv[1]["n"] or 0), kv[0])):
            trivial = [b[modality]["score"] for b in baselines if modality in b]
            trivial = [score for score in trivial if score is not None]
            below = base.get(modality, {}).get("score")
            marks = {"baseline": max(trivial) if trivial else None}
            rows.append(
                {
                    "modality": modality,
                    "n": result["n"],
                    "score": result["score"],
                    "base": below,
                    "baseline": marks["baseline"],
                    "bar": charts.bar(result["score"], "final", marks),
                    "base_bar": charts.bar(below, "base"),
                }
            )
        if rows:
            title = TASK_TITLES.get(task, task)
            panels.append(
                {"task": task, "title": title, "metric": found["metrics"][task], "rows": rows}
            )
    return panels


def _modalities_of(model: Row | None, task: str) -> Row:
    return (model or {}).get("tasks", {}).get(task, {}).get("modalities", {})  # type: ignore[no-any-return]


def extras_table(found: Row) -> list[Row]:
    """(task, measure, value of each model): the secondary measures of metrics.json."""
    rows = []
    everyone = [*found["models"].values(), *found["baselines"].values()]
    for task in found["tasks"]:
        names: dict[str, None] = {}
        for model in everyone:
            names |= dict.fromkeys(model["tasks"].get(task, {}).get("extras", {}))
        for name in names:
            values = [
                model["tasks"].get(task, {}).get("extras", {}).get(name) for model in everyone
            ]
            if any(number(v) is not None for v in values):
                values = [number(v) for v in values]
                rows.append({"task": task, "name": name.replace("_", " "), "cells": values})
    return rows


def loss_panels(run: Run) -> list[Row]:
    """One chart a stage, in the order the stages ran."""
    stages: dict[str, list[Row]] = {}
    for row in run.log:
        if number(row.get("step")) is not None:
            stages.setdefault(str(row.get("stage")), []).append(row)
    panels = []
    for stage, rows in stages.items():
        rows.sort(key=lambda row: float(row["step"]))
        curves = []
        for key, label in _CURVES:
            points = tuple(
                (float(row["step"]), value)
                for row in rows
                if (value := number(row.get(key))) is not None
            )
            if points:
                curves.append(charts.Curve(key, label, points))
        if [curve.kind for curve in curves] == ["loss", "ce"] and _same(*curves):
            curves = curves[:1]  # without distillation the loss is the cross-entropy
        if curves:
            panels.append(
                {
                    "stage": stage,
                    "curves": curves,
                    "steps": int(rows[-1]["step"]),
                    "svg": charts.loss_chart(stage, curves),
                }
            )
    return panels


def _same(a: charts.Curve, b: charts.Curve) -> bool:
    """Whether two curves coincide to the eye; one is rounded and the other is not."""
    pairs = zip(a.points, b.points, strict=False)
    return len(a.points) == len(b.points) and all(
        x == u and math.isclose(y, v, rel_tol=1e-2) for (x, y), (u, v) in pairs
    )


def stage_rows(run: Run) -> Row:
    """Time and memory of each stage, and their sum and maximum."""
    rows = []
    # a page cannot tell how long it took itself; an earlier page's time would make pages differ
    stages = {name: entry for name, entry in run.stages.items() if name != "report"}
    seconds = [number(entry.get("seconds")) or 0.0 for entry in stages.values()]
    peaks = [number(entry.get("peak_mib")) or 0.0 for entry in stages.values()]
    for (name, entry), took, peak in zip(stages.items(), seconds, peaks, strict=True):
        rows.append(
            {
                "name": name,
                "status": str(entry.get("status") or "unknown"),
                "summary": str(entry.get("summary") or ""),
                "started": str(entry.get("started") or ""),
                "took": format_seconds(took) if took else "–",
                "peak": f"{peak:,.0f} MiB".replace(",", " ") if peak else "–",
                "bar": charts.bar(100 * took / max(seconds) if max(seconds) else None, "final"),
            }
        )
    total = {
        "took": format_seconds(sum(seconds)),
        "peak": f"{max(peaks, default=0.0):,.0f} MiB".replace(",", " "),
    }
    return {"rows": rows, "total": total}
