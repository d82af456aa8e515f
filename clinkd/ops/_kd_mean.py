"""From the rows of a distillation loss to its number, and to its gradient in one node."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinkd.ops import _kd_loss_native as native
from clinkd.ops._impl import wrote
from clinkd.ops._operator import first_order


class KDLoss(NamedTuple):
    """Loss of a batch: `loss` has the gradient, `ce` and `kd` are for the log.

    `loss = (ce + kd_weight * kd) / (1 + kd_weight)`; all are float32 scalars on the device.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def item_count(labels: Tensor, ignore_index: int, num_items: Tensor | int | None) -> Tensor | int:
    """What a sum over tokens is divided by; default: labelled tokens, at least 1, on the device."""
    if isinstance(num_items, Tensor):
        return num_items.reshape(())
    return (labels != ignore_index).sum().clamp_(min=1) if num_items is None else num_items


def weight_of_counted(weight: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    """Factors of the tokens [N], 0 of those that count for nothing, whatever was given for them."""
    return None if weight is None else weight.masked_fill(labels == ignore_index, 0)


def has_gradient(*factors: Tensor | int | None) -> bool:
    """Whether one of what the rows are multiplied by has a gradient."""
    return torch.is_grad_enabled() and any(
        isinstance(f, Tensor) and f.requires_grad for f in factors
    )


def mean_rows(
    ce: Tensor, kd: Tensor, kd_weight: float, weight: Tensor | None, count: Tensor | int
) -> KDLoss:
    """Sum over tokens, divided by `count`, without the host waiting."""
    if weight is not None:
        weight = weight.to(ce.dtype)
        ce, kd = ce * weight, kd * weight
    ce, kd = ce.sum() / count, kd.sum() / count
    return KDLoss(torch.add(ce, kd, alpha=kd_weight) / (1 + kd_weight), ce.detach(), kd.detach())


def divided(loss: Tensor, parts: Tensor, count: Tensor | int) -> KDLoss:
    """The sum of the loss and of CE and KD [2] over tokens, divided by `count`."""
    parts = parts.detach() / count
    return KDLoss(loss / count, parts[0], parts[1])


class MeanOfRows(torch.autograd.Function):
    """Loss, CE and KD of logits by the two-pass kernels.

    As nodes of their own, the sums and their gradients are twenty launches, which take longer than
    the kernels on a few hundred rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        count: Tensor | int,
        kd_weight: float,
        options: tuple[Any, ...],
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ce, kd, statistics = native.rows(student, teacher, labels, *options)
        ctx.save_for_backward(student, teacher, labels, weight, statistics)
        ctx.count, ctx.kd_weight, ctx.options, ctx.inplace = count, kd_weight, options, inplace
        loss, ce, kd = mean_rows(ce, kd, kd_weight, weight, count)
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, weight, statistics = ctx.saved_tensors
        factor = grad_loss / (ctx.count * (1 + ctx.kd_weight))
        if weight is not None:
            factor = factor * weight.to(torch.float32)
        given = (factor, factor * ctx.kd_weight, student, teacher, labels, statistics)
        if ctx.inplace:
            native.gradient_in_place(*given, *ctx.options)
            wrote(student)
            grad = student.detach()
        else:
            grad = native.rows_backward(*given, *ctx.options)
        return (grad, *[None] * 7)
