"""Drawing a share of the records: seeded, stratified by task and modality, blind to file order."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from clinkd.data.clusters import clusters_of
from clinkd.data.records import Record
from clinkd.errors import ConfigError

Stratum = tuple[str, str]  # task, modality


def teacher_subset(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """The teacher's share of the training split, at least one record.

    Each task of each modality gives its part, in whole records, the left-over ones where the part
    lost most by rounding down. Which records those are depends on the seed and their ids alone.

    Args:
        records: of the training split only.
        fraction: 0 < fraction <= 1; the paper takes 0.111.
        seed: of the run.

    Returns:
        round(fraction * len(records)) records, in the order of `records`.

    Raises:
        ConfigError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction must be over 0 and at most 1, got {fraction}")
    # exact: 0.145 * 100 is 14.4999… in floating point, yet it means 14.5
    count = int(Fraction(repr(float(fraction))) * len(records) + Fraction(1, 2))
    return draw(records, max(count, 1), seed)


def limit_records(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    """At most `limit` records, drawn as `teacher_subset` does; None keeps all."""
    return list(records) if limit is None else draw(records, limit, seed)


def held_out_places(
    records: Sequence[Record], share: float, seed: int, root: str | os.PathLike[str] | None = None
) -> list[int]:
    """Places of the records of a share of the groups (volumes, patients), at least one group.

    A group is never in both parts, nor are groups that share an image. 0 gives none.

    Args:
        root: where the images lie, to know one under two names; None: by names alone.

    Raises:
        ConfigError: one group only, so that nothing would be left to learn from.
    """
    if share == 0:
        return []
    groups = clusters_of(records, root)
    if len(groups) < 2:
        raise ConfigError(f"held_out needs records of at least two groups, got {len(groups)}")
    groups.sort(key=lambda places: seeded_key(seed, min(records[i].group for i in places)))
    return sorted(i for places in groups[: max(1, round(share * len(groups)))] for i in places)


def draw(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """`count` records (all, if there are fewer), stratified; in the order of `records`."""
    if count >= len(records):
        return list(records)
    strata: dict[Stratum, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        strata[record.task, record.modality].append(index)
    sizes = {stratum: len(members) for stratum, members in strata.items()}
    chosen: list[int] = []
    for stratum, quota in apportion(sizes, count).items():
        order = sorted(strata[stratum], key=lambda i: seeded_key(seed, records[i].id))
        chosen += order[:quota]
    return [records[index] for index in sorted(chosen)]


def apportion(sizes: dict[Stratum, int], count: int) -> dict[Stratum, int]:
    """Share `count` among strata in proportion to their sizes, by largest remainder.

    Whole-number arithmetic; equal remainders go to the larger stratum, then by name.
    """
    total = sum(sizes.values())
    quotas = {name: size * count // total for name, size in sizes.items()}
    rest = count - sum(quotas.values())
    order = sorted(sizes, key=lambda name: (-(sizes[name] * count % total), -sizes[name], name))
    for name in order[:rest]:
        quotas[name] += 1
    return quotas


def seeded_key(seed: int, name: str) -> bytes:
    """A pseudo-random sort key of a name: the same on every machine and in every order."""
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
