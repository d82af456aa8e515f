"""What counts the bytes, operations and memory of losses: by hand, and ours within its rule."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.static import losses, peers
from benchmarks.static.__main__ import COLUMNS
from benchmarks.static.counted import Counter

MiB = 2**20


def test_counts_by_hand():
    a, b = (torch.empty(1024, 1024, device="meta") for _ in range(2))  # 4 MiB each
    counter = Counter()
    with counter:
        c = a @ b.t()  # the view is free
        c += 1
        del c
        a.sum()
    assert counter.moved == 3 * 4 * MiB + 2 * 4 * MiB + 4 * MiB + 4
    assert counter.products == 2 * 1024**3
    assert counter.elements == 2 * MiB
    assert counter.most == 4 * MiB
    assert counter.held == 0


def test_a_kernel_that_is_not_run():
    x = torch.empty(MiB, dtype=torch.bfloat16, device="meta")
    counter = Counter()
    counter.kernel([x, x], [x], passes=2)
    assert (counter.moved, counter.elements) == (6 * MiB, 2 * MiB)


def test_our_loss_is_within_its_rule():
    counter = Counter()
    losses.our_logits(counter)
    logits = losses.ROWS * losses.VOCABULARY * 2
    assert counter.moved <= 1.05 * 5 * logits
    assert counter.most <= 1.01 * logits  # the gradient


def test_hidden_states_need_less_than_the_logits():
    counter = Counter()
    losses.our_hidden(counter)
    assert counter.most < 2 * losses.ROWS * losses.VOCABULARY * 2


def test_absent_peers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda name: name == "clinkd" or None)
    monkeypatch.setattr(peers, "_ours", lambda *_: iter(()))
    assert peers.report((80,), False, COLUMNS) == []
    losses.report()
    said = capsys.readouterr().out
    for name in ("liger_kernel", "flash_attn", "fla"):
        assert f"{name}: not installed" in said
    assert "trl is not installed" in said
