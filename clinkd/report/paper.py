"""The paper's tables beside the run's figures: models by task, and the ablation it belongs to."""

import json
from pathlib import Path
from typing import Any

from clinkd.evaluate.tables import Table, ablation_table, models_by_task
from clinkd.report.read import Row


def paper_tables(run_dir: Path, found: Row | None) -> list[Table]:
    """Table 1 with the published rows, and Table 2 where the run is a cell of `clinkd ablate`.

    Args:
        found: what `clinkd.report.scores.results` made of metrics.json.
    """
    tables = []
    if found:
        everyone = found["models"] | found["baselines"]
        tables.append(models_by_task(everyone, published=True))
    ablation = _ablation(run_dir.resolve().parent.parent / "ablation.json")
    return tables if ablation is None else [*tables, ablation]


def _ablation(path: Path) -> Table | None:
    """ablation.json two folders up, where `clinkd ablate` writes it; None where it is not one."""
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
        return ablation_table(result, published=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None
