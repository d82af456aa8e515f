"""Fresh memory in large pages: a request that changes no number."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clinkd.ops import _memory


def flags_of(place):
    """What /proc/self/smaps says of the mapping that holds an address."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            found = begin <= place < end
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps")
def test_large_tensors_ask_for_large_pages(monkeypatch):
    if not _memory.built("large_pages"):
        pytest.skip("clinkd._C is not built")
    monkeypatch.setattr(_memory, "_are_worth_asking", lambda: True)
    large = torch.empty(16 << 20, dtype=torch.uint8)
    assert _memory.large_pages(large) is large
    assert "hg" in flags_of(large.data_ptr() + (8 << 20))
    empty = torch.empty(0)
    assert _memory.large_pages(empty) is empty


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([], False),
        (["111110111"], False),
        (["0"], False),
        (["0000010"], True),
        (["0", "111111"], True),
    ],
)
def test_a_host_that_takes_free_pages(tmp_path, features, expected):
    for number, bits in enumerate(features):
        (tmp_path / f"virtio{number}").mkdir()
        (tmp_path / f"virtio{number}" / "features").write_text(f"{bits}\n")
    assert _memory.host_takes_free_pages(tmp_path) is expected
    assert not _memory.host_takes_free_pages(tmp_path / "no")


def test_a_device_that_cannot_be_read(tmp_path):
    (tmp_path / "virtio0" / "features").mkdir(parents=True)
    assert not _memory.host_takes_free_pages(tmp_path)


def test_nothing_is_asked_of_such_a_host(monkeypatch):
    """By the call: memory that malloc has from its heap may lie where others have asked."""
    monkeypatch.setattr(_memory, "extension", lambda: pytest.fail("large pages were asked for"))
    large = torch.empty(64 << 20, dtype=torch.uint8)
    monkeypatch.setattr(_memory, "_are_worth_asking", lambda: False)
    assert _memory.large_pages(large) is large
    monkeypatch.setattr(_memory, "_are_worth_asking", lambda: True)
    with pytest.raises(pytest.fail.Exception, match="large pages were asked for"):
        _memory.large_pages(large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_torchs(dtype, biased):
    hidden, weight = torch.randn(7, 64).to(dtype), torch.randn(900, 64).to(dtype)
    bias = torch.randn(900).to(dtype) if biased else None
    assert torch.equal(_memory.linear(hidden, weight, bias), F.linear(hidden, weight, bias))


def test_linear_follows_autocast():
    hidden, weight = torch.randn(7, 64), torch.randn(90, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _memory.linear(hidden, weight, None)
    assert found.dtype == torch.bfloat16
