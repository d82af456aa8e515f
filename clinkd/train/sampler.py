"""Which records come when: a pure function of seed, epoch and lengths; and their numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class BucketSampler(Sampler[int]):
    """Shuffled records, those of similar length side by side, so that little is padding.

    Each epoch shuffles all records, sorts windows of `window` of them by length, cuts the windows
    into groups of `batch_size`, and shuffles the groups. Nothing but `seed`, the epoch, `lengths`
    and the sizes matters, so that an interrupted run finds its place again.

    Args:
        lengths: tokens of each record, or any number that grows with them.
        batch_size: records that will be used together.
        seed: of the whole run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

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
