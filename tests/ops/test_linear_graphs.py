"""Losses of hidden states in a graph: one operator, the same numbers."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from clinkd.ops import linear_kd_loss, linear_topk_kd_loss
from clinkd.ops._impl import why_not_triton
from clinkd.ops._linear_kd_chunks import LINEAR_KD
from clinkd.ops._linear_kd_triton import LINEAR_KD_TILES
from clinkd.ops._linear_topk_chunks import LINEAR_TOPK_KD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW = (101 + 103) * 4  # bytes of both models' float32 logits
needs_triton = pytest.mark.skipif(
    bool(why_not_triton(torch.device(DEVICE), torch.float32)),
    reason=str(why_not_triton(torch.device(DEVICE), torch.float32)),
)


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


def chunks(hidden, head, bias, teacher_hidden, teacher_head, labels, **options):
    return linear_kd_loss(
        hidden, head, teacher_hidden, teacher_head, labels, student_bias=bias, temperature=2.0,
        **{"workspace": 10 * ROW, **options},
    )  # fmt: skip


def tiles(*given, **options):
    return chunks(*given, workspace=0, **options)


def top(hidden, head, bias, teacher_hidden, teacher_head, labels, **options):
    logits = (teacher_hidden @ teacher_head.T).float() / 4
    values, ids = logits.topk(5)
    return linear_topk_kd_loss(
        hidden, head, values, ids, (logits / 2).logsumexp(1), labels, student_bias=bias,
        temperature=2.0, workspace=5 * ROW, **options,
    )  # fmt: skip


FORMS = [chunks, top, pytest.param(tiles, marks=needs_triton)]
every_form = pytest.mark.parametrize("step", FORMS)


def assert_same(step, run, leaves, *others, **options):
    """Values, and gradients of a third of the loss."""
    results = []
    for call in (step, run):
        found = call(*leaves, *others, **options)
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        results.append((*found, *torch.autograd.grad(found[0] / 3, needed)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_whole_graph(step, dtype):
    leaves, teacher, labels = make(dtype=dtype)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(step, compiled, leaves, *teacher, labels)
    leaves[1].requires_grad_(False)  # a head that is frozen
    assert_same(step, compiled, leaves, *teacher, labels)
    with torch.no_grad():
        expected = step(*leaves, *teacher, labels).loss
        assert torch.equal(compiled(*leaves, *teacher, labels).loss, expected)


@pytest.mark.parametrize("step", [chunks, top])
@pytest.mark.parametrize("narrow", [False, True])
def test_autocast(step, narrow):
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


@every_form
def test_modes_that_watch(step):
    leaves, teacher, labels = make()
    with FlopCounterMode(display=False) as counter:
        loss = step(*leaves, *teacher, labels).loss
        (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    assert counter.get_total_flops() > 0 or step is tiles  # whose products are its kernels'
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@every_form
def test_any_number_of_rows(step):
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 23, 61):
        leaves, teacher, labels = make(rows)
        assert_same(step, compiled, leaves, *teacher, labels)


@every_form
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl"])
def test_options(step, divergence):
    leaves, teacher, labels = make()
    options = {
        "divergence": divergence, "beta": 0.3, "skew": 0.2, "softcap": 5.0, "kd_weight": 0.7,
        "vocab_size": 97, "num_items": 50, "weight": torch.rand(40, device=DEVICE),
    }  # fmt: skip
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(step, compiled, leaves, *teacher, labels.clamp(max=96), **options)


@every_form
def test_no_labels(step):
    leaves, teacher, labels = make(labelled=False)
    assert (labels == -100).all()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, *teacher, labels).loss
    assert loss == 0
    for grad in torch.autograd.grad(loss, leaves):
        assert not grad.any()


@every_form
def test_a_traced_graph(step):
    leaves, teacher, labels = make()
    leaves = [leaf.detach() for leaf in leaves]
    graph = make_fx(lambda *given: tuple(step(*given)))(*leaves, *teacher, labels)
    other = [2 * leaf for leaf in leaves]
    for actual, expected in zip(
        graph(*other, *teacher, labels), step(*other, *teacher, labels), strict=True
    ):
        torch.testing.assert_close(actual, expected)


LEARNS = [[True, True, True], [True, False, False], [False] * 3]
ignore_grad = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


def learning(learns, dtype=torch.float32):
    """Student, teacher with a bias that is none, labels, and what each row is multiplied by."""
    leaves, teacher, labels = make(12, dtype)
    leaves = [
        leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves, learns, strict=True)
    ]
    return leaves, (*teacher, None), labels, torch.rand(12, device=DEVICE)


@ignore_grad
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("learns", LEARNS, ids=str)
def test_the_operator_follows_the_rules(learns, dtype):
    leaves, teacher, labels, factor = learning(learns, dtype)
    sizes = (0.5, -100, 5, 101, "")
    options = (2.0, 0, 0.1, 0.0, DEVICE)
    arguments = (*leaves, learns, labels, factor, *sizes, *teacher, *options)
    torch.library.opcheck(LINEAR_KD.operator._registered, arguments)


@ignore_grad
@pytest.mark.parametrize("labelled", ["all", "some"])
def test_gradients_lie_as_their_tensors(labelled):
    """As autograd wants them, and as the operator says in a graph."""
    learns = [True] * 3
    leaves, teacher, labels, factor = learning(learns)
    if labelled == "all":
        labels = labels.clamp(min=0)
    leaves[:2] = [leaf.detach().T.contiguous().T.requires_grad_() for leaf in leaves[:2]]
    arguments = (*leaves, learns, labels, factor, 0.5, -100, 5, 101, "")
    arguments = (*arguments, *teacher, 2.0, 0, 0.1, 0.0, DEVICE)
    gradients = LINEAR_KD.operator(*arguments)[2:]
    assert [g.stride() for g in gradients] == [leaf.stride() for leaf in leaves]
    torch.library.opcheck(LINEAR_KD.operator._registered, arguments)


@ignore_grad
@pytest.mark.parametrize("learns", LEARNS, ids=str)
def test_the_operator_of_a_file_follows_the_rules(learns):
    leaves, (hidden, head, _), labels, factor = learning(learns)
    logits = hidden @ head.T
    values, ids = logits.topk(5)
    sizes = (0.5, -100, 5, 101, "")
    options = (values, ids, logits.logsumexp(1), 1.0, "jsd", 0.4, 0.0, 101, DEVICE)
    arguments = (*leaves, learns, labels, factor, *sizes, *options)
    torch.library.opcheck(LINEAR_TOPK_KD.operator._registered, arguments)


@ignore_grad
@needs_triton
@pytest.mark.parametrize("learns", LEARNS, ids=str)
def test_the_operator_without_logits_follows_the_rules(learns):
    leaves, teacher, labels, factor = learning(learns)
    options = (0.5, -100, 2.0, 0, 0.1, 0.0, 101)
    arguments = (*leaves, *teacher, labels, factor, *options)
    torch.library.opcheck(LINEAR_KD_TILES._registered, arguments)
