"""A loss of hidden states through an output head, by row chunks; in graphs it is one operator.

A graph cannot hold a number of rows that its tensors decide. There an operator chooses the rows
that count, and makes the gradients too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinkd.ops._kd_mean import KDLoss, divided, has_gradient
from clinkd.ops._operator import Operator, first_order, is_traced
from clinkd.ops._row_chunks import RowChunks, Score, product_dtype, row_chunks, shares

Model = tuple[Tensor, Tensor, Tensor | None]  # hidden states [N, C], head [V, C], bias [V]


def counted_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """The numbers of the rows that count; the host waits for how many they are."""
    return (labels != ignore_index).nonzero().squeeze(1)


def of_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Those rows; where all stay, no copy."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


class LinearLoss:
    """The loss as a function, eager or in a graph.

    Args:
        name: of the operator.
        schema: the arguments that `score` takes as the operator's, by position.
        score: (numbers of the rows that count, their labels, what each is multiplied by, kd_weight,
            ignore_index, group, *others) -> `Score`. The others come with all rows, as given.
        layer: how many of the others, the first, are what a linear layer takes.
    """

    def __init__(self, name: str, schema: str, score: Callable[..., Score], layer: int = 0) -> None:
        self._score, self._layer = score, layer
        self.operator = Operator(
            name,
            "(Tensor hidden, Tensor head, Tensor? bias, bool[] learns, Tensor labels, "
            "Tensor factor, float kd_weight, int ignore_index, int chunk_rows, int vocab_size, "
            f"str group, {schema}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
            self._run,
            _fake,
            _save,
            _backward,
        )

    def __call__(
        self,
        student: Model,
        labels: Tensor,
        weight: Tensor | None,
        count: Tensor | int,
        kd_weight: float,
        ignore_index: int,
        chunk_rows: int,
        vocab_size: int,
        group: str,
        *others: Any,
        graph: bool = True,
    ) -> KDLoss:
        """Sums over rows, divided by `count`.

        Args:
            student: gets the gradients.
            labels: [N].
            weight: [N] factor of each row, or None.
            count: what the sums are divided by.
            kd_weight: a in (CE + a KD) / (1 + a).
            ignore_index: the label of rows that do not count.
            chunk_rows: whose logits exist at a time.
            vocab_size: rows of the head that stand for tokens.
            group: name of the process group over which the head is cut; "" for none.
            others: of the score.
            graph: whether a graph that is made gets the operator.
        """
        factor, count = shares(weight, labels, count, product_dtype(student[0]))
        given = [other for other in others if isinstance(other, Tensor)]
        sizes = (chunk_rows, vocab_size, group)
        if graph and is_traced(*student, labels, weight, *given):
            # which does not see the operator's own products
            student = _under_autocast(*student)
            others = (*_under_autocast(*others[: self._layer]), *others[self._layer :])
            learns = [has_gradient(tensor) for tensor in student]
            settings = (kd_weight, ignore_index, *sizes)
            loss, parts, *_ = self.operator(*student, learns, labels, factor, *settings, *others)
        else:
            rows = counted_rows(labels, ignore_index)
            hidden, head, bias = student
            settings = (kd_weight, ignore_index, group, *others)
            score = self._score_of(rows, labels, factor, *settings)
            learning = torch.is_grad_enabled()
            loss, parts = RowChunks.apply(
                of_rows(hidden, rows), head, bias, score, kd_weight, *sizes, learning
            )
        return divided(loss, parts, count)

    def _score_of(self, rows: Tensor, labels: Tensor, factor: Tensor, *settings: Any) -> Score:
        return self._score(rows, of_rows(labels, rows), of_rows(factor, rows), *settings)

    def _run(
        self,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        learns: list[bool],
        labels: Tensor,
        factor: Tensor,
        kd_weight: float,
        ignore_index: int,
        chunk_rows: int,
        vocab_size: int,
        group: str,
        *others: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss, sums of CE and KD [2], and the loss's gradients by hidden, head and bias.

        A gradient that nobody asks for has no elements.
        """
        rows = counted_rows(labels, ignore_index)
        settings = (kd_weight, ignore_index, group, *others)
        score = self._score_of(rows, labels, factor, *settings)
        student = (of_rows(hidden, rows), head, bias)
        loss, parts, (of_hidden, *rest) = row_chunks(
            student, learns, score, kd_weight, chunk_rows, vocab_size, group
        )
        if of_hidden is not None and len(rows) < len(hidden):
            of_hidden = torch.zeros_like(hidden).index_copy_(0, rows, of_hidden)
        none = hidden.new_empty(0)
        grads = [none.clone() if grad is None else grad for grad in (of_hidden, *rest)]
        return loss, parts, grads[0], grads[1], grads[2]


def reference_chunk(
    rows: Callable[[Tensor], tuple[Tensor, Tensor]],
    logits: Tensor,
    factor: Tensor,
    kd_weight: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """What a `Score` gives, by a loss's definition and autograd.

    Args:
        rows: CE and KD of each row [n] of logits [n, V].
        factor: [n] what each row is multiplied by.
    """
    with torch.set_grad_enabled(needs_grad):
        logits = logits.detach().requires_grad_(needs_grad)
        ce, kd = ((part * factor).sum() for part in rows(logits))
        loss = (ce + kd_weight * kd) / (1 + kd_weight)
    sums = torch.stack([ce.detach(), kd.detach()])
    return sums, torch.autograd.grad(loss, logits)[0] if needs_grad else None


def _under_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast would make of the inputs of a linear layer."""
    return tuple(None if t is None else t.to(product_dtype(t)) for t in tensors)


def empty_gradients(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    learns: list[bool],
    sums: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for each; for one that nobody asks for, of no elements.

    Args:
        sums: type of those of head and bias; default: theirs.
    """
    given = zip((hidden, head, bias), learns, (None, sums, sums), strict=True)
    of_hidden, of_head, of_bias = (
        torch.empty_like(tensor, dtype=dtype)
        if needed and tensor is not None
        else hidden.new_empty(0)
        for tensor, needed, dtype in given
    )
    return of_hidden, of_head, of_bias


def _fake(
    hidden: Tensor, head: Tensor, bias: Tensor | None, learns: list[bool], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, parts = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((), (2,)))
    sums = torch.float32 if hidden.dtype == torch.float16 else None  # as `row_chunks` has them
    return loss, parts, *empty_gradients(hidden, head, bias, learns, sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.learns, ctx.others = inputs[3], len(inputs) - 3
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


@first_order
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads = [
        grad * grad_loss if needed and grad_loss is not None else None
        for grad, needed in zip(ctx.saved_tensors, ctx.learns, strict=True)
    ]
    return (*grads, *[None] * ctx.others)
