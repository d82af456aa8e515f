"""Records that belong together: of one patient or volume, or about one image."""

import posixpath
from collections import defaultdict
from collections.abc import Sequence

from clinkd.data.images import split_name
from clinkd.data.records import Record


def image_file(name: str) -> str:
    """The file behind an image's name: all slices of one volume are one file."""
    return posixpath.normpath(split_name(name)[0])


def clusters_of(records: Sequence[Record]) -> list[list[int]]:
    """Indices of records connected through groups and image files (union-find)."""
    parent = list(range(len(records)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, record in enumerate(records):
        keys = [("group", record.group), *(("image", image_file(name)) for name in record.images)]
        for key in keys:
            parent[root(index)] = root(first.setdefault(key, index))
    clusters: dict[int, list[int]] = defaultdict(list)
    for index in range(len(records)):
        clusters[root(index)].append(index)
    return list(clusters.values())
