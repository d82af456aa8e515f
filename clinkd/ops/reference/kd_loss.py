"""Cross-entropy and knowledge distillation over given logits: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


def kd_loss_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and distillation term of every token.

        CE = -log softmax(z_s)[y]        KD = T^2 D(softmax(z_t / T), softmax(z_s / T))

    with p the teacher's, q the student's distribution at temperature T, and D

        forward_kl  KL(p || q)           reverse_kl  KL(q || p)
        jsd         beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
        skew_kl     KL(p || skew p + (1 - skew) q)            (Ko et al. 2024, arXiv:2402.03898)

    A column of -inf has probability 0. KL(p || q) is infinite where p is above 0 and q is 0:
    forward KL where the student alone has -inf, reverse KL where the teacher alone has; the others
    never.

    T^2 keeps gradients of one size as T varies (Hinton et al. 2015, arXiv:1503.02531, section 2).
    Where the vocabularies differ, D compares their common prefix, both renormalised over it; CE
    sees all of the student's.

    Shapes:
        N: tokens; Vs, Vt: vocabularies.

    Args:
        student_logits: [N, Vs].
        teacher_logits: [N, Vt]; gets no gradient.
        labels: [N] int64, already shifted.
        softcap: logits become `softcap * tanh(logits / softcap)` in both models first.

    Returns:
        CE and KD, each [N], float32 (float64 for float64 logits), 0 where the label is ignored.
    """
    compute = torch.promote_types(student_logits.dtype, torch.float32)
    ignored = (labels == ignore_index)[:, None]
    # whatever ignored rows hold, their gradient is 0
    z = student_logits.to(compute).masked_fill(ignored, 0.0)  # [N, Vs]
    t = teacher_logits.detach().to(compute).masked_fill(ignored, 0.0)  # [N, Vt]
    if softcap is not None:
        z, t = softcap * torch.tanh(z / softcap), softcap * torch.tanh(t / softcap)
    ce = F.cross_entropy(z, labels, reduction="none", ignore_index=ignore_index)  # [N]

    common = min(z.shape[1], t.shape[1])
    log_q = torch.log_softmax(z[:, :common] / temperature, dim=-1)  # [N, V]
    log_p = torch.log_softmax(t[:, :common] / temperature, dim=-1)  # [N, V]
    kd = temperature**2 * divergence_rows(log_p, log_q, divergence, beta, skew)
    return ce, kd.masked_fill(labels == ignore_index, 0.0)


def divergence_rows(
    log_p: Tensor, log_q: Tensor, divergence: str, beta: float, skew: float
) -> Tensor:
    """D of each row [N], from the logarithms of two distributions [N, V]; see `kd_loss_rows`."""
    if divergence == "forward_kl":
        return _kl(log_p, log_q)
    if divergence == "reverse_kl":
        return _kl(log_q, log_p)
    if divergence == "jsd":
        log_m = _log_mix(log_p, log_q, beta)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return _kl(log_p, _log_mix(log_p, log_q, skew))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, 0 log 0 = 0."""
    p = log_p.exp()
    # before the product: its gradient would be 0 times an infinity; NaN stays
    ratio = torch.where(p == 0, torch.zeros_like(p), log_p - log_q)
    return (p * ratio).sum(dim=-1)


def _log_mix(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q)."""
    tiny = torch.finfo(log_p.dtype).tiny
    mix = weight * log_p.exp() + (1 - weight) * log_q.exp()
    return torch.where(mix < tiny, tiny, mix).log()  # clamp would give NaN a gradient of 0
