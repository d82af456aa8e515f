"""What `linear_kd_loss` does with a chunk of logits, and its operator for graphs.

A graph cannot hold a number of rows that its tensors decide, so there the rows that count are
chosen within one operator, which makes the gradients too.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clinkd.ops._checks import check_rows
from clinkd.ops._kd_at_once import rows_with_gradient, why_not_at_once
from clinkd.ops._kd_loss_native import KD_ROWS, gradient_in_place, operator_options
from clinkd.ops._memory import linear
from clinkd.ops._operator import Operator, first_order
from clinkd.ops._row_chunks import Score, row_chunks
from clinkd.ops._vocab_parallel import local_options, whole_rows
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows


def score_of(
    teacher: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    factor: Tensor,
    numbers: Tensor,
    kd_weight: float,
    kind: tuple[Any, ...],
    group: dist.ProcessGroup | None,
) -> Score:
    """The loss of chunks of rows.

    Args:
        teacher: hidden states [N, Ct], head [Vt, Ct], bias [Vt] or None.
        labels: [N].
        factor: [N] of each row.
        numbers: [N] of each row in what the caller was given, for errors.
        kind: temperature, divergence, beta, skew, ignore_index, softcap, impl.
    """
    hidden, head, bias = teacher

    def score(rows: slice, logits: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        target = linear(hidden[rows], head, bias)
        if group is None:
            check_rows(logits, target, labels[rows], kind[4], numbers[rows])
        given = (logits, target, labels[rows], factor[rows])
        return _chunk(*given, kd_weight, kind, group, needs_grad)

    return score


def _chunk(
    logits: Tensor,
    target: Tensor,
    labels: Tensor,
    factor: Tensor,
    kd_weight: float,
    kind: tuple[Any, ...],
    group: dist.ProcessGroup | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of CE and KD [2], each row times its factor, and the gradient of the logits."""
    temperature, divergence, beta, skew, ignore_index, softcap, impl = kind
    if impl == "reference":
        with torch.set_grad_enabled(needs_grad):
            logits = logits.detach().requires_grad_(needs_grad)
            ce, kd = kd_loss_rows(
                logits, target, labels, temperature=temperature, divergence=divergence,
                beta=beta, skew=skew, ignore_index=ignore_index, softcap=softcap,
            )  # fmt: skip
            ce, kd = (ce * factor).sum(), (kd * factor).sum()
            loss = (ce + kd_weight * kd) / (1 + kd_weight)
        sums = torch.stack([ce.detach(), kd.detach()])
        return sums, torch.autograd.grad(loss, logits)[0] if needs_grad else None
    dtype = logits.dtype
    wide = torch.promote_types(dtype, target.dtype)
    logits, target = logits.to(wide), target.to(wide)
    options = operator_options(*kind)
    scaled = factor / (1 + kd_weight)
    if needs_grad and group is None and not why_not_at_once(impl, logits, target):
        ce, kd, grad = rows_with_gradient(
            scaled, scaled * kd_weight, logits, target, labels, *options, grad=logits
        )
        return torch.stack([(ce * factor).sum(), (kd * factor).sum()]), grad.to(dtype)
    if group is None:
        ce, kd, statistics = KD_ROWS(logits, target, labels, *options)
    else:
        ce, kd, statistics, labels = whole_rows(logits, target, labels, group, options)
        options = local_options(options)
    sums = torch.stack([(ce * factor).sum(), (kd * factor).sum()])
    if not needs_grad:
        return sums, None
    gradient_in_place(scaled, scaled * kd_weight, logits, target, labels, statistics, *options)
    return sums, logits.to(dtype)


def under_autocast(
    hidden: Tensor, head: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would make of the inputs of a linear layer."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, head, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)


def _rows(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    kd_weight: float,
    temperature: float,
    divergence: int,
    mix: float,
    ignore_index: int,
    softcap: float,
    chunk_rows: int,
    vocab_size: int,
    learns: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums of CE and KD [2], and the loss's gradients by hidden, head and bias.

    A gradient that nobody asks for has no elements.
    """
    kept = (labels != ignore_index).nonzero().squeeze(1)
    teacher = (teacher_hidden[kept], teacher_head, teacher_bias)
    kind = (temperature, DIVERGENCES[divergence], mix, mix, ignore_index, softcap or None, impl)
    score = score_of(teacher, labels[kept], factor[kept], kept, kd_weight, kind, None)
    student = (hidden[kept], head, bias)
    loss, parts, (of_kept, *others) = row_chunks(
        student, learns, score, kd_weight, chunk_rows, None, vocab_size
    )
    of_hidden = None
    if of_kept is not None:
        of_hidden = torch.zeros_like(hidden).index_copy_(0, kept, of_kept)
    none = hidden.new_empty(0)
    grads = [none.clone() if grad is None else grad for grad in (of_hidden, *others)]
    return loss, parts, grads[0], grads[1], grads[2]


def _fake(
    hidden: Tensor, head: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    learns = others[-2]
    of_hidden, of_head, of_bias = (
        torch.empty_like(tensor) if needed and tensor is not None else hidden.new_empty(0)
        for tensor, needed in zip((hidden, head, bias), learns, strict=True)
    )
    loss, parts = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((), (2,)))
    return loss, parts, of_hidden, of_head, of_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.learns = inputs[-2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


@first_order
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads = [
        grad * grad_loss if needed and grad_loss is not None else None
        for grad, needed in zip(ctx.saved_tensors, ctx.learns, strict=True)
    ]
    return (*grads, *[None] * 15)


LINEAR_KD = Operator(
    "linear_kd",
    "(Tensor hidden, Tensor head, Tensor? bias, Tensor teacher_hidden, Tensor teacher_head, "
    "Tensor? teacher_bias, Tensor labels, Tensor factor, float kd_weight, float temperature, "
    "int divergence, float mix, int ignore_index, float softcap, int chunk_rows, int vocab_size, "
    "bool[] learns, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _rows,
    _fake,
    _save,
    _backward,
)
