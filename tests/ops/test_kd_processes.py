"""The distillation loss over two processes: data parallel, and the vocabulary cut in two."""

import itertools
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from clinkd.ops import kd_loss, linear_kd_loss
from clinkd.ops.kd_loss import why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES

RANKS = 2
N, V, C = 11, 64, 16


def make(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((N, C), (V, C), (N, C), (V, C))
    hidden, weight, teacher, head = (torch.randn(*shape, generator=g) for shape in shapes)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, head, labels


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-3)


def options():
    for divergence, T, cap in itertools.product(DIVERGENCES, (1.0, 2.0, 0.7), (None, 4.0)):
        yield {"divergence": divergence, "temperature": T, "softcap": cap, "kd_weight": 0.7}


def over_the_vocabulary(rank):
    """Each process has half of the columns; the loss is the whole one, the gradient its half."""
    group = dist.group.WORLD
    columns = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    for settings in options():
        hidden, weight, teacher, head, labels = make()
        z, t = (hidden @ weight.T).detach().requires_grad_(), teacher @ head.T
        whole = kd_loss(z, t, labels, **settings)
        part = kd_loss(z[:, columns], t[:, columns], labels, process_group=group, **settings)
        for found, expected in zip(part, whole, strict=True):
            close(found.detach(), expected.detach())
        expected = torch.autograd.grad(whole.loss, z)[0]
        found = torch.autograd.grad(part.loss, z)[0]
        close(found[:, columns], expected[:, columns])

        parts = (weight.detach()[columns].requires_grad_(), head[columns])
        for workspace in ("auto", 700):
            arguments = (hidden, parts[0], teacher, parts[1], labels)
            found = linear_kd_loss(
                *arguments, workspace=workspace, process_group=group, **settings
            ).loss
            expected = linear_kd_loss(hidden, weight, teacher, head, labels, **settings).loss
            close(found.detach(), expected.detach())
            of_hidden, of_weight = torch.autograd.grad(found, (hidden, parts[0]))
            expected = torch.autograd.grad(expected, (hidden, weight))
            close(of_hidden, expected[0])
            close(of_weight, expected[1][columns])


