"""Columns of -inf, which masks make: every divergence, every way through, against float64."""

import pytest
import torch

from clinkd.ops import kd_loss, linear_kd_loss
from clinkd.ops._impl import why_not_triton
from clinkd.ops.kd_loss import why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL = DEVICE.type
N, V, C = 6, 90, 16
SIDES = {"both": (True, True), "student": (True, False), "teacher": (False, True)}


def masked(side, seed=0):
    """Logits in float64, with -inf in every third column of one side or both; labels elsewhere."""
    g = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(N, V, generator=g, dtype=torch.float64) for _ in range(2))
    hidden = torch.arange(V) % 3 == 1
    for logits, is_hidden in zip((z, t), SIDES[side], strict=True):
        if is_hidden:
            logits[:, hidden] = -torch.inf
    labels = 3 * torch.randint(0, V // 3, (N,), generator=g)
    labels[2] = -100
    return z.to(DEVICE), t.to(DEVICE), labels.to(DEVICE)


def infinite(divergence, side):
    return (divergence, side) in (("forward_kl", "student"), ("reverse_kl", "teacher"))


def by_hand(z, t, labels, divergence, T, beta=0.5, skew=0.1):
    """Loss and gradient in float64 over the columns where anything is above 0, by autograd."""
    z = z.clone().requires_grad_()
    total = 0.0
    for i in (labels != -100).nonzero().squeeze(1).tolist():
        seen = z[i].detach() > -torch.inf
        ce = -torch.log_softmax(z[i][seen], 0)[(seen.cumsum(0) - 1)[labels[i]]]
        q = torch.zeros_like(z[i]).masked_scatter(seen, torch.softmax(z[i][seen] / T, 0))
        p = torch.softmax(t[i] / T, 0)

        def kl(a, b):
            return (a[a > 0] * (a[a > 0] / b[a > 0]).log()).sum()

        kd = {
            "forward_kl": lambda p=p, q=q: kl(p, q),
            "reverse_kl": lambda p=p, q=q: kl(q, p),
            "jsd": lambda p=p, q=q: (
                beta * kl(p, beta * p + (1 - beta) * q)
                + (1 - beta) * kl(q, beta * p + (1 - beta) * q)
            ),
            "skew_kl": lambda p=p, q=q: kl(p, skew * p + (1 - skew) * q),
        }[divergence]()
        total = total + (ce + 0.5 * T * T * kd) / 1.5
    loss = total / (labels != -100).sum()
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def close(found, expected, rounding=1e-5):
    assert found.isfinite().all()
    size = expected.abs().max().clamp(min=1e-3)
    assert (found.double() - expected).abs().max() <= rounding * size


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("T", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("impl", ["reference", KERNEL])
def test_of_logits(impl, T, side, divergence):
    if impl != "reference" and (reason := why_not(impl, DEVICE, torch.float32)):
        pytest.skip(reason)
    z, t, labels = masked(side)
    logits = z.float().requires_grad_()
    found = kd_loss(logits, t.float(), labels, divergence=divergence, temperature=T, impl=impl)
    if infinite(divergence, side):
        assert found.kd.isposinf()
        assert found.ce.isfinite()
        return
    expected, gradient = by_hand(z, t, labels, divergence, T)
    close(found.loss.detach(), expected)
    close(torch.autograd.grad(found.loss, logits)[0], gradient)


# the interpreter computes what a `where` then drops
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("workspace", ["auto", 700, 0])
def test_of_hidden_states(workspace, side, divergence):
    """A bias of -inf is how a head is padded."""
    if workspace == 0 and (reason := why_not_triton(DEVICE, torch.float32)):
        pytest.skip(reason)
    if infinite(divergence, side):
        return
    g = torch.Generator().manual_seed(1)
    hidden, weight, teacher, head = (
        torch.randn(n, C, generator=g).to(DEVICE) for n in (N, V, N, V)
    )
    _, _, labels = masked(side)
    out = torch.arange(V, device=DEVICE) % 3 == 1
    biases = [
        torch.zeros(V, device=DEVICE).masked_fill(out, -torch.inf) if s else None
        for s in SIDES[side]
    ]
    hidden.requires_grad_()
    weight.requires_grad_()
    found = linear_kd_loss(
        hidden, weight, teacher, head, labels, divergence=divergence, temperature=2.0,
        student_bias=biases[0], teacher_bias=biases[1], workspace=workspace,
    ).loss  # fmt: skip
    of_hidden, of_weight = torch.autograd.grad(found, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    z = wide[0] @ wide[1].T
    t = teacher.double() @ head.double().T
    z, t = (x if b is None else x + b.double() for x, b in zip((z, t), biases, strict=True))
    expected, of_logits = by_hand(z.detach(), t, labels, divergence, 2.0)
    close(found.detach(), expected)
    grads = torch.autograd.grad(z, wide, of_logits)
    close(of_hidden, grads[0], 3e-5)
    close(of_weight, grads[1], 3e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ignored_rows_may_hold_anything(divergence):
    """In the definition too: no gradient comes out of them."""
    z, t, labels = masked("both")
    z[2, ::2], t[2] = torch.nan, torch.inf
    z.requires_grad_()
    ce, kd = kd_loss_rows(z, t, labels, divergence=divergence)
    (grad,) = torch.autograd.grad((ce + kd).sum(), z)
    assert grad.isfinite().all()
    assert grad[2].abs().max() == 0
