"""Positions that are not finite: an error; on a GPU of a later call, as no host waits."""

import contextlib

import pytest
import torch

from clinkd.ops import _finite, rotary
from clinkd.rotary import RotarySpec


class Event:
    """Of a GPU that is done when the test says so."""

    done = True

    def record(self):
        pass

    def query(self):
        return Event.done


@pytest.fixture
def asked(monkeypatch):
    """What the GPU was asked; the CPU stands in for it."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Event, "done", True)
    yield _finite._asked
    _finite._asked.clear()
    _finite._seen = ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_next_call_after_the_gpu_is_done_raises(asked, value):
    wrong, right = torch.zeros(2, 3), torch.zeros(2, 3)
    wrong[1, 2] = value
    Event.done = False
    _finite.check_finite_later("key_positions", wrong)
    _finite.check_finite_later("positions", right)
    Event.done = True
    with pytest.raises(ValueError, match="key_positions of an earlier call must be finite, got"):
        _finite.check_finite_later("positions", right)
    _finite.check_finite_later("positions", right)  # and once only
    assert not asked


def test_the_same_tensor_is_looked_at_once(asked):
    Event.done = False
    positions = torch.zeros(2, 3)
    for _ in range(3):
        _finite.check_finite_later("positions", positions)
    assert len(asked) == 1
    positions += 1
    _finite.check_finite_later("positions", positions)
    _finite.check_finite_later("positions", positions.clone())
    _finite.check_finite_later("positions", torch.zeros(2, 0))
    assert len(asked) == 3


def test_tensors_of_inference_mode(asked):
    Event.done = False
    with torch.inference_mode():
        positions = torch.zeros(2, 3)
        for _ in range(2):
            _finite.check_finite_later("positions", positions)
    assert len(asked) == 1


def test_large_positions_are_finite(asked):
    for value in (3e38, -3e38):
        _finite.check_finite_later("positions", torch.full((2, 100), value))
    _finite.check_finite_later("positions", torch.zeros(1))


def test_what_changed_is_looked_at_again():
    x, positions, spec = torch.ones(1, 3, 2, 32), torch.zeros(2, 1, 3), RotarySpec.split(32)
    rotary(x, positions, spec)
    rotary(x, positions, spec)
    positions[1, 0, 2] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"positions must be finite, got nan at \[1, 0, 2\]"):
            rotary(x, positions, spec)
    with torch.inference_mode():
        positions = torch.zeros(2, 1, 3)
        rotary(x, positions, spec)
        positions[0, 0, 0] = torch.inf
        with pytest.raises(ValueError, match=r"positions must be finite, got inf at \[0, 0, 0\]"):
            rotary(x, positions, spec)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    spec = RotarySpec.split(32)
    x = torch.ones(1, 3, 2, 32, device="cuda")
    positions = torch.zeros(2, 1, 3, device="cuda")
    positions[0, 0, 1] = torch.nan
    assert rotary(x, positions, spec)[0, 1].isnan().any()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="positions of an earlier call must be finite, got nan"):
        rotary(x, torch.zeros(2, 1, 3, device="cuda"), spec)
    rotary(x, torch.zeros(2, 1, 3, device="cuda"), spec)
