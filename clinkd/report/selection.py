"""What choosing among the candidates gained over the first beam, and what it left."""

from collections import defaultdict
from collections.abc import Container, Sequence

from clinkd.data.records import TASKS
from clinkd.report import charts
from clinkd.report.judge import RIGHT_IOU, as_boxes, judge
from clinkd.report.read import Row, candidates_of
from clinkd.report.scores import models, number, object_

_SELECTION_KEYS = ("first_beam", "chosen", "oracle")


def selection(predictions: Sequence[Row], metrics: Row) -> list[Row]:
    """Per task: the first beam, the chosen answer and the best candidate, on one scale 0…100.

    In the table's own metrics where `metrics` holds them; else counted here, with VG by IoU ≥ 0.5
    and the other tasks by mean token F1.
    """
    told = _told(metrics)
    rows = []
    for task, counted in _counted_selection(predictions, told.keys()).items():
        first, chosen, oracle = counted["scores"]
        measure, own, n = "Recall@0.5" if task == "VG" else "token F1", False, counted["n"]
        if task in told:
            first, chosen, oracle = told[task]
            scored = _scored(metrics, task)
            # a question that failed has a score in the metrics, and no candidates to count
            measure, own, n = scored.get("metric", "score"), True, scored.get("n") or n
        bars = (("first", first), ("final", chosen), ("oracle", oracle))
        rows.append(
            {
                "task": task,
                "measure": measure,
                "own": own,
                "n": n,
                "first": first,
                "chosen": chosen,
                "oracle": oracle,
                "gain": chosen - first,
                "gap": oracle - chosen,
                "changed": counted["changed"],
                "bars": [charts.bar(value, kind) for kind, value in bars],
            }
        )
    return rows


def _told(metrics: Row) -> dict[str, list[float]]:
    """By task: the three scores, of tasks for which the metrics hold all of them."""
    found = {}
    for task, scores in object_(metrics.get("selection")).items():
        told = [number(object_(scores).get(key)) for key in _SELECTION_KEYS]
        known = [score for score in told if score is not None]
        if len(known) == len(told):
            found[str(task)] = known
    return found


def _scored(metrics: Row, task: str) -> Row:
    known = models(metrics.get("models")).values()
    return next((m["tasks"][task] for m in known if task in m["tasks"]), {})


def _counted_selection(predictions: Sequence[Row], told: Container[str]) -> dict[str, Row]:
    """By task: number of answered questions, % not the first beam, the three scores.

    Args:
        told: tasks whose scores are known, so that none is counted.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    for row in predictions:
        candidates, chosen = candidates_of(row), row.get("selected")
        if row.get("error") or type(chosen) is not int or not 0 <= chosen < len(candidates):
            continue
        task = str(row.get("task"))
        values = [0.0] * len(candidates) if task in told else _values(row, candidates)
        first = first_beam(candidates)
        added = (1.0, float(first != chosen), values[first], values[chosen], max(values))
        sums[task] = [a + b for a, b in zip(sums[task], added, strict=True)]
    out = {}
    for task in (t for t in TASKS if t in sums):
        n, changed, *totals = sums[task]
        scores = [100 * total / n for total in totals]
        out[task] = {"n": n, "changed": 100 * changed / n, "scores": scores}
    return out


def _values(row: Row, candidates: Sequence[Row]) -> list[float]:
    task, boxes = str(row.get("task")), as_boxes(row.get("boxes"))
    truth = str(row.get("annotation") or "")
    values = [judge(task, str(c.get("text") or ""), truth, boxes).value for c in candidates]
    return [float(v >= RIGHT_IOU) for v in values] if task == "VG" else values


def first_beam(candidates: Sequence[Row]) -> int:
    """Index of the candidate with the best beam score; the first where scores are missing."""
    scores = [number(candidate.get("score")) for candidate in candidates]
    known = [(score, -index) for index, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else 0
