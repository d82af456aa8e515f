"""Fixtures of the tests that run CUDA kernels on the CPU; the machine itself is simt_harness.py."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from simt_harness import SimtMachine

KEPT_DAYS = 7


@pytest.fixture(scope="session")
def simt():
    """Makes a `SimtMachine`; compiled code is kept between sessions, named by its content."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(home) / "clinkd" / "simt"
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.iterdir():
        if old.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
            shutil.rmtree(old, ignore_errors=True)

    def make(*sources, **options):
        return SimtMachine(sources, cache, **options)

    return make
