"""Rows that are none, and memory that is shared."""

import pytest
import torch

from clinkd.ops import rotary, rotary_append, rotary_attention
from clinkd.rotary import RotarySpec

SPEC = RotarySpec.split(32)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_attention_over_no_rows(impl):
    q, k = (torch.randn(0, 20, heads, 32, requires_grad=True) for heads in (2, 1))
    positions = torch.zeros(2, 0, 20)
    out, lse = rotary_attention(q, k, k, positions, SPEC, return_lse=True, impl=impl)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 20)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_in_place_refuses_elements_that_share_memory():
    x = torch.randn(1, 20, 1, 32).expand(1, 20, 4, 32)
    with pytest.raises(ValueError, match="inplace must be False where elements of x share memory"):
        rotary(x, torch.zeros(2, 1, 20), SPEC, inplace=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_checking_names_a_position_that_is_not_finite(value, monkeypatch):
    positions = torch.zeros(2, 1, 20)
    positions[1, 0, 7] = value
    x = torch.randn(1, 20, 2, 32)
    monkeypatch.setenv("CLINKD_CHECK", "1")
    with pytest.raises(ValueError, match=rf"positions must be finite, got {value} at \[1, 0, 7\]"):
        rotary(x, positions, SPEC)
    cache, starts = torch.zeros_like(x), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="positions must be finite"):
        rotary_append(x, x, positions, SPEC, cache, cache.clone(), starts)
    for wrong in ({"positions": positions}, {"key_positions": positions}):
        places = {"positions": torch.zeros(2, 1, 20)} | wrong
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be finite"):
            rotary_attention(x, x, x, spec=SPEC, **places)
