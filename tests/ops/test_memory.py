"""Memory of the CPU: large pages, a request that changes no number, and what is kept."""

import gc
import re
import resource
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clinkd.ops import _memory, release_memory
from clinkd.ops._memory import fresh


def mapping_of(place):
    """What /proc/self/smaps says of the mapping that holds an address, in KiB or flags."""
    found, lines = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            found = begin <= place < end
        elif found:
            name, _, values = line.partition(":")
            lines[name] = values.split()
    return lines


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps")
def test_large_tensors_ask_for_large_pages(monkeypatch):
    if not _memory.built("large_pages"):
        pytest.skip("clinkd._C is not built")
    monkeypatch.setattr(_memory, "_are_worth_asking", lambda: True)
    large = torch.empty(16 << 20, dtype=torch.uint8)
    assert _memory.large_pages(large) is large
    assert "hg" in mapping_of(large.data_ptr() + (8 << 20))["VmFlags"]
    empty = torch.empty(0)
    assert _memory.large_pages(empty) is empty


@pytest.fixture
def kept():
    """Nothing idle before and after."""
    if not _memory.built("KeptMemory"):
        pytest.skip("clinkd._C is not built, or the system cannot take kept pages back")
    release_memory()
    yield
    release_memory()


LARGE = (9, 1 << 20)  # float32: more than the least that is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory_is_used_again(kept, dtype):
    like = torch.empty(0, dtype=dtype)
    first = fresh(LARGE, like, torch.float32)
    assert first.shape == LARGE
    assert first.is_contiguous()
    assert first._base is None
    assert first.untyped_storage().nbytes() == first.numel() * 4
    place = first.data_ptr()
    assert place % (2 << 20) == 0
    first.fill_(7)
    second = fresh(LARGE, like, torch.float32)
    assert second.data_ptr() != place
    part = first[3:]
    del first
    assert fresh(LARGE, like, torch.float32).data_ptr() != place  # a part is still in use
    assert (part == 7).all()
    del part
    third = fresh((LARGE[0] * 4, LARGE[1]), like, torch.uint8)  # another type of as many bytes
    assert third.data_ptr() == place
    assert fresh(LARGE, like).dtype == dtype


def test_small_and_much_larger_blocks(kept):
    like = torch.empty(0)
    small = fresh((1000,), like)
    assert small.shape == (1000,)
    large = fresh((64, 1 << 20), like)
    place = large.data_ptr()
    del large
    assert fresh((9, 1 << 20), like).data_ptr() != place  # seven times as much as is needed
    assert fresh((62, 1 << 20), like).data_ptr() == place  # a little less
    release_memory()
    assert kib(place) == 0


def kib(place, name="Rss"):
    """Pages that the mapping of an address has; 0 where there is none."""
    return int(mapping_of(place).get(name, ["0"])[0])


def test_the_system_may_take_what_is_idle(kept):
    memory = fresh((16, 1 << 20), torch.empty(0)).fill_(1)
    place = memory.data_ptr()
    assert kib(place) >= 64 << 10
    assert kib(place, "LazyFree") == 0
    del memory
    assert kib(place, "LazyFree") > 0


def test_only_the_last_blocks_are_kept(kept):
    like = torch.empty(0)
    blocks = [fresh(LARGE, like).fill_(1) for _ in range(10)]
    places = [block.data_ptr() for block in blocks]
    for _ in range(10):
        blocks.pop(0)
    assert [kib(place) > 0 for place in places] == [False] * 2 + [True] * 8


def test_threads_give_memory_back(kept):
    like = torch.empty(0)
    wrong = []

    def work(number):
        for _ in range(50):
            memory = fresh((2, 8 << 20), like)
            memory[:, ::4096] = number
            wrong.extend(memory[:, ::4096].ne(number).nonzero().tolist())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_gradient_in_kept_memory(kept):
    """Autograd takes it as the leaf's gradient without a copy, and it goes back with it."""
    weight = torch.zeros(LARGE, requires_grad=True)

    class Filled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            memory = fresh(LARGE, grad).fill_(3)
            places.append(memory.data_ptr())
            return memory

    places = []
    for _ in range(2):
        Filled.apply(weight).backward()
        assert weight.grad.data_ptr() == places[-1]
        assert (weight.grad == 3).all()
        weight.grad = None
        gc.collect()
    assert places[0] == places[1]


def test_keeping_can_be_turned_off(kept, monkeypatch):
    monkeypatch.setenv(_memory.SWITCH, "0")
    _memory._is_kept.cache_clear()
    monkeypatch.setattr(_memory, "extension", lambda: pytest.fail("memory was kept"))
    monkeypatch.setattr(_memory, "_are_worth_asking", lambda: False)
    try:
        assert fresh(LARGE, torch.empty(0)).shape == LARGE
    finally:
        monkeypatch.undo()
        _memory._is_kept.cache_clear()


@pytest.mark.parametrize("elements", [1 << 50, 1 << 60])
def test_more_than_there_is(kept, elements):
    with pytest.raises(MemoryError):
        fresh((elements,), torch.empty(0))


@pytest.mark.parametrize("bytes", [1 << 63, (1 << 64) - 1])
def test_sizes_that_would_wrap_around(kept, bytes):
    with pytest.raises(MemoryError):
        _memory.extension().KeptMemory(bytes)


def test_idle_memory_is_given_back_before_there_is_none(kept):
    like = torch.empty(0)
    blocks = [fresh((64, 1 << 20), like) for _ in range(4)]  # 1 GiB
    del blocks
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        assert fresh((192, 1 << 20), like).shape == (192, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


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
    hidden, weight = torch.randn(_memory.NARROW + 1, 64).to(dtype), torch.randn(900, 64).to(dtype)
    bias = torch.randn(900).to(dtype) if biased else None
    assert torch.equal(_memory.linear(hidden, weight, bias), F.linear(hidden, weight, bias))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, _memory.NARROW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear_of_few_rows(dtype, rows, biased, swapped, monkeypatch):
    monkeypatch.setattr(_memory, "_is_mkl_on_avx2", lambda: swapped)
    hidden, weight = torch.randn(rows, 64).to(dtype), torch.randn(900, 70).to(dtype)[:, :64]
    bias = torch.randn(900).to(dtype) if biased else None
    found = _memory.linear(hidden, weight, bias)
    assert found.is_contiguous()
    expected = F.linear(hidden, weight, bias)
    if swapped and dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def test_linear_follows_autocast():
    hidden, weight = torch.randn(7, 64), torch.randn(90, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _memory.linear(hidden, weight, None)
    assert found.dtype == torch.bfloat16
