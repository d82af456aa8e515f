"""Cross-entropy and knowledge distillation over given logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from clinkd.ops._checks import check_float, check_labels, check_options
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows


class KDLoss(NamedTuple):
    """Loss of a batch: `loss` has the gradient, `ce` and `kd` are for the log.

    `loss = (ce + kd_weight * kd) / (1 + kd_weight)`; all are float32 scalars on the device.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    num_items: Tensor | int | None = None,
    softcap: float | None = None,
) -> KDLoss:
    """The distillation loss of logits, see `clinkd.ops.reference.kd_loss` for the formula.

    Args:
        student_logits: [N, Vs], gets the gradient.
        teacher_logits: [N, Vt].
        labels: [N] int64, already shifted.
        kd_weight: a in (CE + a KD) / (1 + a); the paper's alpha.
        temperature: T > 0.
        divergence: forward_kl, reverse_kl, jsd (with `beta`) or skew_kl (with `skew`).
        ignore_index: tokens with this label count for nothing.
        weight: [N] factor of each token.
        num_items: divisor of the sum over tokens; default: the number of labelled tokens. Give the
            count of the whole optimiser step where batches are accumulated or sharded.
        softcap: Gemma's logit cap, in both models.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_float("student_logits", student_logits, 2, "[N, Vs]")
    check_float("teacher_logits", teacher_logits, 2, "[N, Vt]")
    check_labels(labels, student_logits.shape[0])
    if teacher_logits.shape[0] != student_logits.shape[0]:
        raise ValueError(
            f"teacher_logits must have N = {student_logits.shape[0]} rows, "
            f"got shape {tuple(teacher_logits.shape)}"
        )
    check_options(kd_weight, temperature, divergence, DIVERGENCES, beta, skew)
    ce, kd = kd_loss_rows(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        skew=skew,
        ignore_index=ignore_index,
        softcap=softcap,
    )
    return reduce_rows(ce, kd, labels, kd_weight, ignore_index, weight, num_items)


def reduce_rows(
    ce: Tensor,
    kd: Tensor,
    labels: Tensor,
    kd_weight: float,
    ignore_index: int,
    weight: Tensor | None,
    num_items: Tensor | int | None,
) -> KDLoss:
    """Sum over tokens, divided by `num_items`, without the host waiting."""
    if weight is not None:
        ce, kd = ce * weight, kd * weight
    count = default_num_items(labels, ignore_index) if num_items is None else num_items
    ce, kd = ce.sum() / count, kd.sum() / count
    return KDLoss((ce + kd_weight * kd) / (1 + kd_weight), ce.detach(), kd.detach())


def default_num_items(labels: Tensor, ignore_index: int) -> Tensor:
    """Number of labelled tokens, at least 1, on the device."""
    return (labels != ignore_index).sum().clamp(min=1).to(torch.float32)
