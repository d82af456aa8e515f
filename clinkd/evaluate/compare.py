"""Two models on the same records: paired intervals of the difference, and where they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clinkd.data.records import TASKS
from clinkd.errors import DataError
from clinkd.evaluate.extras import true_boxes
from clinkd.evaluate.protocols import Protocol, Row, countable, in_one_form, measure
from clinkd.evaluate.score import groups_of, resampled, task_average

SHOWN = 10


def compare(
    first: Sequence[Row],
    second: Sequence[Row],
    rules: Protocol,
    *,
    meteor: str,
    spice: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Second minus first per task, in percent.

    Groups (volumes, patients) are resampled together in both. `p` is two-sided: twice the share of
    resamples on the rarer side of no difference, at least 1 / bootstrap. Both it and the
    interval are None for a single group, of which every resample is the same.

    Raises:
        DataError: the two do not answer the same records, or not to the same truth.
    """
    a, b = ({str(row["id"]): row for row in rows} for rows in (first, second))
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise DataError(f"{len(only)} records are in one of the two only, as {', '.join(only[:3])}")
    _require_same_truth(a, b)
    out: dict[str, Any] = {}
    for task in TASKS:
        mine = countable(task, [a[name] for name in sorted(a) if a[name]["task"] == task], rules)
        if mine:
            theirs = [b[str(row["id"])] for row in mine]
            out[task] = _task(task, mine, theirs, rules, meteor, spice, bootstrap, seed)
    return out


_TRUTH = ("task", "annotation", "boxes", "modality", "group")


def _require_same_truth(a: Mapping[str, Row], b: Mapping[str, Row]) -> None:
    """Two versions of a test split may share their ids; what differs is then not the models alone.

    Raises:
        DataError: what differs, of which records.
    """
    for key in _TRUTH:
        ids = sorted(name for name in a if _differs(key, a[name], b[name]))
        if ids:
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            raise DataError(
                f"the two do not have the same truth: '{key}' differs of {', '.join(ids[:3])}{more}"
                "; compare answers to one version of the records, with the same 'modality' and "
                "'group' in both files"
            )


def _differs(key: str, a: Row, b: Row) -> bool:
    if key == "annotation":  # the same boxes may be marked in Qwen2-VL's form here, in BiRD's there
        return in_one_form(a[key]).strip() != in_one_form(b[key]).strip()
    if key == "boxes":
        if a["task"] != "VG" and not ("boxes" in a and "boxes" in b):
            return False  # a region that was asked about; BiRD's files do not say it
        return _corners(a) != _corners(b)
    if key == "group":
        return str(a.get(key) or a["id"]) != str(b.get(key) or b["id"])
    return str(a[key]) != str(b[key])


def _corners(row: Row) -> list[tuple[float, ...]]:
    return [tuple(map(float, box)) for box in true_boxes(row)]


def _task(
    task: str,
    first: Sequence[Row],
    second: Sequence[Row],
    rules: Protocol,
    meteor: str,
    spice: bool,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    measures = [measure(task, rows, rules, meteor, spice) for rows in (first, second)]
    modalities = np.array([str(row["modality"]) for row in first])
    groups = groups_of(first)
    whole = np.ones((1, len(first)))
    scores = [float(task_average(whole, m.statistics, modalities, rules)[0]) for m in measures]
    out: dict[str, Any] = {
        "metric": measures[0].name,
        "n": len(first),
        "groups": len(np.unique(groups)),
        "first": round(100 * scores[0], 2),
        "second": round(100 * scores[1], 2),
        "difference": round(100 * (scores[1] - scores[0]), 2),
    }
    if bootstrap and out["groups"] < 2:
        out["ci95"] = out["p"] = None
    elif bootstrap:
        differences = np.concatenate(
            [
                task_average(weights, measures[1].statistics, modalities, rules)
                - task_average(weights, measures[0].statistics, modalities, rules)
                for weights in resampled(groups, bootstrap, seed)
            ]
        )
        low, high = np.percentile(differences, [2.5, 97.5])
        rarer = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
        out["ci95"] = [round(100 * float(low), 2), round(100 * float(high), 2)]
        out["p"] = _p_value(rarer, bootstrap)
    each = [m.statistics.finish(m.statistics.rows) for m in measures]
    gap = each[1] - each[0]
    order = sorted(range(len(first)), key=lambda i: (-abs(gap[i]), str(first[i]["id"])))
    out["most_different"] = [
        _shown(first[i], second[i], float(gap[i])) for i in order[:SHOWN] if gap[i] != 0
    ]
    return out


def _p_value(rarer: float, draws: int) -> float:
    """Two-sided, from the share of draws on the rarer side; never below one in the draws."""
    digits = max(4, len(str(draws)))
    return max(round(min(1.0, 2 * rarer), digits), 1 / draws)


def _shown(first: Row, second: Row, gap: float) -> Mapping[str, Any]:
    return {
        "id": first["id"],
        "difference": round(100 * gap, 2),
        "annotation": first["annotation"],
        "first": first["response"],
        "second": second["response"],
    }
