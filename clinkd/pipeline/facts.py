"""What run.json says of how a run was made: versions, the machine, the memory of its stages."""

import contextlib
import platform
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import psutil

from clinkd._version import __version__
from clinkd.config import SAMPLE
from clinkd.pipeline.folder import RunFolder

# those whose version may move a number
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "open_clip_torch",
    "sentence-transformers",
    "spacy",
)


def note_versions(folder: RunFolder) -> None:
    """Note versions and the machine."""
    versions = {"python": platform.python_version(), "clinkd": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    book = folder.book()
    book["versions"] = versions
    book["machine"] = book.get("machine", {}) | {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    book["data"] = "sample" if folder.config.data.train == SAMPLE else folder.config.data.train
    folder.write_book(book)


def note_gpus(folder: RunFolder) -> None:
    """Note the cards that a stage has; asking imports torch."""
    import torch

    names = Counter(
        torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count())
    )
    found = ", ".join(f"{count} × {name}" for name, count in names.items())
    book = folder.book()
    book["machine"]["gpus"] = f"{found}, CUDA {torch.version.cuda}" if found else "none"
    folder.write_book(book)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Watch resident memory; the list's one number is the most seen, in bytes.

    That of this process and of those that it started: what they share counts in each.
    """
    own = psutil.Process()
    peak = [own.memory_info().rss]
    stop = threading.Event()

    def watch() -> None:
        ticks, started = 0, [own]
        while not stop.wait(0.2):
            if ticks % 10 == 0:  # looks at every process of the machine
                with contextlib.suppress(psutil.Error):  # of which some may be hidden
                    started = [own, *own.children(recursive=True)]
            ticks += 1
            peak[0] = max(peak[0], sum(map(_resident, started)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _resident(process: psutil.Process) -> int:
    try:
        found: int = process.memory_info().rss
    except psutil.Error:  # it has ended
        return 0
    return found
