"""The distillation loss from a teacher's top logits and the student's hidden states."""

from typing import Any

import torch
from torch import Tensor

from clinkd.ops import _topk_kd_native as native
from clinkd.ops._checks import (
    check_bias,
    check_devices,
    check_head,
    check_labels,
    check_num_items,
    check_options,
    check_rows,
    check_top_rows,
    check_vocab_size,
    check_weight,
)
from clinkd.ops._impl import native_impl, resolve_impl
from clinkd.ops._kd_mean import KDLoss, item_count
from clinkd.ops._row_chunks import RowChunks, chunk_rows, shares
from clinkd.ops.kd_loss import IMPLS, why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES
from clinkd.ops.reference.topk_kd_loss import bucket_loss_rows, topk_kd_loss_rows
from clinkd.ops.topk_kd_loss import ascending, check_top


def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
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
    student_bias: Tensor | None = None,
    workspace: int | str = "auto",
    vocab_size: int | None = None,
    impl: str = "auto",
) -> KDLoss:
    """`topk_kd_loss` of `hidden @ weight.T + bias`, in row chunks; ignored rows are dropped first.

    Args:
        student_hidden: [N, Cs], gets a gradient, as do `student_weight` and `student_bias`.
        student_weight: [Vs, Cs], the output head.
        student_bias: [Vs].
        workspace: bytes that the logits of a chunk may take, or "auto", as for `linear_kd_loss`;
            above 0.
        vocab_size: as for `linear_kd_loss`.

    The other arguments are those of `topk_kd_loss`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    check_head("student", student_hidden, student_weight)
    check_vocab_size(vocab_size, student_weight)
    check_labels(labels, student_hidden.shape[0])
    check_top(teacher_logits, teacher_ids, teacher_lse, labels.shape[0])
    check_top_rows(teacher_logits, teacher_lse, labels, ignore_index)
    check_options(kd_weight, temperature, divergence, DIVERGENCES, beta, skew, softcap)
    check_weight(weight, labels.shape[0], learns=False)
    check_num_items(num_items)
    check_bias("student_bias", student_bias, student_weight)
    check_devices(
        labels,
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_logits=teacher_logits,
        teacher_ids=teacher_ids,
        teacher_lse=teacher_lse,
        weight=weight,
    )
    if workspace == 0:
        raise ValueError("workspace must be above 0: top-k distillation stores a chunk's logits")
    impl = resolve_impl(
        impl, IMPLS, native_impl(labels.device), why_not, labels.device, student_hidden.dtype
    )
    count = item_count(labels, ignore_index, num_items)
    kept = (labels != ignore_index).nonzero().squeeze(1)
    labels = labels[kept]
    weight = None if weight is None else weight[kept]
    factor, count = shares(weight, labels, count, student_hidden.dtype)
    columns = student_weight[:vocab_size].shape[0]
    top = ascending(
        teacher_logits.detach()[kept], teacher_ids[kept], teacher_lse.detach()[kept], columns
    )
    kind: dict[str, Any] = {
        "temperature": temperature,
        "divergence": divergence,
        "beta": beta,
        "skew": skew,
        "ignore_index": ignore_index,
    }

    def score(rows: slice, logits: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        check_rows(logits, None, labels[rows], ignore_index, kept[rows])
        values, ids, lse = (each[rows] for each in top)
        if impl == "reference":
            leaves: list[Tensor] = [logits]
        else:
            options = (temperature, ignore_index, softcap or 0.0, impl)
            *leaves, statistics = native.TOPK_ROWS(logits, ids, labels[rows], *options)
        with torch.set_grad_enabled(needs_grad):
            leaves = [leaf.requires_grad_(needs_grad) for leaf in leaves]
            if impl == "reference":
                ce, kd = topk_kd_loss_rows(
                    logits, values, ids, lse, labels[rows], softcap=softcap, **kind
                )
            else:
                ce, kd = bucket_loss_rows(*leaves, values, lse, labels[rows], **kind)  # type: ignore[arg-type, call-arg]
            ce, kd = (ce * factor[rows]).sum(), (kd * factor[rows]).sum()
            loss = (ce + kd_weight * kd) / (1 + kd_weight)
        sums = torch.stack([ce.detach(), kd.detach()])
        if not needs_grad:
            return sums, None
        grads = torch.autograd.grad(loss, leaves)
        if impl == "reference":
            return sums, grads[0]
        native.gradient_in_place(grads, logits, ids, labels[rows], statistics, *options)
        return sums, logits

    rows = chunk_rows(workspace, student_weight[:vocab_size])
    settings = (kd_weight, rows, None, vocab_size, torch.is_grad_enabled())
    loss, parts = RowChunks.apply(
        student_hidden[kept], student_weight, student_bias, score, *settings
    )
    parts = parts.detach() / count
    return KDLoss(loss / count, parts[0], parts[1])
