"""Forms of the attention kernels that another architecture, or a larger tensor, would take."""

import pytest
import torch

pytest.importorskip("triton")
from clinkd.kernels import rotary_attention as forward
from clinkd.kernels import rotary_attention_backward as backward
from clinkd.kernels import rotary_blocks as blocks
from clinkd.ops import rotary_attention
from clinkd.rotary import RotarySpec

if torch.cuda.is_available():
    pytest.skip("a GPU has its own form", allow_module_level=True)


def run(head_dim):
    g = torch.Generator().manual_seed(head_dim)
    q, k, v = (torch.randn(1, 45, H, head_dim, generator=g) for H in (4, 2, 2))
    spec = RotarySpec.split(head_dim)
    positions = torch.rand(spec.axes, 1, 45, generator=g) * 50
    given = [x.requires_grad_() for x in (q, k, v)]
    out, lse = rotary_attention(*given, positions, spec, return_lse=True, impl="triton")
    return out.detach(), lse, *torch.autograd.grad(out.square().sum(), given)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rows_counted_in_64_bits(monkeypatch, head_dim):
    narrow = run(head_dim)
    asked = []
    for module in (forward, backward):
        monkeypatch.setattr(module, "is_narrow", lambda *given: bool(asked.append(given)))
    assert all(torch.equal(a, b) for a, b in zip(narrow, run(head_dim), strict=True))
    assert len(asked) == 3


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_head_in_two_halves(monkeypatch, head_dim):
    whole = run(head_dim)
    pieces = blocks.pieces
    assert pieces(head_dim, True) == (head_dim, 0)
    monkeypatch.setattr(blocks, "pieces", lambda D, _: pieces(D, False))
    for a, b in zip(whole, run(head_dim), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_when_32_bits_suffice():
    near, far = (
        torch.empty_strided((1, 2, 1, 1), (1, stride, 1, 1), device="meta")
        for stride in ((1 << 30) - 1, 1 << 30)
    )
    narrow = blocks.Blocks(64, 64, 4, 3, narrow=True)
    assert blocks.is_narrow(narrow, near, near)
    assert not blocks.is_narrow(narrow, near, far)
    assert not blocks.is_narrow(narrow._replace(narrow=False), near)
