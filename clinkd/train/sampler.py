"""Which records come when: a pure function of seed, epoch and lengths; and their numbers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from clinkd.data.collate import IGNORE_INDEX
from clinkd.train.teachers import PREFIX


class BucketSampler(Sampler[int]):
    """Shuffled records, those of similar length side by side, so that little is padding.

    Each epoch shuffles all records, sorts windows of `window` of them by length, cuts the windows
    into groups of `batch_size`, and shuffles the groups. Nothing but `seed`, the epoch, `lengths`
    and the sizes matters, so that an interrupted run finds its place again.

    Args:
        lengths: tokens of each record, or any number that grows with them.
        batch_size: records that will be used together.
        seed: of the whole run.
        processes: that share the batches. Of several each gets as many: the last ones are filled up
            with the place after the last record, see `Filled`; accelerate would take records of
            the beginning, which then count twice.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, processes: int = 1
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.processes = processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.lengths)
        if self.processes == 1:
            return count
        together = self.batch_size * self.processes
        return math.ceil(count / together) * together

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = 16 * self.batch_size
        groups: list[list[int]] = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda i: (self.lengths[i], i))
            groups += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        # a short group stays last: anywhere else it would shift the batches behind it
        last = [groups.pop()] if groups and len(groups[-1]) < self.batch_size else []
        for index in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[index]
        for group in last:
            yield from group
        for _ in range(len(self) - len(self.lengths)):
            yield len(self.lengths)


class Numbered(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Some records of a data set, each item with its place there, by which errors name it."""

    def __init__(self, dataset: Any, places: Sequence[int]) -> None:
        self.dataset = dataset
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.places[index]
        item: dict[str, Tensor] = self.dataset[place]
        return item | {"places": torch.tensor([place])}


class Filled(torch.utils.data.Dataset[Any]):
    """A data set and one item after its last: a copy without answers, of which nothing is learned.

    Args:
        copied: the place of the item that is copied.
    """

    def __init__(self, dataset: Any, copied: int) -> None:
        self.dataset = dataset
        self.copied = copied

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.dataset):
            return self.dataset[index]
        item = self.dataset[self.copied]
        return [_unanswered(item[0])] if isinstance(item, list) else _unanswered(item)


def _unanswered(item: dict[str, Tensor]) -> dict[str, Tensor]:
    told = {name: rows[:0] for name, rows in item.items() if name.startswith(PREFIX)}
    return item | {"labels": torch.full_like(item["labels"], IGNORE_INDEX)} | told
