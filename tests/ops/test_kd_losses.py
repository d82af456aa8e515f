"""The distillation loss against its formula in float64, its gradient, and itself cut up."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.ops import kd_loss, linear_kd_loss, linear_topk_kd_loss
from clinkd.ops.reference.kd_loss import DIVERGENCES


def make(rows=37, width=16, vocabulary=101, teacher_width=24, teacher_vocabulary=103, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::3] = -100
    return (
        draw(rows, width).requires_grad_(),
        draw(vocabulary, width).requires_grad_(),
        draw(rows, teacher_width),
        draw(teacher_vocabulary, teacher_width),
        labels,
    )


def test_the_formula_by_hand():
    """One token, two words: every number written out."""
    z, t = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    p, q = [0.5, 0.5], [1 / (1 + 3**0.5), 3**0.5 / (1 + 3**0.5)]  # at T = 2
    ce = -math.log(3 / 4)
    kd = 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = kd_loss(z, t, torch.tensor([1]), kd_weight=0.5, temperature=2.0)
    assert found.ce.item() == pytest.approx(ce, rel=1e-6)
    assert found.kd.item() == pytest.approx(kd, rel=1e-5)
    assert found.loss.item() == pytest.approx((ce + 0.5 * kd) / 1.5, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0, 20.0])
def test_the_gradient_of_the_docs(temperature):
    hidden, weight, teacher, head, labels = make(teacher_vocabulary=101)
    z = (hidden @ weight.T).detach().requires_grad_()
    t = teacher @ head.T
    a, count = 0.7, int((labels != -100).sum())
    kd_loss(z, t, labels, kd_weight=a, temperature=temperature).loss.backward()
    q1, q, p = z.softmax(-1), (z / temperature).softmax(-1), (t / temperature).softmax(-1)
    onehot = F.one_hot(labels.clamp(min=0), z.shape[1])
    expected = ((q1 - onehot) + a * temperature * (q - p)) / ((1 + a) * count)
    expected[labels == -100] = 0
    torch.testing.assert_close(z.grad, expected.detach(), rtol=1e-6, atol=1e-9)


def test_divergences_against_torch():
    hidden, weight, teacher, head, labels = make(teacher_vocabulary=101)
    z, t = hidden @ weight.T, teacher @ head.T
    p, q = t.log_softmax(-1), z.log_softmax(-1)

    def kl(log_a, log_b):  # KL(a || b) of the labelled rows
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)[labels != -100]

    mean = (0.3 * p.exp() + 0.7 * q.exp()).log()
    skewed = (0.1 * p.exp() + 0.9 * q.exp()).log()
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.3 * kl(p, mean) + 0.7 * kl(q, mean),
        "skew_kl": kl(p, skewed),
    }
    for name in DIVERGENCES:
        found = kd_loss(z, t, labels, divergence=name, beta=0.3, skew=0.1).kd
        torch.testing.assert_close(found, expected[name].mean().detach())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_zero_where_the_two_agree(divergence):
    z = torch.randn(5, 11, requires_grad=True)
    found = kd_loss(z, z.detach(), torch.arange(5), kd_weight=1e6, divergence=divergence)
    assert abs(found.kd.item()) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("workspace", [1, 5_000, "auto"])
def test_linear_equals_logits(divergence, workspace):
    hidden, weight, teacher, head, labels = make()
    options = {"temperature": 2.0, "divergence": divergence}
    expected = kd_loss(hidden @ weight.T, teacher @ head.T, labels, **options)
    found = linear_kd_loss(hidden, weight, teacher, head, labels, workspace=workspace, **options)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.kd, expected.kd)
    grads = torch.autograd.grad(expected.loss, (hidden, weight))
    for a, b in zip(torch.autograd.grad(found.loss, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("workspace", [5_000, "auto"])
def test_rows_that_pad_the_heads_take_no_part(workspace):
    hidden, weight, teacher, head, labels = make()
    labels %= 90
    arguments = (hidden, weight, teacher, head[:95], labels)
    padded = linear_kd_loss(*arguments, vocab_size=90, workspace=workspace)
    expected = linear_kd_loss(hidden, weight[:90], teacher, head[:95], labels)
    for found, wanted in zip(padded, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    found = torch.autograd.grad(padded.loss, (hidden, weight))
    wanted = torch.autograd.grad(expected.loss, (hidden, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert found[1].shape == weight.shape
    assert not found[1][90:].any()
    with pytest.raises(ValueError, match=r"vocab_size must be in 1 … 101.*got 102"):
        linear_kd_loss(*arguments, vocab_size=102)


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 37), seed=st.integers(0, 9), weighted=st.booleans())
def test_any_split_and_order_gives_the_same(cut, seed, weighted):
    hidden, weight, teacher, head, labels = make(seed=seed)
    factor = torch.rand(37, dtype=torch.float64) if weighted else None
    count = int((labels != -100).sum())
    order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))

    def part(rows):
        each = None if factor is None else factor[rows]
        return linear_kd_loss(
            hidden[rows], weight, teacher[rows], head, labels[rows], weight=each, num_items=count
        ).loss

    whole = part(torch.arange(37))
    split = part(order[:cut]) + part(order[cut:])
    torch.testing.assert_close(split, whole)
    a, b = (torch.autograd.grad(loss, (hidden, weight)) for loss in (split, whole))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top", [False, True])
def test_no_pass_over_the_gradients_after_the_loss(dtype, top):
    """All but float16, which would be rounded to nothing where something scales the loss up."""
    hidden, weight, teacher, head, labels = (
        t.detach().to(dtype) if t.is_floating_point() else t for t in make()
    )
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logits = (teacher @ head.T).float()
    if top:
        values, ids = logits.topk(5)
        loss = linear_topk_kd_loss(*leaves, values, ids, logits.logsumexp(-1), labels).loss
    else:
        loss = linear_kd_loss(*leaves, teacher, head, labels).loss
    with torch.profiler.profile(record_shapes=True) as profile:
        grads = torch.autograd.grad(loss, leaves)
    shapes = [e.input_shapes[0] for e in profile.events() if e.name == "aten::mul_"]
    assert ([101, 16] in shapes) is (dtype == torch.float16)
    assert all(grad.abs().max() > 0 for grad in grads)


def test_a_count_that_learns():
    hidden, weight, teacher, head, labels = make()
    count = torch.tensor(9.0, requires_grad=True)
    loss = linear_kd_loss(hidden, weight, teacher, head, labels, num_items=count).loss
    found = torch.autograd.grad(loss, (weight, count))
    constant = linear_kd_loss(hidden, weight, teacher, head, labels, num_items=9).loss
    torch.testing.assert_close(found[0], torch.autograd.grad(constant, weight)[0])
    assert found[1].item() == pytest.approx(-loss.item() / 9, rel=1e-6)


def test_a_second_backward_gives_the_same_and_leaves_the_first():
    hidden, weight, teacher, head, labels = make()
    loss = 3 * linear_kd_loss(hidden, weight, teacher, head, labels).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_the_heads_gradient_exists_once():
    """Fp32 accumulator, scaled where it lies; a backward pass that may run again has its copy."""
    hidden, weight, teacher, head, labels = make(rows=8, vocabulary=4001, teacher_vocabulary=4001)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = linear_kd_loss(hidden, weight, teacher, head, labels, workspace=1).loss
        loss.backward()
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    sizes = [event.nbytes() for event in events]
    assert sizes.count(weight.nbytes) == 1


def test_frozen_parts_get_nothing():
    hidden, weight, teacher, head, labels = make()
    loss = linear_kd_loss(hidden, weight.detach(), teacher, head, labels).loss
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad[labels == -100].abs().max() == 0
    assert grad.abs().max() > 0


def test_all_ignored_is_zero_with_zero_gradient():
    hidden, weight, teacher, head, labels = make()
    found = linear_kd_loss(hidden, weight, teacher, head, torch.full_like(labels, -100))
    assert found.loss.item() == found.ce.item() == found.kd.item() == 0
    grads = torch.autograd.grad(found.loss, (hidden, weight))
    assert all(g.abs().max() == 0 for g in grads)


def test_other_vocabulary_is_not_read_as_zeros():
    """Rows that the teacher alone has change nothing, whatever they hold."""
    hidden, weight, teacher, head, labels = make(teacher_vocabulary=101)
    longer = torch.cat([head, 50 * torch.ones(7, head.shape[1], dtype=torch.float64)])
    a = linear_kd_loss(hidden, weight, teacher, head, labels)
    b = linear_kd_loss(hidden, weight, teacher, longer, labels)
    torch.testing.assert_close(a.loss, b.loss)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence):
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, 1e4]])
    found = kd_loss(z, t, torch.tensor([1, 2]), divergence=divergence)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"labels must be \[N\] = \[37\]",
        ),
        ({"labels": torch.zeros(37)}, TypeError, "labels must be int64"),
        ({"kd_weight": -1}, ValueError, "kd_weight must be at least 0 and finite, got -1"),
        ({"temperature": 0}, ValueError, "temperature must be above 0 and finite, got 0"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl.*got 'kl'"),
        ({"beta": 1.0, "divergence": "jsd"}, ValueError, "beta must be between 0 and 1"),
        ({"workspace": -3}, ValueError, "workspace must be"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    hidden, weight, teacher, head, labels = make()
    arguments = {"labels": labels} | change
    with pytest.raises(error, match=message):
        linear_kd_loss(hidden, weight, teacher, head, arguments.pop("labels"), **arguments)


def test_shapes_that_do_not_fit():
    hidden, weight, teacher, head, labels = make()
    with pytest.raises(ValueError, match=r"student_weight must be \[V, C\] with C = 16"):
        linear_kd_loss(hidden, head, teacher, head, labels)
    with pytest.raises(ValueError, match="teacher_hidden must have N = 37 rows"):
        linear_kd_loss(hidden, weight, teacher[:3], head, labels)
