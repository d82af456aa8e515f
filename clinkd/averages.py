"""Whether a model's average may stand beside those of others."""

from collections.abc import Iterable, Mapping
from typing import Any


def comparable_average(model: Mapping[str, Any], tasks: Iterable[str]) -> Any:
    """A model's average; None where it is over fewer than the tasks that some model has.

    Args:
        model: of metrics.json, its `average` and `tasks`.
        tasks: all those that the models beside it have.
    """
    return model.get("average") if set(tasks) <= (model.get("tasks") or {}).keys() else None
