"""How many processes do what."""

import os

import pytest
import torch

from clinkd.config import check
from clinkd.pipeline import workers


@pytest.mark.parametrize(
    ("cores", "gpus", "shared", "wanted", "found"),
    [
        (64, 6, 64 << 30, "auto", 4),
        (12, 6, 64 << 30, "auto", 1),
        (6, 6, 64 << 30, "auto", 0),
        (64, 6, 64 << 20, "auto", 0),  # a container's
        (64, 6, None, "auto", 0),
        (64, 0, 64 << 30, "auto", 0),  # training has the cores
        (2, 0, 64 << 20, 3, 3),
    ],
)
def test_who_decodes_images(monkeypatch, tmp_path, cores, gpus, shared, wanted, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(workers, "SHARED", tmp_path / ("" if shared else "none"))
    monkeypatch.setattr(workers, "free_bytes", lambda path: shared)
    config = check({"parallel": {"dataloader_workers": wanted}})
    assert workers.dataloader_workers(config) == found
