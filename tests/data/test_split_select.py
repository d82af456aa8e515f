"""Drawing and splitting: exact counts, every stratum in its share, no patient on both sides."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.records import TASKS, Record, Turn
from clinkd.data.select import apportion, limit_records, teacher_subset
from clinkd.data.split import leaks, split
from clinkd.errors import ConfigError, DataError

settings.register_profile("clinkd-data", deadline=None)
settings.load_profile("clinkd-data")
TALK = (Turn("human", "q"), Turn("gpt", "a"))


def record(n, *, task="VG", modality="ct", group=None, image=None):
    return Record(f"r{n}", (image or f"{n}.png",), modality, task, group or f"g{n}", TALK)


MANY = [
    record(n, task=TASKS[n % 4], modality=("ct", "mr", "x")[n % 7 % 3], group=f"p{n // 5}")
    for n in range(1000)
]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [
        (1000, 0.111, 111),
        (100, 0.145, 15),
        (9, 0.111, 1),
        (3, 0.111, 1),
        (10, 1.0, 10),
        (5, 0.5, 3),
    ],
)
def test_whole_numbers_are_right(count, fraction, expected):
    assert len(teacher_subset(MANY[:count], fraction, 0)) == expected


def test_each_stratum_gives_its_share():
    drawn = teacher_subset(MANY, 0.111, 3)
    every = Counter((r.task, r.modality) for r in MANY)
    got = Counter((r.task, r.modality) for r in drawn)
    for stratum, count in every.items():
        assert abs(got[stratum] - 0.111 * count) < 1


def test_the_draw_is_blind_to_file_order_and_follows_the_seed():
    shuffled = random.Random(5).sample(MANY, len(MANY))
    drawn = teacher_subset(MANY, 0.111, 3)
    assert {r.id for r in teacher_subset(shuffled, 0.111, 3)} == {r.id for r in drawn}
    assert {r.id for r in teacher_subset(MANY, 0.111, 4)} != {r.id for r in drawn}
    assert [MANY.index(r) for r in drawn] == sorted(MANY.index(r) for r in drawn)


def test_known_draw():
    """Written down, so that a change of the draw cannot pass unseen."""
    drawn = [r.id for r in teacher_subset([record(n) for n in range(50)], 0.1, 0)]
    assert drawn == ["r10", "r21", "r27", "r46", "r47"]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_wrong_fractions(fraction):
    with pytest.raises(ConfigError, match="fraction must be over 0 and at most 1"):
        teacher_subset(MANY, fraction, 0)


@given(
    sizes=st.dictionaries(
        st.tuples(st.sampled_from(TASKS), st.text(max_size=2)), st.integers(1, 50), min_size=1
    ),
    data=st.data(),
)
def test_apportion_is_exact_and_within_one(sizes, data):
    total = sum(sizes.values())
    count = data.draw(st.integers(0, total))
    quotas = apportion(sizes, count)
    assert sum(quotas.values()) == count
    for name, size in sizes.items():
        assert abs(quotas[name] - size * count / total) < 1
        assert quotas[name] <= size
    assert apportion(dict(reversed(sizes.items())), count) == quotas


def test_limit():
    assert limit_records(MANY, None, 0) == MANY
    assert limit_records(MANY, 5000, 0) == MANY
    assert len(limit_records(MANY, 17, 0)) == 17


def test_split_shares_and_keeps_groups_together():
    parts = split(MANY, {"test": 0.1, "valid": 0.05}, 1)
    assert list(parts) == ["test", "valid", "train"]
    assert sorted(r.id for part in parts.values() for r in part) == sorted(r.id for r in MANY)
    for one, other in (("test", "train"), ("valid", "train"), ("test", "valid")):
        assert leaks(parts[one], parts[other]) == []
    every = Counter((r.task, r.modality) for r in MANY)
    for part, share in (("test", 0.1), ("valid", 0.05)):
        got = Counter((r.task, r.modality) for r in parts[part])
        for stratum, count in every.items():
            assert abs(got[stratum] - share * count) <= 5  # the size of a group


def test_split_is_blind_to_file_order():
    shuffled = random.Random(5).sample(MANY, len(MANY))
    one, other = split(MANY, {"test": 0.2}, 1), split(shuffled, {"test": 0.2}, 1)
    assert {r.id for r in one["test"]} == {r.id for r in other["test"]}
    assert {r.id for r in split(MANY, {"test": 0.2}, 2)["test"]} != {r.id for r in one["test"]}


def test_records_of_one_image_stay_together_whatever_their_group():
    names = [f"v{n // 2}.nii.gz#axis=2,index={n}" for n in range(40)]
    records = [record(n, image=name) for n, name in enumerate(names)]
    parts = split(records, {"test": 0.25}, 0)
    assert len(parts["test"]) == 10
    assert leaks(parts["train"], parts["test"]) == []
    for part in parts.values():
        assert all(
            count == 2 for count in Counter(r.images[0].split("#")[0] for r in part).values()
        )


def test_a_part_is_never_empty():
    records = [record(n, group=f"p{n // 50}") for n in range(100)]
    parts = split(records, {"test": 0.01}, 0)
    assert [len(part) for part in parts.values()] == [50, 50]


def test_wrong_splits():
    with pytest.raises(DataError, match="form only 1 groups that share no patient"):
        split([record(n, group="p") for n in range(9)], {"test": 0.5}, 0)
    for fractions in ({"test": 0.6, "valid": 0.4}, {"test": 0.0}, {"test": 1.0}):
        with pytest.raises(ConfigError, match="fractions must be over 0"):
            split(MANY, fractions, 0)
    with pytest.raises(ConfigError, match="'train' is what the other parts leave"):
        split(MANY, {"train": 0.5}, 0)


def test_leaks_are_named():
    train = [record(1, group="p", image="v.nii#axis=2,index=1")]
    test = [
        record(1),
        record(2, group="p"),
        record(3, image="./v.nii#axis=0,index=9"),
        record(4),
    ]
    assert [(r.id, m.split(" stands")[0]) for r, m in leaks(train, test)] == [
        ("r1", "its id 'r1'"),
        ("r2", "its group 'p'"),
        ("r3", "its image './v.nii#axis=0,index=9'"),
    ]
