"""`kd_loss` on the CPU with its gradient from the forward pass, against two passes."""

from importlib import import_module

import pytest
import torch

from clinkd.ops import kd_loss
from clinkd.ops.kd_loss import why_not

LARGE = 32 << 20  # bytes from which a gradient is written past the caches


@pytest.fixture(autouse=True)
def _needs_the_kernel():
    if reason := why_not("cpu", torch.device("cpu"), torch.float32):
        pytest.skip(reason)


def make(N, V, dtype=torch.float32):
    g = torch.Generator().manual_seed(N)
    z, t = ((torch.randn(N, V, generator=g) * 3).to(dtype) for _ in range(2))
    labels = torch.randint(0, V, (N,), generator=g)
    labels[1::5] = -100
    return z.requires_grad_(), t, labels


def is_at_once(loss):
    return type(loss.grad_fn).__name__ == "WithGradientBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "V"), [(9, 301), (16_600, 1025), (120, 151_936), (1, 1)])
def test_equals_two_passes(N, V, dtype, monkeypatch, empty_is_nan):
    """Small; large with rows that begin on 16 bytes and with rows that do not."""
    z, t, labels = make(N, V, dtype)
    at_once = kd_loss(z, t, labels, temperature=2.0)
    assert is_at_once(at_once.loss)
    (grad,) = torch.autograd.grad(at_once.loss, z)
    monkeypatch.setattr(import_module("clinkd.ops.kd_loss"), "_gradient_at_once", lambda *_: False)
    two = kd_loss(z, t, labels, temperature=2.0)
    assert not is_at_once(two.loss)
    (expected,) = torch.autograd.grad(two.loss, z)
    assert all(torch.equal(a, b) for a, b in zip(at_once, two, strict=True))
    # the count of labels rounds the factors of the rows once more in one of the two
    allowed = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(grad, expected, rtol=allowed, atol=1e-6 * expected.abs().max())


def test_what_takes_two_passes():
    z, t, labels = make(7, 64)
    weight = torch.rand(7)
    assert is_at_once(kd_loss(z, t, labels, weight=weight).loss)
    for given, more in (
        ((z.half(), t.half()), {}),
        ((z.T.contiguous().T, t), {}),
        ((z, t), {"weight": weight.requires_grad_()}),
        ((z, t), {"impl": "reference"}),
    ):
        assert not is_at_once(kd_loss(*given, labels, **more).loss)


def test_forward_alone_makes_no_gradient():
    z, t, labels = make(64, LARGE // 256)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        kd_loss(z, t, labels)
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert max(event.nbytes() for event in events) < z.nbytes / 100


def test_a_second_backward_pass():
    z, t, labels = make(7, 64)
    loss = 3 * kd_loss(z, t, labels).loss
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(second, kept)
    assert torch.equal(first, kept)
