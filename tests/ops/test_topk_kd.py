"""The distillation loss from a teacher's top logits: the definition, the kernels, the chunks."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clinkd.ops import kd_loss, linear_topk_kd_loss, topk_kd_loss
from clinkd.ops.kd_loss import why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(N, V, K, T=1.0, dtype=torch.float64, size=3.0, seed=0):
    """Student logits, the teacher's top K of V, labels."""
    g = torch.Generator().manual_seed(seed)
    z, t = (torch.randn(N, V, generator=g, dtype=torch.float64) * size for _ in range(2))
    labels = torch.randint(0, V, (N,), generator=g)
    labels[1::4] = -100
    values, ids = t.topk(K, dim=1)
    lse = (t / T).logsumexp(1)
    parts = (z.to(dtype), t, values, ids.int(), lse, labels)
    return tuple(part.to(DEVICE) for part in parts)


def run(z, top, labels, impl, **options):
    z = z.detach().clone().requires_grad_()
    found = topk_kd_loss(z, *top, labels, impl=impl, **options)
    (found.loss * 1.3).backward()
    return (*(part.detach() for part in found), z.grad)


@pytest.fixture
def kernel():
    if reason := why_not(DEVICE, torch.device(DEVICE), torch.float32):
        pytest.skip(reason)
    return DEVICE


