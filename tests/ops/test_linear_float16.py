"""The losses of hidden states in float16, whose range is short at both ends."""

import pytest
import torch
import torch.nn.functional as F

from clinkd.ops import kd_loss, linear_kd_loss, linear_topk_kd_loss

N, C, V = 2048, 16, 300


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEACHER = draw(N, C, seed=3), draw(V, C, seed=4)
LOGITS = TEACHER[0] @ TEACHER[1].T


def of_teacher(hidden, head, labels, **options):
    return linear_kd_loss(hidden, head, *TEACHER, labels, **options)


def of_top(hidden, head, labels, **options):
    top, ids = LOGITS.topk(8)
    return linear_topk_kd_loss(hidden, head, top, ids, LOGITS.logsumexp(1), labels, **options)


@pytest.mark.parametrize(
    ("impl", "traced"), [("auto", False), ("auto", True), ("reference", False)]
)
@pytest.mark.parametrize("loss", [of_teacher, of_top])
def test_a_scaled_loss_under_autocast(loss, impl, traced):
    """Hidden states of float32, logits of float16: scaled too late, small gradients would be 0."""
    leaves = [draw(N, C, seed=1).requires_grad_(), draw(V, C, seed=2).mul(0.1).requires_grad_()]
    labels = torch.randint(0, V, (N,))
    tokens = 1_000_000  # of all that an optimiser's step adds up
    exact = torch.autograd.grad(loss(*leaves, labels, num_items=tokens).loss, leaves)

    def step(hidden, head):
        with torch.autocast("cpu", dtype=torch.float16):
            return loss(hidden, head, labels, impl=impl, num_items=tokens).loss

    run = torch.compile(step, backend="aot_eager", fullgraph=True) if traced else step
    scale = 2.0**16
    for actual, expected in zip(
        torch.autograd.grad(run(*leaves) * scale, leaves), exact, strict=True
    ):
        assert (actual / scale - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("workspace", ["auto", 200 * V * 4])
def test_a_sum_over_rows_beyond_its_range(workspace, traced):
    """Divided by the number of tokens later, so that no loss scale could bring it back."""
    hidden = draw(N, C, seed=1)
    hidden[:, 0] += 90
    labels = torch.zeros(N, dtype=torch.int64)
    leaves = [hidden.half(), draw(V, C, seed=2).mul(0.01).half(), torch.zeros(V).half()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    teacher = [each.half() for each in TEACHER]

    def step(hidden, head, bias):
        options = {"student_bias": bias, "workspace": workspace}
        return linear_kd_loss(hidden, head, *teacher, labels, **options).loss

    run = torch.compile(step, backend="aot_eager", fullgraph=True) if traced else step
    found = torch.autograd.grad(run(*leaves), leaves)
    assert [grad.dtype for grad in found] == [torch.float16] * 3
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    logits = F.linear(*exact), F.linear(*(each.float() for each in teacher))
    expected = torch.autograd.grad(kd_loss(*logits, labels).loss, exact)
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()
