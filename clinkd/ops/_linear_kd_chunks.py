"""What `linear_kd_loss` does with a chunk of logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from clinkd.ops._checks import check_rows
from clinkd.ops._kd_at_once import rows_with_gradient, why_not_at_once
from clinkd.ops._kd_loss_native import KD_ROWS, gradient_in_place
from clinkd.ops._linear_loss import LinearLoss, of_rows, reference_chunk
from clinkd.ops._memory import linear
from clinkd.ops._row_chunks import Score
from clinkd.ops._vocab_parallel import check_shards, local_options, whole_rows
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows


def _score(
    rows: Tensor,
    labels: Tensor,
    factor: Tensor,
    kd_weight: float,
    ignore_index: int,
    group: str,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    temperature: float,
    divergence: int,
    mix: float,
    softcap: float,
    impl: str,
) -> Score:
    """The loss of chunks of rows.

    Args:
        rows: [n] of what the caller was given, those that count.
        labels, factor: [n] of those.
        teacher_hidden: [N, Ct] of all.
    """
    if group:
        check_shards(group, teacher_head)
    hidden = of_rows(teacher_hidden, rows)
    options = (temperature, divergence, mix, ignore_index, softcap, impl)
    kind: dict[str, Any] = {
        "temperature": temperature,
        "divergence": DIVERGENCES[divergence],
        "beta": mix,
        "skew": mix,
        "ignore_index": ignore_index,
        "softcap": softcap or None,
    }

    def score(chunk: slice, logits: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        target = linear(hidden[chunk], teacher_head, teacher_bias)
        if not group:
            check_rows(logits, target, labels[chunk], ignore_index, rows[chunk])
        if impl == "reference":
            rows_of = partial(kd_loss_rows, teacher_logits=target, labels=labels[chunk], **kind)
            return reference_chunk(rows_of, logits, factor[chunk], kd_weight, needs_grad)
        given = (logits, target, labels[chunk], factor[chunk])
        return _chunk(*given, kd_weight, options, group, needs_grad)

    return score


def _chunk(
    logits: Tensor,
    target: Tensor,
    labels: Tensor,
    factor: Tensor,
    kd_weight: float,
    options: tuple[Any, ...],
    group: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of CE and KD [2], each row times its factor, and the gradient of the logits."""
    dtype = logits.dtype
    wide = torch.promote_types(dtype, target.dtype)
    logits, target = logits.to(wide), target.to(wide)
    scaled = factor / (1 + kd_weight)
    if needs_grad and not group and not why_not_at_once(options[-1], logits, target):
        ce, kd, grad = rows_with_gradient(
            scaled, scaled * kd_weight, logits, target, labels, *options, grad=logits
        )
        return torch.stack([(ce * factor).sum(), (kd * factor).sum()]), grad.to(dtype)
    if group:
        ce, kd, statistics, labels = whole_rows(logits, target, labels, group, *options)
        options = local_options(options)
    else:
        ce, kd, statistics = KD_ROWS(logits, target, labels, *options)
    sums = torch.stack([(ce * factor).sum(), (kd * factor).sum()])
    if not needs_grad:
        return sums, None
    gradient_in_place(scaled, scaled * kd_weight, logits, target, labels, statistics, *options)
    return sums, logits.to(dtype)


LINEAR_KD = LinearLoss(
    "linear_kd",
    "Tensor teacher_hidden, Tensor teacher_head, Tensor? teacher_bias, float temperature, "
    "int divergence, float mix, float softcap, str impl",
    _score,
    layer=3,
)
