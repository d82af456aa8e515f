"""Splitting records so that no patient, volume or image stands on both sides."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from clinkd.data.clusters import clusters_of, image_file, image_files
from clinkd.data.records import Record
from clinkd.data.select import Stratum, seeded_key
from clinkd.errors import ConfigError, DataError


def split(
    records: Sequence[Record],
    fractions: Mapping[str, float],
    seed: int,
    root: str | os.PathLike[str] | None = None,
) -> dict[str, list[Record]]:
    """Split into named parts and `train`, the rest.

    Records that share a group or an image file go together. Groups come in an order drawn by the
    seed, and each joins a part while that brings the part's count of every task and modality
    nearer to its fraction.

    Args:
        records: of the whole data set.
        fractions: of each part but `train`, e.g. {"test": 0.1, "valid": 0.05}.
        seed: of the draw; the order of `records` has no influence.
        root: the data root, where links tell that two images are one file; None goes by names.

    Returns:
        Each part's records, in the order of `records`; `train` last.

    Raises:
        ConfigError: fractions that are not over 0, or leave nothing for `train`.
        DataError: fewer groups than parts.
    """
    if any(not 0 < f < 1 for f in fractions.values()) or sum(fractions.values()) >= 1:
        raise ConfigError(f"fractions must be over 0 and their sum under 1, got {dict(fractions)}")
    if "train" in fractions:
        raise ConfigError("'train' is what the other parts leave; give their fractions only")
    clusters = clusters_of(records, root)
    if len(clusters) <= len(fractions):
        raise DataError(
            f"the records form only {len(clusters)} groups that share no patient, volume or "
            f"image: too few for {len(fractions) + 1} parts"
        )
    left = sorted(clusters, key=lambda cluster: seeded_key(seed, _name(records, cluster)))
    all_counts = Counter(_stratum(record) for record in records)
    part_of: dict[int, str] = {}
    for position, (part, fraction) in enumerate(fractions.items()):
        keep = len(fractions) - position  # clusters that the parts still to come need
        taken = _choose(records, left, all_counts, fraction, len(left) - keep)
        left = [cluster for index, cluster in enumerate(left) if index not in taken[0]]
        part_of |= dict.fromkeys(taken[1], part)
    parts: dict[str, list[Record]] = {part: [] for part in (*fractions, "train")}
    for index, record in enumerate(records):
        parts[part_of.get(index, "train")].append(record)
    return parts


def _choose(
    records: Sequence[Record],
    clusters: Sequence[Sequence[int]],
    all_counts: Counter[Stratum],
    fraction: float,
    most: int,
) -> tuple[set[int], list[int]]:
    """Positions of the clusters of one part, and the indices of their records."""
    missing = {stratum: fraction * count for stratum, count in all_counts.items()}
    gains: list[float] = []
    chosen: set[int] = set()
    for position, cluster in enumerate(clusters):
        counts = Counter(_stratum(records[index]) for index in cluster)
        # by how much the squared distance from the wanted counts, each relative to its size, falls
        gain = sum(c * (2 * missing[s] - c) / all_counts[s] for s, c in counts.items())
        gains.append(gain)
        if gain > 0 and len(chosen) < most:
            chosen.add(position)
            for stratum, count in counts.items():
                missing[stratum] -= count
    if not chosen:  # every cluster is larger than the part: the one that does least harm
        chosen.add(max(range(len(clusters)), key=lambda position: (gains[position], -position)))
    return chosen, [index for position in chosen for index in clusters[position]]


def _stratum(record: Record) -> Stratum:
    return record.task, record.modality


def _name(records: Sequence[Record], cluster: Sequence[int]) -> str:
    return min(records[index].id for index in cluster)


def leaks(
    train: Sequence[Record],
    test: Sequence[Record],
    root: str | os.PathLike[str] | None = None,
) -> list[tuple[Record, str]]:
    """The test records that share an id, a group or an image file with the training split.

    Args:
        train, test: the splits.
        root: the data root, to find files that links give a second name; None goes by names.
    """
    ids = {record.id for record in train}
    groups = {record.group for record in train}
    names = {file: name for name, file in image_files(train, root).items()}
    files = image_files(test, root)
    found: list[tuple[Record, str]] = []
    for record in test:
        shared = next((name for name in record.images if files[name] in names), None)
        if record.id in ids:
            found.append((record, f"its id {record.id!r} stands in the training split too"))
        elif record.group in groups:
            found.append((record, f"its group {record.group!r} stands in the training split too"))
        elif shared is not None:
            found.append((record, _shared_image(shared, names[files[shared]])))
    return found


def _shared_image(name: str, other: str) -> str:
    """What to say of an image that has the file of the training split's image `other`."""
    if image_file(name) == image_file(other):
        return f"its image {name!r} stands in the training split too"
    return f"its image {name!r} is the training split's {other!r} under another name"
