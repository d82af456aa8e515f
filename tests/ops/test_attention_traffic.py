"""Bytes that the attention's launches touch, counted in Triton's interpreter."""

from collections import defaultdict

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from triton.runtime import interpreter

from benchmarks.static.traffic import backward_bytes, forward_bytes
from clinkd.ops import rotary_attention
from clinkd.rotary import RotarySpec

if torch.cuda.is_available():
    pytest.skip("kernels are compiled, not interpreted", allow_module_level=True)


class Launch:
    """Addresses that one launch reads and writes, by the size of an element."""

    def __init__(self):
        self.read, self.written = defaultdict(set), defaultdict(set)

    @property
    def moved(self):
        """Each byte once; what the launch has written itself it reads from a cache."""
        return sum(
            size * (len(self.read[size] - self.written[size]) + len(self.written[size]))
            for size in {*self.read, *self.written}
        )


@pytest.fixture
def launches(monkeypatch):
    """A `Launch` for each kernel that is started."""
    found = []
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store
    start = interpreter.GridExecutor.__call__

    def note(places, ptrs, mask):
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        places[size].update(addresses.ravel().tolist())

    def counted_load(self, ptrs, mask, *rest):
        note(found[-1].read, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        note(found[-1].written, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counted_start(self, *args, **kwargs):
        found.append(Launch())
        return start(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", counted_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted_start)
    return found


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_moves_no_more_than_the_rule(launches, heads, head_dim):
    tokens, spec = 70, RotarySpec.split(head_dim)
    q, k, v = (torch.randn(1, tokens, H, head_dim, requires_grad=True) for H in (*heads, heads[1]))
    positions = torch.rand(spec.axes, 1, tokens) * 100
    sizes = (q.nbytes, k.nbytes, tokens * heads[0] * 4)
    small = positions.nbytes + 3 * spec.pairs * 4

    with torch.no_grad():
        rotary_attention(q, k, v, positions, spec, impl="triton")
    assert launches[0].moved == forward_bytes(*sizes, keep=False) + small

    out = rotary_attention(q, k, v, positions, spec, impl="triton")
    assert launches[1].moved == forward_bytes(*sizes, keep=True) + small
    if heads[0] == heads[1]:  # else programs share keys here, where the device is small
        out.sum().backward()
        queries, keys = backward_bytes(*sizes)
        assert [each.moved for each in launches[2:]] == [queries + small, keys + small]
