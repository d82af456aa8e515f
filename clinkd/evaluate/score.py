"""Scores of one model's predictions: per task and modality, with intervals."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinkd.data.records import TASKS
from clinkd.evaluate.extras import calibration, confidence, grounding_extras, laterality_extras
from clinkd.evaluate.protocols import EIGHT, Protocol, Row, countable, measure, uncounted
from clinkd.evaluate.text.ngram import Array, Statistics

RIGHT_OR_WRONG = ("VG", "ROC")  # tasks of which an answer is right or wrong, not better or worse
CHUNK = 4_000_000  # numbers of bootstrap weights held at a time


def score_model(
    rows: Sequence[Row],
    rules: Protocol,
    *,
    label: str,
    meteor: str,
    spice: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every task's score in percent, with its modalities and a 95 % interval.

    Intervals come from resampling groups (volumes, patients), whose records are not independent;
    of a single group `ci95` is None. `notes`, if there are any, say which records enter no score.
    """
    rows = sorted(rows, key=lambda row: str(row["id"]))  # numbers do not depend on line order
    by_task = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    counted = {task: countable(task, mine, rules) for task, mine in by_task.items()}
    tasks = {
        task: _score_task(task, mine, rules, meteor, spice, bootstrap, seed)
        for task, mine in counted.items()
        if mine
    }
    scores = [task["score"] for task in tasks.values()]
    out = {
        "label": label,
        "tasks": tasks,
        "average": _percent(float(np.mean(scores)) / 100) if scores else 0.0,
    }
    if notes := uncounted(rows, counted, rules):
        out["notes"] = notes
    return out


def _score_task(
    task: str,
    rows: Sequence[Row],
    rules: Protocol,
    meteor: str,
    spice: bool,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    found = measure(task, rows, rules, meteor, spice)
    modalities = np.array([str(row["modality"]) for row in rows])
    whole = np.ones((1, len(rows)))
    out: dict[str, Any] = {
        "metric": found.name,
        "score": _percent(float(task_average(whole, found.statistics, modalities, rules)[0])),
        "n": len(rows),
        "modalities": {
            str(name): {
                "score": _percent(_part(found.statistics, modalities == name)),
                "n": int((modalities == name).sum()),
            }
            for name in np.unique(modalities)
        },
    }
    groups = groups_of(rows)
    out["groups"] = len(np.unique(groups))
    if bootstrap:  # of one group every resample is the same, and the width would be 0
        out["ci95"] = (
            _interval(found.statistics, modalities, groups, rules, bootstrap, seed)
            if out["groups"] > 1
            else None
        )
    extras = grounding_extras(rows) if task == "VG" else {}
    extras |= laterality_extras(rows)
    if task in RIGHT_OR_WRONG:
        sure = _calibration(rows, found.statistics)
        if sure["n"]:
            out["calibration"] = sure
            extras["ece"] = sure["ece"]
    if extras:
        out["extras"] = {name: round(v, 2) for name, v in extras.items()}
    return out


def groups_of(rows: Sequence[Row]) -> NDArray[Any]:
    """The group of each row, a volume or patient; a row that names none is one of its own."""
    return np.array([str(row.get("group") or row["id"]) for row in rows])


def _calibration(rows: Sequence[Row], statistics: Statistics) -> dict[str, Any]:
    """Of the answers that say how sure they are; right is what scores 1 by the protocol."""
    values = statistics.finish(statistics.rows)
    pairs = [
        (sure, bool(value >= 1))
        for row, value in zip(rows, values, strict=True)
        if (sure := confidence(row)) is not None
    ]
    return calibration([sure for sure, _ in pairs], [right for _, right in pairs])


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _part(statistics: Statistics, mask: NDArray[np.bool_]) -> float:
    return float(statistics.finish(statistics.rows[mask].sum(axis=0)))


def task_average(
    weights: Array, statistics: Statistics, modalities: NDArray[Any], rules: Protocol
) -> Array:
    """A task's score under weights [B, N] of its records, by the protocol's mean."""
    if rules.average == "records":
        return statistics.finish(weights @ statistics.rows)
    names = EIGHT if rules.average == "eight" else tuple(np.unique(modalities))
    total = np.zeros(len(weights))
    present = np.zeros(len(weights))
    for name in names:
        mask = modalities == name
        if not mask.any():
            continue
        part = weights[:, mask]
        seen = part.sum(axis=1) > 0
        values = statistics.finish(part @ statistics.rows[mask])
        total += np.where(seen, values, 0.0)
        present += seen
    if rules.average == "eight":
        return total / len(EIGHT)
    return total / np.maximum(present, 1)


def _interval(
    statistics: Statistics,
    modalities: NDArray[Any],
    groups: NDArray[Any],
    rules: Protocol,
    bootstrap: int,
    seed: int,
) -> list[float]:
    """2.5 and 97.5 percent of the score over resampled groups."""
    values = [
        task_average(weights, statistics, modalities, rules)
        for weights in resampled(groups, bootstrap, seed)
    ]
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return [_percent(float(low)), _percent(float(high))]


def resampled(groups: NDArray[Any], bootstrap: int, seed: int) -> Iterator[Array]:
    """Weights [B, N] of the records in `bootstrap` draws of groups with replacement, in parts."""
    names, index = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng(seed)
    size = max(1, min(bootstrap, CHUNK // len(groups)))
    for start in range(0, bootstrap, size):
        count = min(size, bootstrap - start)
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        yield drawn[:, index].astype(np.float64)