def ignored_masked_and_wrong(rank):
    group = dist.group.WORLD
    columns = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    hidden, weight, teacher, head, labels = make()
    z, t = (hidden @ weight.T).detach().requires_grad_(), teacher @ head.T

    nothing = kd_loss(z[:, columns], t[:, columns], labels.clamp(max=-100), process_group=group)
    assert nothing.loss.item() == 0
    assert torch.autograd.grad(nothing.loss, z)[0].abs().max() == 0

    # the second process has padding alone
    padded = torch.where(torch.arange(V) < V // RANKS, z.detach(), -torch.inf).requires_grad_()
    masked = torch.where(torch.arange(V) < V // RANKS, t, -torch.inf)
    few = torch.where(labels >= V // RANKS, 3, labels)
    whole = kd_loss(padded, masked, few)
    found = kd_loss(padded[:, columns], masked[:, columns], few, process_group=group)
    close(found.loss.detach(), whole.loss.detach())
    gradient = torch.autograd.grad(found.loss, padded)[0][:, columns]
    close(gradient, torch.autograd.grad(whole.loss, padded)[0][:, columns])

    wrong = labels.clone()
    wrong[1] = V
    assert kd_loss(z[:, columns], t[:, columns], wrong, process_group=group).loss.isnan()
    uneven = slice(0, 40) if rank == 0 else slice(40, V)
    assert kd_loss(z[:, uneven], t[:, uneven], labels, process_group=group).loss.isnan()
    with pytest.raises(RuntimeError, match="process_group needs impl='cpu' or 'cuda'"):
        kd_loss(z.double(), t.double(), labels, process_group=group)
    with pytest.raises(ValueError, match="as many columns of the teacher as of the student"):
        kd_loss(z[:, columns], t[:, :9], labels, process_group=group)
    arguments = (hidden, weight[uneven], teacher, head[uneven], labels)
    for workspace in ("auto", 700):  # the latter makes other numbers of chunks: none may wait
        with pytest.raises(ValueError, match="as many rows of the heads, got from 24 to 40"):
            linear_kd_loss(*arguments, process_group=group, workspace=workspace)


def a_vocabulary_that_does_not_divide(rank):
    """Padded as the error says: rows of zeros whose bias is -inf."""
    group = dist.group.WORLD
    hidden, weight, teacher, head, labels = make()
    few = V - 13
    labels = labels.clamp(max=few - 1)
    columns = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    bias = torch.where(torch.arange(V) < few, 0.0, -torch.inf)
    for divergence, workspace in itertools.product(DIVERGENCES, ("auto", 700)):
        settings = {"divergence": divergence, "temperature": 2.0}
        whole = linear_kd_loss(hidden, weight[:few], teacher, head[:few], labels, **settings).loss
        mine = weight.detach()[columns].requires_grad_()
        found = linear_kd_loss(
            hidden, mine, teacher, head[columns], labels, student_bias=bias[columns],
            teacher_bias=bias[columns], workspace=workspace, process_group=group, **settings,
        ).loss  # fmt: skip
        close(found.detach(), whole.detach())
        expected = torch.autograd.grad(whole, (hidden, weight))
        grads = torch.autograd.grad(found, (hidden, mine))
        close(grads[0], expected[0])
        close(grads[1], expected[1][columns])


def in_a_graph(rank):
    """Its sums over the processes within operators."""
    group = dist.group.WORLD
    columns = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    hidden, weight, teacher, head, labels = make()
    mine = weight.detach()[columns].requires_grad_()
    z = (hidden @ weight.T).detach()[:, columns].requires_grad_()

    def of_logits(z, t, labels):
        return kd_loss(z, t, labels, process_group=group, temperature=2.0).loss

    def of_hidden(hidden, mine, teacher, head, labels):
        return linear_kd_loss(
            hidden, mine, teacher, head, labels, process_group=group, temperature=2.0, workspace=700
        ).loss

    for loss, leaves, others in (
        (of_logits, (z,), ((teacher @ head.T)[:, columns], labels)),
        (of_hidden, (hidden, mine), (teacher, head[columns], labels)),
    ):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*leaves, *others), loss(*leaves, *others)
        close(found.detach(), expected.detach())
        grads = (torch.autograd.grad(each, leaves) for each in (found, expected))
        for actual, right in zip(*grads, strict=True):
            close(actual, right)


def over_the_rows(rank):
    """Data parallel: each process has half of the rows, and one token count for both."""
    for settings, workspace in itertools.product(options(), ("auto", 700)):
        hidden, weight, teacher, head, labels = make()
        mine = slice(0, 4) if rank == 0 else slice(4, N)
        count = (labels[mine] != -100).sum().float()
        dist.all_reduce(count)
        loss = linear_kd_loss(
            hidden[mine], weight, teacher[mine], head, labels[mine], num_items=count,
            workspace=workspace, **settings,
        ).loss  # fmt: skip
        grad = torch.autograd.grad(loss, weight)[0]
        total = loss.detach().clone()
        dist.all_reduce(total)
        dist.all_reduce(grad)
        whole = linear_kd_loss(hidden, weight, teacher, head, labels, **settings).loss
        close(total, whole.detach())
        close(grad, torch.autograd.grad(whole, weight)[0])


CHECKS = (
    over_the_vocabulary,
    ignored_masked_and_wrong,
    a_vocabulary_that_does_not_divide,
    in_a_graph,
    over_the_rows,
)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    for check in CHECKS:
        try:
            check(rank)
        except BaseException:
            (folder / f"{check.__name__}-{rank}").write_text(traceback.format_exc())
            raise
        (folder / f"{check.__name__}-{rank}").write_text("")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    if reason := why_not("cpu", torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    context = mp.start_processes(work, (tmp_path,), RANKS, join=False, start_method="spawn")
    failed = None
    try:
        while not context.join(timeout=120):
            pass
    except Exception as error:
        failed = error
    for check, rank in itertools.product(CHECKS, range(RANKS)):
        path = tmp_path / f"{check.__name__}-{rank}"
        assert path.exists(), f"{path.name} was not reached: {failed}"
        assert path.read_text() == ""
