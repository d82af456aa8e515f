"""Two models on the same records: paired intervals of the difference, and where they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clinkd.data.records import TASKS
from clinkd.errors import DataError
from clinkd.evaluate.protocols import Protocol, Row, measure
from clinkd.evaluate.score import resampled, task_average

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
    resamples on the rarer side of no difference, at least 1 / bootstrap.

    Raises:
        DataError: the two do not answer the same records.
    """
    a, b = ({str(row["id"]): row for row in rows} for rows in (first, second))
    if a.keys() != b.keys():
        only = sorted(a.keys() ^ b.keys())
        raise DataError(f"{len(only)} records are in one of the two only, as {', '.join(only[:3])}")
    out: dict[str, Any] = {}
    for task in TASKS:
        ids = [name for name in sorted(a) if a[name]["task"] == task]
        if any(b[name]["task"] != task for name in ids):
            raise DataError(f"the two do not agree on which records are {task}")
        if ids:
            pairs = [a[name] for name in ids], [b[name] for name in ids]
            out[task] = _task(task, *pairs, rules, meteor, spice, bootstrap, seed)
    return out


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
    groups = np.array([str(row.get("group") or row["id"]) for row in first])
    whole = np.ones((1, len(first)))
    scores = [float(task_average(whole, m.statistics, modalities, rules)[0]) for m in measures]
    out: dict[str, Any] = {
        "metric": measures[0].name,
        "n": len(first),
        "first": round(100 * scores[0], 2),
        "second": round(100 * scores[1], 2),
        "difference": round(100 * (scores[1] - scores[0]), 2),
    }
    if bootstrap:
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
        out["p"] = round(min(1.0, max(2 * rarer, 1 / bootstrap)), 4)
    each = [m.statistics.finish(m.statistics.rows) for m in measures]
    gap = each[1] - each[0]
    order = sorted(range(len(first)), key=lambda i: (-abs(gap[i]), str(first[i]["id"])))
    out["most_different"] = [
        _shown(first[i], second[i], float(gap[i])) for i in order[:SHOWN] if gap[i] != 0
    ]
    return out


def _shown(first: Row, second: Row, gap: float) -> Mapping[str, Any]:
    return {
        "id": first["id"],
        "difference": round(100 * gap, 2),
        "annotation": first["annotation"],
        "first": first["response"],
        "second": second["response"],
    }
