"""The operator of the top-k distillation loss: what it needs of the student, and its gradient."""

from typing import Any

import torch
from torch import Tensor

from clinkd.ops._impl import run_native
from clinkd.ops._memory import fresh_like
from clinkd.ops._operator import Operator
from clinkd.ops.reference.topk_kd_loss import NOTHING

STATISTICS = 3  # of the tail: largest logit, one over the sums of exponentials at 1 and at T


def ascending(
    logits: Tensor, ids: Tensor, lse: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's part as the kernels take it: ids ascending, unknown ones last."""
    ids = torch.where((ids >= 0) & (ids < columns), ids, columns)
    ids, order = ids.sort(dim=1)
    return logits.float().gather(1, order), ids.to(torch.int32), lse.float()


def _rows(
    student: Tensor,
    ids: Tensor,
    labels: Tensor,
    temperature: float,
    ignore_index: int,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`top`, `tail`, `soft_tail`, `picked` of `bucket_loss_rows`, and the statistics [N, 3].

    All but the last are relative to the row's largest logit (`soft_tail`: that / T), so that large
    logits lose nothing. The gradient leaves that constant out, for the loss does not change by it.

    Args:
        student: [N, V].
        ids: [N, K] int32, ascending in each row; V or more stands for no token.
    """
    student = student if student.stride(1) == 1 else student.contiguous()
    rows, columns = student.shape
    statistics = torch.empty(rows, STATISTICS, dtype=torch.float32, device=student.device)
    options = (temperature, ignore_index, softcap, impl)
    _launch("tails", student, ids, labels, statistics, options)
    largest, inverse, soft_inverse = statistics.unbind(1)

    def gathered(places: Tensor) -> Tensor:
        found = student.gather(1, places.long().clamp(0, columns - 1)).float()
        found = softcap * torch.tanh(found / softcap) if softcap else found
        return found.masked_fill((places < 0) | (places >= columns), NOTHING)

    top = gathered(ids)
    level = torch.maximum(top.amax(1), largest)  # [N]
    right = ((labels >= 0) & (labels < columns)) | (labels == ignore_index)
    # nothing to compare with, or no such label: neither a loss nor a gradient
    level = level.masked_fill((level <= NOTHING) | ~right, torch.nan)
    return (
        top - level[:, None],
        (largest - level).clamp(min=NOTHING) - inverse.log(),
        (largest - level).clamp(min=NOTHING) / temperature - soft_inverse.log(),
        gathered(labels[:, None]).squeeze(1) - level,
        statistics,
    )


def _rows_backward(
    top_factor: Tensor,
    tail_factor: Tensor,
    soft_factor: Tensor,
    picked_factor: Tensor,
    student: Tensor,
    ids: Tensor,
    labels: Tensor,
    statistics: Tensor,
    *options: Any,
) -> Tensor:
    student = student if student.stride(1) == 1 else student.contiguous()
    grad = fresh_like(student)
    factors = (top_factor, tail_factor, soft_factor, picked_factor)
    _launch("gradient", student, ids, labels, statistics, options, factors, grad)
    return grad


def gradient_in_place(
    factors: tuple[Tensor, ...],
    student: Tensor,
    ids: Tensor,
    labels: Tensor,
    statistics: Tensor,
    *options: Any,
) -> None:
    """Write the gradient of the logits over them: `student` [N, V] has columns side by side."""
    _launch("gradient", student, ids, labels, statistics, options, factors, student)


def _launch(
    part: str,
    student: Tensor,
    ids: Tensor,
    labels: Tensor,
    statistics: Tensor,
    options: tuple[Any, ...],
    factors: tuple[Tensor, ...] | None = None,
    grad: Tensor | None = None,
) -> None:
    """Run one of the two kernels; see `TopKArgs` in csrc/topk_kd.h."""
    if student.shape[0] == 0:
        return
    temperature, ignore_index, softcap, impl = options
    given = [t.to(torch.float32).contiguous() for t in factors or ()]  # kept alive, as are these
    ids, labels = ids.contiguous(), labels.contiguous()
    outputs = [t.data_ptr() for t in given] or [0] * 4
    out = 0 if grad is None else grad.data_ptr()
    places = (student.data_ptr(), ids.data_ptr(), labels.data_ptr(), statistics.data_ptr())
    strides = (student.stride(0), 0 if grad is None else grad.stride(0))
    sizes = (*student.shape, ids.shape[1], *strides)
    run_native(f"topk_{part}", impl, student, (*places, *outputs, out), sizes, ignore_index,
               temperature, softcap)  # fmt: skip


def _fake(student: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = student.shape[0]
    tail, soft_tail, picked = (student.new_empty(rows, dtype=torch.float32) for _ in range(3))
    top = student.new_empty(ids.shape, dtype=torch.float32)
    return top, tail, soft_tail, picked, tail.new_empty(rows, STATISTICS)


def _fake_backward(*tensors: Any) -> Tensor:
    student = tensors[4]
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, ids, labels, *ctx.options = inputs
    ctx.mark_non_differentiable(output[4])
    ctx.save_for_backward(student, ids, labels, output[4])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    student, ids, labels, statistics = ctx.saved_tensors
    grad = _TOPK_ROWS_BACKWARD(*grads[:4], student, ids, labels, statistics, *ctx.options)
    return (grad, *[None] * 6)


_OPTIONS = "float temperature, int ignore_index, float softcap, str impl"
_TOPK_ROWS_BACKWARD = Operator(
    "topk_rows_backward",
    "(Tensor top_factor, Tensor tail_factor, Tensor soft_factor, Tensor picked_factor, "
    f"Tensor student, Tensor ids, Tensor labels, Tensor statistics, {_OPTIONS}) -> Tensor",
    _rows_backward,
    _fake_backward,
)
TOPK_ROWS = Operator(
    "topk_rows",
    f"(Tensor student, Tensor ids, Tensor labels, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _rows,
    _fake,
    _save,
    _backward,
)
