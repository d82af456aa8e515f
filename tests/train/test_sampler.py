"""The order of records is a pure function of seed and epoch."""

import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from clinkd.data.collate import IGNORE_INDEX
from clinkd.train.sampler import BucketSampler, Filled


@given(
    lengths=st.lists(st.integers(1, 2000), max_size=300),
    batch=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_every_record_once_and_the_same_again(lengths, batch, seed, epoch):
    def order():
        sampler = BucketSampler(lengths, batch, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order()) == list(range(len(lengths)))
    assert order() == order()


def test_epochs_and_seeds_differ():
    lengths = list(range(100))
    orders = []
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = BucketSampler(lengths, 4, seed)
            sampler.set_epoch(epoch)
            orders.append(tuple(sampler))
    assert len(set(orders)) == 4


def test_batches_hold_similar_lengths():
    lengths = [(7 * i) % 640 for i in range(640)]
    sampler = BucketSampler(lengths, 8, 0)
    order = list(sampler)
    spread = [
        max(lengths[i] for i in order[k : k + 8]) - min(lengths[i] for i in order[k : k + 8])
        for k in range(0, 640, 8)
    ]
    assert sum(spread) / len(spread) < 640 / 8  # unsorted batches of 8 spread over about 500


@given(
    count=st.integers(1, 200),
    batch=st.integers(1, 9),
    processes=st.integers(2, 7),  # accelerate shares nothing for one
    epoch=st.integers(0, 3),
)
def test_processes_see_every_record_once(count, batch, processes, epoch):
    """As accelerate shares them: filled up with what is no record, in the last batches."""
    sampler = BucketSampler([(7 * i) % 31 for i in range(count)], batch, 0, processes)
    sampler.set_epoch(epoch)
    shares = [
        list(BatchSamplerShard(BatchSampler(sampler, batch, False), processes, rank))
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = [place for share in shares for group in share for place in group]
    assert sorted(place for place in seen if place < count) == list(range(count))
    alone = BucketSampler(sampler.lengths, batch, 0)
    alone.set_epoch(epoch)
    assert list(sampler)[:count] == list(alone)
    assert set(list(sampler)[count:]) <= {count}


def test_what_fills_up_has_no_answer():
    one = {"input_ids": torch.arange(4), "labels": torch.tensor([IGNORE_INDEX, 1, 2, 3])}
    two = one | {"teacher_lse": torch.ones(3), "places": torch.tensor([1])}
    for dataset in ([one, two], [[one, two], [two, one]]):
        filled = Filled(dataset, 1)
        assert len(filled) == 2
        assert filled[0] is dataset[0]
        found = filled[2]
        found = found[0] if isinstance(found, list) else found
        assert (found["labels"] == IGNORE_INDEX).all()
        assert len(found["teacher_lse"]) == 0
        assert found["places"] == 1
        assert torch.equal(found["input_ids"], one["input_ids"])
    assert (one["labels"] != IGNORE_INDEX).sum() == 3
