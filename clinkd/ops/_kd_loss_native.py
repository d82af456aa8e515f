"""The operators of the distillation loss over given logits: schema, shapes, autograd."""

from typing import Any

import torch
from torch import Tensor

from clinkd.ops._impl import run_native
from clinkd.ops._memory import fresh_like
from clinkd.ops._operator import Operator
from clinkd.ops.reference.kd_loss import DIVERGENCES

STATISTICS = 7  # kStatistics of csrc/kd_loss.h


def gradient_in_place(
    ce_factor: Tensor,
    kd_factor: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    statistics: Tensor,
    *options: Any,
) -> None:
    """Write the gradient of the logits over them: `student` [N, Vs] has columns side by side."""
    *numbers, impl = options
    launch("gradient", impl, student, _side_by_side(teacher), labels, statistics, numbers,
            factors=(ce_factor, kd_factor), grad=student)  # fmt: skip


def _side_by_side(logits: Tensor) -> Tensor:
    """With the columns of a row beside each other, as the kernels read them."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    divergence: int,
    mix: float,
    ignore_index: int,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """CE and KD of each row [N], and what the gradient needs [N, STATISTICS]; all float32."""
    student, teacher = _side_by_side(student), _side_by_side(teacher)
    numbers = (temperature, divergence, mix, ignore_index, softcap)
    ce, kd, statistics = empty_rows(student)
    launch("statistics", impl, student, teacher, labels, statistics, numbers, sums=(ce, kd))
    return ce, kd, statistics


def _divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, statistics: Tensor, *options: Any
) -> Tensor:
    """Divergence, without T^2, and kMean of rows with these statistics [N, 2], float32.

    Both add up over parts of the columns.
    """
    *numbers, impl = options
    student, teacher = _side_by_side(student), _side_by_side(teacher)
    value, mean, _ = empty_rows(student)
    launch("divergence", impl, student, teacher, labels, statistics, numbers, sums=(mean, value))
    return torch.stack([value, mean], dim=1)


def rows_backward(
    ce_factor: Tensor,
    kd_factor: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    statistics: Tensor,
    *options: Any,
) -> Tensor:
    *numbers, impl = options
    student, teacher = _side_by_side(student), _side_by_side(teacher)
    grad = fresh_like(student)
    launch("gradient", impl, student, teacher, labels, statistics, numbers,
            factors=(ce_factor, kd_factor), grad=grad)  # fmt: skip
    return grad


def launch(
    part: str,
    impl: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    statistics: Tensor | None,
    numbers: Any,
    sums: tuple[Tensor, Tensor] | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    grad: Tensor | None = None,
) -> None:
    """Run one of the kernels; see `KDArgs` in csrc/kd_loss.h."""
    if student.shape[0] == 0:
        return
    labels = labels.contiguous()
    given = [t.to(torch.float32) for t in factors or ()]
    shared = all(t.dim() == 0 or t.stride(0) == 0 for t in given)  # one number for all rows
    if not shared:
        given = [t.expand(student.shape[0]).contiguous() for t in given]  # kept alive
    ce, kd = (0, 0) if sums is None else (t.data_ptr() for t in sums)
    first, second = (t.data_ptr() for t in given) if given else (0, 0)
    between = 0 if statistics is None else statistics.data_ptr()
    out = 0 if grad is None else grad.data_ptr()
    inputs = (student.data_ptr(), teacher.data_ptr(), labels.data_ptr())
    places = (*inputs, ce, kd, between, first, second, out)
    sizes = (student.shape[0], student.shape[1], teacher.shape[1])
    strides = (student.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0))
    steps = (*strides, 0 if shared else 1)
    temperature, divergence, mix, ignore_index, softcap = numbers
    options = (ignore_index, temperature, mix, softcap, divergence)
    run_native(f"kd_{part}", impl, student, places, sizes + steps, *options)


def empty_rows(student: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what is known of each row of [N, Vs]: two numbers and the statistics, float32."""
    rows = student.shape[0]
    first, second = (student.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return first, second, student.new_empty(rows, STATISTICS, dtype=torch.float32)


def _fake_backward(ce_factor: Tensor, kd_factor: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _fake_divergence(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape[0], 2, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, labels, *ctx.options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(student, teacher, labels, output[2])


def _backward(ctx: Any, grad_ce: Tensor, grad_kd: Tensor, _: Tensor) -> tuple[Any, ...]:
    student, teacher, labels, statistics = ctx.saved_tensors
    grad = KD_ROWS_BACKWARD(grad_ce, grad_kd, student, teacher, labels, statistics, *ctx.options)
    return (grad, *[None] * 8)


OPTIONS = "float temperature, int divergence, float mix, int ignore_index, float softcap, str impl"
KD_ROWS_BACKWARD = Operator(
    "kd_rows_backward",
    "(Tensor ce_factor, Tensor kd_factor, Tensor student, Tensor teacher, Tensor labels, "
    f"Tensor statistics, {OPTIONS}) -> Tensor",
    rows_backward,
    _fake_backward,
)
KD_ROWS = Operator(
    "kd_rows",
    f"(Tensor student, Tensor teacher, Tensor labels, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    rows,
    empty_rows,
    _save,
    _backward,
)
KD_DIVERGENCE = Operator(
    "kd_divergence",
    f"(Tensor student, Tensor teacher, Tensor labels, Tensor statistics, {OPTIONS}) -> Tensor",
    _divergence,
    _fake_divergence,
)


def operator_options(
    temperature: float,
    divergence: str,
    beta: float,
    skew: float,
    ignore_index: int,
    softcap: float | None,
    impl: str,
) -> tuple[float, int, float, int, float, str]:
    """The options as the operators take them."""
    mix = beta if divergence == "jsd" else skew
    kind = DIVERGENCES.index(divergence)
    return (temperature, kind, mix, ignore_index, softcap or 0.0, impl)
