"""Records that belong together: of one patient or volume, or about one image."""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Sequence

from clinkd.data.images import resolve_image, split_name
from clinkd.data.records import Record
from clinkd.errors import DataError


def image_file(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """The file behind an image's name: all slices of one volume are one file.

    Args:
        name: as a record gives it.
        root: the data root, to follow links there.

    Returns:
        The real path; the name without its slice where the root is None or has no such file.
    """
    if root is not None:
        try:
            return resolve_image(root, name)
        except DataError:  # named by whoever checks the images
            pass
    return posixpath.normpath(split_name(name)[0])


def image_files(
    records: Iterable[Record], root: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """`image_file` of each image of the records, looked up once however many of them show it."""
    names = dict.fromkeys(name for record in records for name in record.images)
    return {name: image_file(name, root) for name in names}


def clusters_of(
    records: Sequence[Record], root: str | os.PathLike[str] | None = None
) -> list[list[int]]:
    """Indices of records connected through groups and image files (union-find).

    Args:
        records: of a data set.
        root: its data root; None compares images by their names alone, see `image_file`.
    """
    files = image_files(records, root)
    parent = list(range(len(records)))

    def first_of(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, record in enumerate(records):
        keys = [("group", record.group), *(("image", files[name]) for name in record.images)]
        for key in keys:
            parent[first_of(index)] = first_of(first.setdefault(key, index))
    clusters: dict[int, list[int]] = defaultdict(list)
    for index in range(len(records)):
        clusters[first_of(index)].append(index)
    return list(clusters.values())
