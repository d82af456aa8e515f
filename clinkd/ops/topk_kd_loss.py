"""Cross-entropy and knowledge distillation from a teacher's top logits."""

from typing import Any

import torch
from torch import Tensor

from clinkd.ops._checks import (
    check_devices,
    check_float,
    check_labels,
    check_logits,
    check_num_items,
    check_options,
    check_rows,
    check_top_rows,
    check_weight,
)
from clinkd.ops._impl import native_impl, resolve_impl
from clinkd.ops._kd_mean import KDLoss, item_count, mean_rows, weight_of_counted
from clinkd.ops._topk_kd_native import TOPK_ROWS, ascending
from clinkd.ops.kd_loss import IMPLS, why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES
from clinkd.ops.reference.topk_kd_loss import bucket_loss_rows, topk_kd_loss_rows


def topk_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    teacher_lse: Tensor,
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
    impl: str = "auto",
) -> KDLoss:
    """`kd_loss` where K of the teacher's logits are known, and the mass of all others together.

    The formula is that of `clinkd.ops.reference.topk_kd_loss`; with K = V it is `kd_loss`.

    Args:
        student_logits: [N, Vs], gets the gradient.
        teacher_logits: [N, K], as the teacher's softmax takes them (before division by T).
        teacher_ids: [N, K] int32 or int64, their tokens, distinct in each row. A token that the
            student does not have counts to the tail.
        teacher_lse: [N] log-sum-exp of all the teacher's logits / T, at this `temperature`.
        labels: [N] int64, already shifted.

    The other arguments are those of `kd_loss`; `softcap` is the student's.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    check_logits("student_logits", student_logits, "[N, Vs]")
    check_labels(labels, student_logits.shape[0], ignore_index)
    check_top(teacher_logits, teacher_ids, teacher_lse, labels.shape[0])
    check_top_rows(teacher_logits, teacher_lse, labels, ignore_index)
    check_options(kd_weight, temperature, divergence, DIVERGENCES, beta, skew, softcap)
    check_weight(weight, labels.shape[0])
    check_num_items(num_items)
    check_devices(
        labels,
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        teacher_ids=teacher_ids,
        teacher_lse=teacher_lse,
        weight=weight,
    )
    check_rows(student_logits, None, labels, ignore_index)
    impl = resolve_impl(
        impl, IMPLS, native_impl(labels.device), why_not, labels.device, student_logits.dtype
    )
    kind: dict[str, Any] = {
        "temperature": temperature,
        "divergence": divergence,
        "beta": beta,
        "skew": skew,
        "ignore_index": ignore_index,
    }
    teacher = (teacher_logits.detach(), teacher_ids, teacher_lse.detach())
    if impl == "reference":
        ce, kd = topk_kd_loss_rows(student_logits, *teacher, labels, softcap=softcap, **kind)
    else:
        logits, ids, lse = ascending(*teacher, student_logits.shape[1])
        top, tail, soft_tail, picked, _ = TOPK_ROWS(
            student_logits, ids, labels, temperature, ignore_index, softcap or 0.0, impl
        )
        ce, kd = bucket_loss_rows(top, tail, soft_tail, picked, logits, lse, labels, **kind)
    count = item_count(labels, ignore_index, num_items)
    weight = weight_of_counted(weight, labels, ignore_index)
    return mean_rows(ce, kd, kd_weight, weight, count)


def check_top(logits: Tensor, ids: Tensor, lse: Tensor, rows: int) -> None:
    """The teacher's part: [N, K], [N, K], [N]."""
    check_float("teacher_logits", logits, 2, "[N, K]")
    check_float("teacher_lse", lse, 1, "[N]")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher_ids must be int32 or int64, got {ids.dtype}")
    if logits.shape[0] != rows or logits.shape[1] == 0:
        raise ValueError(
            f"teacher_logits must be [N, K] with N = {rows} and K above 0, "
            f"got shape {tuple(logits.shape)}"
        )
    if ids.shape != logits.shape:
        raise ValueError(
            f"teacher_ids must have teacher_logits' shape {tuple(logits.shape)}, "
            f"got {tuple(ids.shape)}"
        )
    if lse.shape != (rows,):
        raise ValueError(f"teacher_lse must be [N] = [{rows}], got shape {tuple(lse.shape)}")
