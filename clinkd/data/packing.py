"""Records end to end in rows of limited length, so that nothing of a batch is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WINDOW = 1024  # records among which those that fill a row are looked for


def pack_rows(lengths: Sequence[int], limit: int, seed: int) -> list[list[int]]:
    """Share records among rows of at most `limit` tokens, each record whole and in one row.

    Best fit, the longest first, within windows of the records shuffled by `seed`. Nothing else
    matters, so that an interrupted run finds its rows again.

    Args:
        lengths: tokens of each record.

    Raises:
        ValueError: a record is longer than a row.
    """
    if max(lengths, default=0) > limit:
        raise ValueError(f"lengths must be at most limit = {limit}, got {max(lengths)}")
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        free: list[tuple[int, int]] = []  # tokens left in a row of this window, and its place
        for index in sorted(order[start : start + WINDOW], key=lambda i: (-lengths[i], i)):
            place = bisect_left(free, (lengths[index], -1))
            left, row = free.pop(place) if place < len(free) else (limit, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(index)
            insort(free, (left - lengths[index], row))
    return rows


class PackedRows(torch.utils.data.Dataset[list[dict[str, Tensor]]]):
    """Each item is the list of the encoded records of one row."""

    def __init__(self, dataset: Any, rows: Sequence[Sequence[int]]) -> None:
        self.dataset = dataset
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Tensor]]:
        return [self.dataset[place] for place in self.rows[index]]
