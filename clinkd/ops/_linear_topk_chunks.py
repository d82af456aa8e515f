"""What `linear_topk_kd_loss` does with a chunk of logits."""

from functools import partial

import torch
from torch import Tensor

from clinkd.ops._checks import check_rows
from clinkd.ops._linear_loss import LinearLoss, of_rows, reference_chunk
from clinkd.ops._row_chunks import Score
from clinkd.ops._topk_kd_native import TOPK_ROWS, ascending, gradient_in_place
from clinkd.ops.reference.kd_loss import divergence_rows
from clinkd.ops.reference.topk_kd_loss import bucket_logarithms, topk_kd_loss_rows


def _score(
    rows: Tensor,
    labels: Tensor,
    factor: Tensor,
    kd_weight: float,
    ignore_index: int,
    _: str,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    teacher_lse: Tensor,
    temperature: float,
    divergence: str,
    mix: float,
    softcap: float,
    columns: int,
    impl: str,
) -> Score:
    """The loss of chunks of rows.

    Args:
        rows: [n] of what the caller was given, those that count.
        labels, factor: [n] of those.
        teacher_logits: [N, K] of all.
    """
    top = ascending(
        of_rows(teacher_logits, rows),
        of_rows(teacher_ids, rows),
        of_rows(teacher_lse, rows),
        columns,
    )
    kind = (temperature, divergence, mix)

    def score(chunk: slice, logits: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        check_rows(logits, None, labels[chunk], ignore_index, rows[chunk])
        own, part = labels[chunk], factor[chunk]
        values, ids, lse = (each[chunk] for each in top)
        if impl == "reference":
            rows_of = partial(
                topk_kd_loss_rows, teacher_logits=values, teacher_ids=ids, teacher_lse=lse,
                labels=own, temperature=temperature, divergence=divergence, beta=mix, skew=mix,
                ignore_index=ignore_index, softcap=softcap or None,
            )  # fmt: skip
            return reference_chunk(rows_of, logits, part, kd_weight, needs_grad)
        options = (temperature, ignore_index, softcap, impl)
        top_logits, tail, soft_tail, picked, statistics = TOPK_ROWS(logits, ids, own, *options)
        sums, slopes = _buckets(
            (top_logits, tail, soft_tail, picked), values, lse, part, kd_weight, kind, needs_grad
        )
        if not needs_grad:
            return sums, None
        gradient_in_place(slopes, logits, ids, own, statistics, *options)
        return sums, logits

    return score


def _buckets(
    student: tuple[Tensor, Tensor, Tensor, Tensor],
    values: Tensor,
    lse: Tensor,
    factor: Tensor,
    kd_weight: float,
    kind: tuple[float, str, float],
    needs_grad: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sums of CE and KD [2], and the loss's gradients by the four tensors of the student.

    These are written out: within an operator nothing is recorded for autograd.

    Args:
        student: top, tail, soft_tail, picked of `bucket_loss_rows`.
        values: [n, K] the teacher's logits; lse: [n].
        factor: [n] what each row's loss is multiplied by.
    """
    top, tail, soft_tail, picked = student
    temperature, divergence, mix = kind
    log_total, log_p, log_q = bucket_logarithms(top, tail, soft_tail, values, lse, temperature)
    kd = temperature**2 * divergence_rows(log_p, log_q, divergence, mix, mix)
    sums = torch.stack([((log_total - picked) * factor).sum(), (kd * factor).sum()])
    if not needs_grad:
        return sums, ()
    factor = factor / (1 + kd_weight)
    of_log_q = _divergence_slope(log_p, log_q, divergence, mix)
    of_soft = of_log_q - log_q.exp() * of_log_q.sum(dim=1, keepdim=True)  # of logits / T
    of_soft = of_soft * (factor * kd_weight * temperature**2)[:, None]
    share = torch.exp(top - log_total[:, None]) * factor[:, None]
    return sums, (
        share + of_soft[:, :-1] / temperature,
        torch.exp(tail - log_total) * factor,
        of_soft[:, -1],
        -factor,
    )


def _divergence_slope(log_p: Tensor, log_q: Tensor, divergence: str, mix: float) -> Tensor:
    """The derivative of `divergence_rows` by log q [N, V], up to a multiple of q in each row."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return -p
    if divergence == "reverse_kl":
        return torch.where(q == 0, 0, q * (log_q - log_p))
    # as the reference clamps it: where p is 0 and q subnormal, a share of q can be 0
    m = (mix * p + (1 - mix) * q).clamp(min=torch.finfo(p.dtype).tiny)
    if divergence == "skew_kl":
        return torch.where(q == 0, 0, -(1 - mix) * p * q / m)
    return torch.where(q == 0, 0, (1 - mix) * q * (log_q - m.log()))


LINEAR_TOPK_KD = LinearLoss(
    "linear_topk_kd",
    "Tensor teacher_logits, Tensor teacher_ids, Tensor teacher_lse, float temperature, "
    "str divergence, float mix, float softcap, int columns, str impl",
    _score,
)
