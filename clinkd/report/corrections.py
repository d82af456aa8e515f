"""What reflective correction changed, counted and shown by example."""

from collections import Counter
from collections.abc import Sequence

from clinkd.report.charts import stacked
from clinkd.report.gallery import Pictures, image_names, in_turn
from clinkd.report.read import Row
from clinkd.report.scores import number
from clinkd.report.text import MOST_CHARACTERS, changes, cut, label, pieces

STATUSES = {
    "accepted": "corrected text passed its checks",
    "truth": "correction rejected, the true answer is learnt",
    "kept": "correction rejected, the record stays as the round before left it",
    "skipped": "correction rejected, the record is left out",
}
EXAMPLES_PER_ROUND = 8


def examples(rows: Sequence[Row], most: int = EXAMPLES_PER_ROUND) -> list[Row]:
    """Lines to show: statuses in turn, and their tasks in turn, in the file's order."""
    order = [*STATUSES]

    def status(row: Row) -> tuple[int, str]:
        name = str(row.get("status"))
        return (order.index(name) if name in order else len(order), name)

    return in_turn(rows, outer=status, inner=lambda row: str(row.get("task")), most=most)


def rounds(corrections: dict[int, list[Row]], pictures: Pictures) -> list[Row]:
    """What the template draws, one entry a round."""
    out = []
    for number_, rows in corrections.items():
        counts = Counter(str(row.get("status")) for row in rows)
        known = [(status, counts.pop(status)) for status in STATUSES if counts[status]]
        known += sorted((status, n) for status, n in counts.items() if n)
        out.append(
            {
                "number": number_,
                "total": len(rows),
                "counts": [(status, n, STATUSES.get(status, "")) for status, n in known],
                "bar": stacked(
                    [(status if status in STATUSES else "other", n) for status, n in known]
                ),
                "examples": [_example(row, pictures) for row in examples(rows)],
            }
        )
    return out


def _example(row: Row, pictures: Pictures) -> Row:
    before, after = str(row.get("before") or ""), str(row.get("after") or "")
    names = image_names(row)
    return {
        "id": label(row.get("id")),
        "task": label(row.get("task")),
        "status": label(row.get("status"), "unknown"),
        "question": pieces(str(row.get("question") or "")),
        "before": pieces(before),
        "after": changes(before, after) if after else [],
        "truth": pieces(str(row.get("truth") or "")),
        "similarity": number(row.get("similarity")),
        "iou": number(row.get("iou")),
        "reason": "".join(cut(str(row.get("reason") or ""), MOST_CHARACTERS)),
        "why": "".join(cut(str(row.get("why") or ""), MOST_CHARACTERS)),
        "image": pictures.get(names[0]) | {"name": names[0]} if names else None,
    }
