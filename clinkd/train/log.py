"""The training log: one JSON object a line, appended while a stage runs."""

import json
import os
from pathlib import Path
from typing import Any

from clinkd.data.files import write_jsonl


class MetricsLog:
    """metrics.jsonl of a run; every row names its stage and step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; NaN and infinities become null, since JSON has none."""
        clean = {
            key: None if isinstance(value, float) and not abs(value) < float("inf") else value
            for key, value in row.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean, ensure_ascii=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; the last may be cut short where a process was killed."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def forget(self, stage: str, after_step: int = -1) -> None:
        """Drop the rows of a stage past a step: that work is about to be done again."""
        kept = [r for r in self.rows() if r.get("stage") != stage or r["step"] <= after_step]
        if self.path.exists():
            write_jsonl(self.path, kept)
