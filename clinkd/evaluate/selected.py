"""What choosing among candidates could give at most, and the names of what was chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

from clinkd.data.records import TASKS
from clinkd.evaluate.protocols import Protocol, measure

Row = dict[str, Any]

# how the last model's answers were chosen, as a label says it; none of `clip`, which is the paper's
_CHOSEN = {
    "beam": "first beam",
    "mixed": "CLIP mixed with beam scores",
    "consensus": "consensus of the candidates",
    "oracle": "oracle (looks at the truth)",
}


def labels(rounds: int = 1, selection: str = "clip") -> dict[str, str]:
    """Names of a run's models in metrics.json.

    Args:
        rounds: `correct.rounds`; with none the last model is the distilled one.
        selection: `generate.selection`.
    """
    last = "Corrected student" if rounds else "Distilled student"
    chosen = _CHOSEN.get(selection)
    return {
        "base": "Base (before training)",
        "teacher": "Teacher",
        "distilled": "Distilled student",
        "corrected": last if rounds else f"{last}, no correction",
        "sasg": f"{last} + SASG" if chosen is None else f"{last}, {chosen}",
    }


def part_label(selection: str) -> str:
    """Name of an ablation's part that chooses among candidates."""
    return _CHOSEN.get(selection, "SASG")


def with_candidate(row: Mapping[str, Any], index: int) -> Row:
    """The row as if candidate `index` were the answer."""
    candidates = row["candidates"]
    text = candidates[index]["text"] if candidates else ""
    return {**row, "response": text, "selected": index}


def best_rows(rows: Sequence[Row], rules: Protocol, *, meteor: str, spice: bool) -> list[Row]:
    """The rows, each with the candidate that the protocol itself values most; its score is a bound.

    Among equals that one which is closest to the truth by boxes or words, then the first. BLEU is
    of a whole corpus: for MIA what is best one by one need not be best together.
    """
    best: dict[str, int] = {}
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        places = [(n, k) for n, row in enumerate(mine) for k in _different(row)]
        if places:
            tried = [with_candidate(mine[n], k) for n, k in places]
            found = measure(task, tried, rules, meteor, spice).statistics
            values = found.finish(found.rows)
            best |= _best_of(mine, places, [float(value) for value in values])
    return [with_candidate(row, best.get(row["id"], 0)) for row in rows]


def _different(row: Row) -> list[int]:
    """Places of the candidates, texts that come again left out; none where there is no choice."""
    first: dict[str, int] = {}
    for index, candidate in enumerate(row["candidates"]):
        first.setdefault(candidate["text"], index)
    return list(first.values()) if len(first) > 1 else []


def _best_of(
    rows: Sequence[Row], places: Sequence[tuple[int, int]], values: Sequence[float]
) -> dict[str, int]:
    """Id → the candidate of most value, by (row, candidate) and the value of each."""
    from clinkd.generate.select import truth_quality  # here: it imports torch

    by_row: dict[int, list[tuple[float, int]]] = {}
    for (n, index), value in zip(places, values, strict=True):
        by_row.setdefault(n, []).append((value, index))
    best: dict[str, int] = {}
    for n, found in by_row.items():
        row, most = rows[n], max(value for value, _ in found)
        equal = [index for value, index in found if value == most]
        if len(equal) > 1:
            quality = truth_quality(row["task"], row["annotation"])
            equal.sort(key=lambda index: -quality(row["candidates"][index]["text"]))
        best[row["id"]] = equal[0]
    return best
