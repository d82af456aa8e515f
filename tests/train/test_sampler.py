"""The order of records is a pure function of seed and epoch."""

from hypothesis import given
from hypothesis import strategies as st

from clinkd.train.sampler import BucketSampler


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
