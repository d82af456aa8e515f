"""`kd_loss(inplace=True)`: the gradient in the place of the logits."""

import pytest
import torch

from clinkd.ops import kd_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(dtype, rows=7, student=700, teacher=650):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=g).to(DEVICE, dtype).requires_grad_()
    head = torch.randn(student, 16, generator=g).to(DEVICE, dtype)
    target = torch.randn(rows, teacher, generator=g).to(DEVICE, dtype)
    labels = torch.randint(0, teacher, (rows,), generator=g)
    labels[2] = -100
    return hidden, head, target, labels.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_same_without_memory_of_its_own(dtype, divergence):
    """float32 and bfloat16 make the gradient in the forward pass on the CPU, float16 does not."""
    hidden, head, target, labels = make(dtype)
    results = []
    for inplace in (False, True):
        logits = hidden @ head.T
        places = []
        logits.register_hook(lambda grad, places=places: places.append(grad.data_ptr()))
        found = kd_loss(
            logits, target, labels, temperature=2.0, divergence=divergence, inplace=inplace
        )
        place = logits.data_ptr()
        (grad,) = torch.autograd.grad(found.loss, hidden)
        assert (places == [place]) is inplace
        results.append((found.loss.detach(), found.ce, found.kd, grad))
    for plain, written_over in zip(*results, strict=True):
        assert torch.equal(plain, written_over)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lie", ["in columns", "apart", "all the same"])
def test_a_teacher_whose_columns_lie_apart(dtype, lie):
    hidden, head, target, labels = make(dtype)
    if lie == "in columns":
        teacher = target.T.contiguous().T
    elif lie == "apart":
        teacher = torch.stack([target, target + 9], dim=2).flatten(1)[:, ::2]
    else:
        teacher = target[:, :1].expand_as(target)
    grads = []
    for inplace in (False, True):
        leaf = hidden.detach().requires_grad_()
        found = kd_loss(leaf @ head.T, teacher, labels, temperature=2.0, inplace=inplace)
        grads += torch.autograd.grad(found.loss, leaf)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_views_of_logits(dtype):
    """As a causal model gives them: [1, N + 1, V], the last of which has no next token."""
    hidden, head, target, labels = make(dtype)
    grads = []
    for inplace in (False, True):
        model = hidden.detach().requires_grad_()
        logits = torch.cat([model, model[:1]])[None] @ head.T
        shifted = logits[:, :-1].flatten(0, 1)
        kd_loss(shifted, target, labels, inplace=inplace).loss.backward()
        grads.append(model.grad)
        assert torch.equal(logits[0, :-1], shifted)  # a view still
    assert torch.equal(*grads)


def test_without_a_gradient_nothing_is_written():
    hidden, head, target, labels = make(torch.float32)
    logits = (hidden @ head.T).detach()
    before = logits.clone()
    kd_loss(logits, target, labels, inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_graph_that_needs_the_logits_does_not_run(dtype):
    hidden, head, target, labels = make(dtype)
    logits = torch.tanh(hidden @ head.T)  # keeps its result for its gradient
    loss = kd_loss(logits, target, labels, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_pass_is_refused_where_the_logits_are_gone():
    hidden, head, target, labels = make(torch.float16)
    loss = kd_loss(hidden @ head.T, target, labels, inplace=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x.detach().requires_grad_(), {}, "where student_logits are a leaf"),
        (lambda x: x.bfloat16(), {}, "are not torch.float32, the wider type of both"),
        (lambda x: x.T.contiguous().T, {}, "columns of student_logits do not lie side by side"),
        (lambda x: x[:1].expand(7, -1), {}, "rows share memory"),
        (lambda x: x, {"impl": "reference"}, "with impl='reference', a process_group or a weight"),
        (
            lambda x: x,
            {"weight": torch.ones(7, device=DEVICE, requires_grad=True)},
            "with impl='reference', a process_group or a weight that needs a gradient",
        ),
    ],
)
def test_errors(change, options, message):
    hidden, head, target, labels = make(torch.float32)
    with pytest.raises(ValueError, match=f"inplace must be False .*{message}"):
        kd_loss(change(hidden @ head.T), target, labels, inplace=True, **options)
