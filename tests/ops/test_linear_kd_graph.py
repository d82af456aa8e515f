"""`linear_kd_loss` in a graph: one operator, the same numbers."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from clinkd.ops import _linear_kd_chunks, linear_kd_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW = (101 + 103) * 4  # bytes of both models' float32 logits


@pytest.fixture(autouse=True)
def no_graphs():
    """One function has so many graphs at most."""
    torch._dynamo.reset()


def make(rows=40, dtype=torch.float32, labelled=True):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    labels = torch.randint(0, 101, (rows,), generator=g)
    labels[:: 3 if labelled else 1] = -100
    leaves = [draw(rows, 16), draw(101, 16), draw(101)]
    return [t.requires_grad_() for t in leaves], (draw(rows, 24), draw(103, 24)), labels.to(DEVICE)


def step(hidden, head, bias, teacher_hidden, teacher_head, labels, **options):
    return linear_kd_loss(
        hidden, head, teacher_hidden, teacher_head, labels, student_bias=bias, temperature=2.0,
        workspace=10 * ROW, **options,
    )  # fmt: skip


def assert_same(run, leaves, *others):
    """Values, and gradients of a third of the loss."""
    results = []
    for call in (step, run):
        found = call(*leaves, *others)
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        results.append((*found, *torch.autograd.grad(found[0] / 3, needed)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_whole_graph(dtype):
    leaves, teacher, labels = make(dtype=dtype)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(compiled, leaves, *teacher, labels)
    leaves[1].requires_grad_(False)  # a head that is frozen
    assert_same(compiled, leaves, *teacher, labels)
    with torch.no_grad():
        expected = step(*leaves, *teacher, labels).loss
        assert torch.equal(compiled(*leaves, *teacher, labels).loss, expected)


@pytest.mark.parametrize("narrow", [False, True])
def test_autocast(narrow):
    """Hidden states of a model under autocast, and a head in float32."""
    leaves, teacher, labels = make()
    if narrow:
        leaves[0] = leaves[0].detach().bfloat16().requires_grad_()
        teacher = (teacher[0].bfloat16(), teacher[1])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        expected = step(*leaves, *teacher, labels)
        found = compiled(*leaves, *teacher, labels)
    for loss in (expected, found):
        loss.loss.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype


def test_modes_that_watch_see_the_products():
    leaves, teacher, labels = make()
    with FlopCounterMode(display=False) as counter:
        loss = step(*leaves, *teacher, labels).loss
        (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    assert counter.get_total_flops() > 0
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_any_number_of_rows():
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 23, 61):
        leaves, teacher, labels = make(rows)
        assert_same(compiled, leaves, *teacher, labels)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl"])
def test_options(divergence):
    leaves, teacher, labels = make()
    options = {
        "divergence": divergence, "beta": 0.3, "skew": 0.2, "softcap": 5.0, "kd_weight": 0.7,
        "vocab_size": 97, "num_items": 50, "weight": torch.rand(40, device=DEVICE),
    }  # fmt: skip
    labels = labels.clamp(max=96)
    found = {}
    for backend in ("eager", "aot_eager"):
        run = torch.compile(step, fullgraph=True, backend=backend) if backend != "eager" else step
        loss = run(*leaves, *teacher, labels, **options)
        found[backend] = (*loss, *torch.autograd.grad(loss.loss, leaves))
    for expected, actual in zip(*found.values(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_labels():
    leaves, teacher, labels = make(labelled=False)
    assert (labels == -100).all()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, *teacher, labels).loss
    assert loss == 0
    for grad in torch.autograd.grad(loss, leaves):
        assert not grad.any()


def test_a_traced_graph():
    leaves, teacher, labels = make()
    leaves = [leaf.detach() for leaf in leaves]
    graph = make_fx(lambda *given: tuple(step(*given)))(*leaves, *teacher, labels)
    other = [2 * leaf for leaf in leaves]
    for actual, expected in zip(
        graph(*other, *teacher, labels), step(*other, *teacher, labels), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("learns", [[True, True, True], [True, False, False], [False] * 3], ids=str)
def test_the_operator_follows_the_rules(learns):
    leaves, teacher, labels = make(12)
    leaves = [
        leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves, learns, strict=True)
    ]
    factor = torch.rand(12, device=DEVICE)
    options = (0.5, 2.0, 0, 0.1, -100, 0.0, 5, 101, learns, DEVICE)
    arguments = (*leaves, *teacher, None, labels, factor, *options)
    torch.library.opcheck(_linear_kd_chunks.LINEAR_KD._registered, arguments)