def test_by_hand():
    """One token, three words, the teacher's best alone: two buckets."""
    z = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    q = z.softmax(1)[0]
    lse = torch.tensor([0.7]).double()  # of a teacher whose best logit, 0.4, has this share:
    p = (torch.tensor(0.4).double() - 0.7).exp()
    expected = p * (p / q[1]).log() + (1 - p) * ((1 - p) / (q[0] + q[2])).log()
    found = topk_kd_loss(z, torch.tensor([[0.4]]).double(), torch.tensor([[1]]), lse,
                         torch.tensor([0]))  # fmt: skip
    assert found.kd.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.ce.item() == pytest.approx(-q[0].log().item(), rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_are_the_whole_loss(divergence):
    for T, cap in itertools.product((0.7, 1.0, 2.0), (None, 5.0)):
        z, t, _, _, _, labels = make(6, 40, 1)
        z.requires_grad_()
        capped = t if cap is None else cap * torch.tanh(t / cap)
        values, ids = capped.topk(40, dim=1)
        options = {"temperature": T, "divergence": divergence, "softcap": cap}
        whole = kd_loss(z, t, labels, **options)
        found = topk_kd_loss(z, values, ids, (capped / T).logsumexp(1), labels, **options)
        torch.testing.assert_close(found.kd, whole.kd)
        grads = [torch.autograd.grad(each.loss, z)[0] for each in (found, whole)]
        torch.testing.assert_close(*grads)


def test_gradient():
    z, _, *top, labels = make(4, 12, 3, T=2.0)
    for divergence in DIVERGENCES:

        def loss(z, divergence=divergence):
            return topk_kd_loss(z, *top, labels, temperature=2.0, divergence=divergence).loss

        torch.autograd.gradcheck(loss, z.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kernel_matches_float64(divergence, dtype, kernel):
    for T, cap, (V, K) in itertools.product((1.0, 0.7, 4.0), (None, 5.0), ((2500, 64), (777, 5))):
        z, _, *top, labels = make(7, V, K, T, dtype)
        options = {"temperature": T, "softcap": cap, "divergence": divergence, "kd_weight": 0.7}
        single = [each.float() if each.is_floating_point() else each for each in top]
        exact = run(z.double(), [single[0].double(), single[1], single[2].double()], labels,
                    "reference", **options)  # fmt: skip
        plain = run(z, single, labels, "reference", **options)
        found = run(z, single, labels, kernel, **options)
        for a, e, p in zip(found, exact, plain, strict=True):
            eps = 1e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
            least = eps * e.abs().max().item()
            assert (a - e).abs().max() <= max(2 * (p - e).abs().max().item(), least)


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(0, 5),
    V=st.integers(1, 70),
    K=st.integers(1, 70),
    T=st.floats(0.1, 20),
    divergence=st.sampled_from(DIVERGENCES),
    every_second=st.booleans(),
)
def test_any_shape(N, V, K, T, divergence, every_second):
    z, _, *top, labels = make(N, V, min(K, V), T, torch.float32)
    if every_second:
        z = z.repeat_interleave(2, dim=1)[:, ::2]
    single = [each.float() if each.is_floating_point() else each for each in top]
    options = {"temperature": T, "divergence": divergence}
    inside = (top[0] / T - top[2][:, None]).exp().sum(dim=1)
    # the logarithm of a small tail is that of rounding; the reverse form weighs it by the student's
    assume(divergence == "forward_kl" or K >= V or bool((inside < 0.99).all()))
    expected = run(z.double(), single, labels, "reference", **options)
    for a, e in zip(run(z, single, labels, "auto", **options), expected, strict=True):
        slack = 1e-5 * max(1.0, T * T / 10)  # the tail is what rounding leaves of 1
        assert torch.allclose(a.double(), e.double(), rtol=1e-4, atol=slack)


def test_extreme_logits(kernel):
    z, _, *top, labels = make(6, 300, 8, dtype=torch.float32)
    single = [each.float() if each.is_floating_point() else each for each in top]
    for size in (1e4, 1e-3):
        found = run(z * size, single, labels, kernel)
        exact = run((z * size).double(), single, labels, "reference")
        for a, e in zip(found, exact, strict=True):
            assert torch.allclose(a.double(), e.double(), rtol=1e-5, atol=1e-5)
    z[:, 5], labels[labels == 5] = -torch.inf, 6  # a token that is masked
    assert all(x.isfinite().all() for x in run(z, single, labels, kernel, divergence="jsd"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_without_a_tail_asks_nothing_without_bound(divergence):
    """All its mass in the top K, to rounding; a tenth of the student's outside."""
    z = torch.tensor([[2.2, 0.0, 0.0]]).requires_grad_()
    top = (torch.tensor([[30.0]]), torch.tensor([[0]]), torch.tensor([30.0]))
    found = topk_kd_loss(z, *top, torch.tensor([0]), divergence=divergence)
    assert 0 < found.kd < 3
    assert torch.autograd.grad(found.loss, z)[0].abs().max() < 3


def test_a_token_that_the_student_lacks_counts_to_the_tail():
    z, _, values, ids, lse, labels = make(5, 30, 4)
    outside = ids.clone()
    outside[:, 2] = 1000
    found = topk_kd_loss(z, values, outside, lse, labels)
    kept = [0, 1, 3]
    expected = topk_kd_loss(z, values[:, kept], ids[:, kept], lse, labels)
    assert torch.allclose(found.kd, expected.kd)


def test_wrong_rows_give_nan_alone(kernel):
    z, _, *top, labels = make(5, 40, 4, dtype=torch.float32)
    labels[:] = 3
    labels[1] = 40
    z[2, 7] = torch.nan
    z[3] = -torch.inf
    top = [each.float() if each.is_floating_point() else each for each in top]
    for row, wrong in enumerate([False, True, True, True, False]):
        one = slice(row, row + 1)
        found = topk_kd_loss(z[one], *(t[one] for t in top), labels[one], impl=kernel)
        assert bool(found.loss.isnan()) == wrong


def linear(rows=23, seed=1):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, generator=g).to(DEVICE) for s in ((rows, 16), (90, 16)))
    _, _, values, ids, lse, labels = make(rows, 90, 6, T=2.0, seed=seed)
    return hidden, weight, values.float(), ids, lse.float(), labels


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", ["reference", DEVICE])
@pytest.mark.parametrize("workspace", [1, 2000, "auto"])
def test_linear_equals_logits(divergence, impl, workspace):
    hidden, weight, *top, labels = linear()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    options = {"temperature": 2.0, "divergence": divergence, "weight": torch.rand(23).to(DEVICE)}
    expected = topk_kd_loss(hidden @ weight.T, *top, labels, impl="reference", **options)
    found = linear_topk_kd_loss(
        hidden, weight, *top, labels, impl=impl, workspace=workspace, **options
    )
    grads = [torch.autograd.grad(each.loss, leaves) for each in (found, expected)]
    for a, e in zip([*found, *grads[0]], [*expected, *grads[1]], strict=True):
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


@pytest.mark.parametrize("impl", ["reference", DEVICE])
def test_rows_that_pad_the_head_take_no_part(impl):
    hidden, weight, *top, labels = linear()
    labels %= 80
    weight.requires_grad_()
    found = linear_topk_kd_loss(hidden, weight, *top, labels, impl=impl, vocab_size=80)
    expected = linear_topk_kd_loss(hidden, weight[:80], *top, labels, impl=impl)
    torch.testing.assert_close(found.loss, expected.loss)
    grads = [torch.autograd.grad(each.loss, weight)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads)
    assert not grads[0][80:].any()


@settings(deadline=None, max_examples=15)
@given(cut=st.integers(0, 23), seed=st.integers(0, 9))
def test_any_split_and_order_gives_the_same(cut, seed):
    hidden, weight, *top, labels = linear(seed=seed)
    weight.requires_grad_()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    def part(rows):
        each = [t[rows] for t in (*top, labels)]
        return linear_topk_kd_loss(hidden[rows], weight, *each, num_items=17, temperature=2.0).loss

    whole = part(torch.arange(23, device=DEVICE))
    split = part(order[:cut]) + part(order[cut:])
    assert torch.allclose(split, whole, rtol=1e-5)
    a, b = (torch.autograd.grad(loss, weight)[0] for loss in (split, whole))
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(kernel):
    z, _, _, ids, _, labels = make(3, 40, 4, dtype=torch.float32)
    options = (2.0, -100, 0.0, kernel)
    ids = ids.sort(dim=1).values
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for sample in (z, z.clone().requires_grad_()):
        torch.library.opcheck(
            torch.ops.clinkd.topk_rows.default, (sample, ids, labels, *options), test_utils=checks
        )


@pytest.mark.slow
def test_compiles_whole(kernel):
    z, _, *top, labels = make(5, 60, 4, dtype=torch.float32)
    z.requires_grad_()

    def step(z):
        return topk_kd_loss(z * 2, *top, labels, impl=kernel).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(z), z)[0]
    assert torch.allclose(torch.autograd.grad(compiled(z), z)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({1: torch.zeros(23, 5)}, ValueError, "teacher_ids must have teacher_logits' shape"),
        ({2: torch.zeros(23, 6)}, TypeError, "teacher_ids must be int32 or int64"),
        ({3: torch.zeros(22)}, ValueError, r"teacher_lse must be \[N\] = \[23\]"),
        ({1: torch.zeros(22, 6)}, ValueError, "teacher_logits must be .* with N = 23"),
        ({0: torch.zeros(90, 15)}, ValueError, r"student_weight must be \[V, C\] with C = 16"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    hidden, *arguments = linear()
    for place, value in change.items():
        arguments[place] = value.to(DEVICE)
    with pytest.raises(error, match=message):
        linear_topk_kd_loss(hidden, *arguments)


def test_a_workspace_of_nothing_is_refused():
    with pytest.raises(ValueError, match="workspace must be above 0"):
        linear_topk_kd_loss(*linear(), workspace=0)


@pytest.mark.parametrize("divergence", ["jsd", "skew_kl"])
def test_a_probability_below_the_normal_numbers(kernel, divergence):
    """Where p is 0 and a share of q rounds to 0, so does the gradient."""
    teacher = torch.tensor([[150.0, 20.0, 149.0, 148.0]], device=DEVICE)
    values, ids = teacher.topk(4)
    top = (values, ids, teacher.logsumexp(1))
    head, labels = torch.eye(4, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for gap in torch.arange(101.5, 104.5, 0.05).tolist():
        hidden = torch.tensor([[0.0, -gap, -1.0, -2.0]], device=DEVICE)
        found = []
        for impl in (kernel, "reference"):
            leaf = hidden.clone().requires_grad_()
            loss = linear_topk_kd_loss(
                leaf, head, *top, labels, divergence=divergence, skew=0.6, impl=impl
            ).loss
            found.append(torch.autograd.grad(loss, leaf)[0])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("K", "size"), [(5, 3.0), (40, 3.0), (40, 60.0), (5, 60.0)])
def test_hidden_states_have_the_gradient_of_the_definition(kernel, divergence, K, size):
    """Written out there; here by autograd, in float64."""
    z, _, *top, labels = make(9, 40, K, T=2.0, size=size)
    options = {"temperature": 2.0, "divergence": divergence, "beta": 0.3, "skew": 0.4}
    head = torch.eye(40, device=DEVICE)
    top = (top[0].float(), top[1], top[2].float())
    results = []
    for impl, dtype in (
        (kernel, torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        leaf = z.to(dtype).requires_grad_()
        given = (head.to(dtype), top[0].to(dtype), top[1], top[2].to(dtype), labels)
        loss = linear_topk_kd_loss(leaf, *given, impl=impl, **options).loss
        results.append(torch.autograd.grad(loss, leaf)[0].double())
    ours, plain, exact = results
    least = 1e-5 * exact.abs().max()
    assert (ours - exact).abs().max() <= max(least, 2 * (plain - exact).abs().max())
