"""Cross-entropy and distillation from a teacher's top logits: the definition."""

import torch
from torch import Tensor

from clinkd.ops.reference.kd_loss import divergence_rows

NOTHING = -1e30  # logarithm of no probability: finite, so that 0 * NOTHING is 0
# The teacher's tail is what K probabilities in float32 leave of 1, so less is rounding: taken for
# 0 it would make the student's tail an error without bound in the reverse KL.
LEAST_TAIL = 2.0**-23


def topk_kd_loss_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    teacher_lse: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and distillation term of every token, of K tokens and one tail bucket.

        CE = -log softmax(z_s)[y]        KD = T^2 D(p, q)
        p = (exp(t_k / T - lse), k = 1 … K; the rest of 1)
        q = (softmax(z_s / T)[id_k], k = 1 … K; the rest of 1)

    with D as in `clinkd.ops.reference.kd_loss`. The teacher's mass outside its top K is known
    exactly, for `lse` is over its whole vocabulary; with K = V this is `kd_loss`. A token that the
    student does not have counts to the tail.

    Shapes:
        N: tokens; K: kept logits; Vs: the student's vocabulary.

    Args:
        student_logits: [N, Vs].
        teacher_logits: [N, K], capped already where the teacher caps its logits.
        teacher_ids: [N, K] integers, distinct in a row.
        teacher_lse: [N] log-sum-exp of the teacher's logits / T.
        labels: [N] int64, already shifted.
        softcap: the student's logits become `softcap * tanh(logits / softcap)`.

    Returns:
        CE and KD, each [N], float32 (float64 for float64 logits), 0 where the label is ignored.
    """
    compute = torch.promote_types(student_logits.dtype, torch.float32)
    z = student_logits.to(compute)  # [N, Vs]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    known = (teacher_ids >= 0) & (teacher_ids < z.shape[1])  # [N, K]
    # a column past the end takes what the student does not have
    wide = torch.cat([z, z.new_full((len(z), 1), NOTHING)], dim=1).clamp(min=NOTHING)
    places = torch.where(known, teacher_ids, z.shape[1]).long()
    top = wide.gather(1, places)  # [N, K]
    rest = wide.scatter(1, places, NOTHING)  # [N, Vs + 1]
    picked = z.gather(1, labels.masked_fill(labels == ignore_index, 0)[:, None]).squeeze(1)  # [N]
    return bucket_loss_rows(
        top,
        rest.logsumexp(dim=1),
        (rest / temperature).logsumexp(dim=1),
        picked,
        teacher_logits.detach().to(compute),
        teacher_lse.detach().to(compute),
        labels,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        skew=skew,
        ignore_index=ignore_index,
    )


def bucket_loss_rows(
    top: Tensor,
    tail: Tensor,
    soft_tail: Tensor,
    picked: Tensor,
    teacher_logits: Tensor,
    teacher_lse: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    divergence: str,
    beta: float,
    skew: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """`topk_kd_loss_rows` from what it needs of the student.

    Args:
        top: [N, K] its logits of the teacher's tokens, `NOTHING` where it has not got the token.
        tail: [N] log-sum-exp of its other logits.
        soft_tail: [N] of its other logits / T.
        picked: [N] its logit of the label.

    A constant added to all of a row's changes nothing (soft_tail: constant / T).
    """
    log_total, log_p, log_q = bucket_logarithms(
        top, tail, soft_tail, teacher_logits, teacher_lse, temperature
    )
    ce = log_total - picked  # [N]
    kd = temperature**2 * divergence_rows(log_p, log_q, divergence, beta, skew)
    ignored = labels == ignore_index
    return ce.masked_fill(ignored, 0.0), kd.masked_fill(ignored, 0.0)


def bucket_logarithms(
    top: Tensor,
    tail: Tensor,
    soft_tail: Tensor,
    teacher_logits: Tensor,
    teacher_lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the student's sum at T = 1 [N], of p and q [N, K + 1]; see `bucket_loss_rows`."""
    tail, soft_tail = tail.clamp(min=NOTHING), soft_tail.clamp(min=NOTHING)
    log_total = torch.logaddexp(top.logsumexp(dim=1), tail)
    log_q = torch.cat([top / temperature, soft_tail[:, None]], dim=1).log_softmax(dim=1)

    log_p = teacher_logits / temperature - teacher_lse[:, None]
    log_p = log_p.masked_fill(top.detach() <= NOTHING, NOTHING)
    rest = (1 - log_p.exp().sum(dim=1, keepdim=True)).clamp(min=LEAST_TAIL)
    # where the student has no other column, what rounding leaves of 1 is no mass
    rest = rest.log().masked_fill(tail[:, None] <= NOTHING, NOTHING)
    return log_total, torch.cat([log_p, rest], dim=1), log_q
