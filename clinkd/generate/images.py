"""Images of the questions, read ahead: a processor reads while the GPU answers."""

import os
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from clinkd.data.images import load_image
from clinkd.data.records import Record
from clinkd.errors import DataError

Loaded = list[Image.Image] | DataError  # the images of a record, or why there are none


def with_images(
    parts: Sequence[Sequence[Record]], data_root: str | os.PathLike[str]
) -> Generator[tuple[Sequence[Record], list[Loaded]], None, None]:
    """Each part and its images; those of the next are read while one is worked on."""
    stopped = threading.Event()

    def load(part: Sequence[Record]) -> list[Loaded]:
        found: list[Loaded] = []
        for record in part:
            if stopped.is_set():
                break
            try:
                found.append([load_image(data_root, name) for name in record.images])
            except DataError as error:
                found.append(error)
        return found

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(load, parts[0]) if parts else None
        try:
            for place, part in enumerate(parts):
                assert coming is not None
                images = coming.result()
                if place + 1 < len(parts):
                    coming = reader.submit(load, parts[place + 1])
                yield part, images
        finally:
            stopped.set()
