"""`linear_kd_loss` with `workspace=0`: no logit is stored, the backward pass makes them again."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from clinkd.ops._checks import checking, raise_first
from clinkd.ops._operator import first_order

BANDS = 16  # of the vocabulary, each walked over by one program for each tile of rows
BAND_BYTES = 24 << 20  # of the logits' gradient, one band at a time
PIECE = 2048  # rows whose share of the hidden states' gradient is made at a time
JSD = 2  # this and later divergences need both distributions before their sum


class LinearKDTriton(torch.autograd.Function):
    """Sums over rows; all rows count.

    Takes student hidden [N, Cs], weight [Vs, Cs], bias [Vs] or None; the teacher's three; labels
    [N]; each row's weight [N] or None; its number for errors [N]; kd_weight, temperature,
    divergence (its place in `DIVERGENCES` of the reference), its beta or skew, softcap; rows of the
    student's head that count, or None for all.

    Gives the loss, and CE and KD [2] which have no gradient, float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        labels: Tensor,
        weight: Tensor | None,
        numbers: Tensor,
        kd_weight: float,
        temperature: float,
        divergence: int,
        mix: float,
        softcap: float | None,
        vocab_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        rows = student_hidden.shape[0]
        head = student_weight[:vocab_size]
        parts = student_hidden.new_zeros(2, dtype=torch.float32)
        merged = student_hidden.new_empty(7, rows, dtype=torch.float32)
        if rows > 0:
            kernels = importlib.import_module("clinkd.kernels.linear_kd_loss")
            student = (_rows(student_hidden), _rows(head), student_bias)
            teacher = (_rows(teacher_hidden), _rows(teacher_weight), teacher_bias)
            found, picked = kernels.statistics(
                student, teacher, labels, temperature, divergence, softcap, BANDS
            )
            merged, ce, kd = _merge(found, picked, temperature, divergence == 1)
            if divergence >= JSD:
                sums = kernels.mixture(
                    student, teacher, merged, temperature, divergence, mix, softcap, BANDS
                ).sum(dim=1)
                kd, merged[6] = _mixture(sums, divergence, mix)
                kd = temperature**2 * kd
            right = _in_vocabulary(labels, head)
            ce = torch.where(right, ce, torch.nan)
            if checking():
                rule = f"labels must be in 0 … {len(head) - 1}, the student's vocabulary"
                raise_first(rule, ~right, numbers)
                rule = "logits of both models must have no NaN and a finite maximum"
                raise_first(rule, ~(ce.isfinite() & ~kd.isnan()), numbers)
            if weight is not None:
                ce, kd = ce * weight, kd * weight
            parts = torch.stack([ce.sum(), kd.sum()])
        ctx.save_for_backward(
            student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight,
            teacher_bias, labels, weight, merged,
        )  # fmt: skip
        ctx.settings = (kd_weight, temperature, divergence, mix, softcap, vocab_size)
        ctx.mark_non_differentiable(parts)
        return (parts[0] + kd_weight * parts[1]) / (1 + kd_weight), parts

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student, whole, bias, teacher, teacher_head, teacher_bias, labels, weight, merged = (
            ctx.saved_tensors
        )
        kd_weight, temperature, divergence, mix, softcap, vocab_size = ctx.settings
        head = whole[:vocab_size]
        needs = ctx.needs_input_grad[:3]
        rows, V = student.shape[0], head.shape[0]
        sums = student.new_zeros(student.shape, dtype=torch.float32) if needs[0] else None
        grads = [
            torch.zeros_like(whole) if needs[1] else None,
            torch.zeros_like(bias) if needs[2] and bias is not None else None,
        ]
        if rows > 0:
            kernels = importlib.import_module("clinkd.kernels.linear_kd_gradient")
            factor = (grad_loss / (1 + kd_weight)).expand(rows)
            factor = factor.contiguous() if weight is None else factor * weight
            factor = torch.where(_in_vocabulary(labels, head), factor.float(), torch.nan)
            columns = max(128, BAND_BYTES // (student.element_size() * rows) // 128 * 128)
            buffer = student.new_empty(rows, min(columns, -(-V // 128) * 128))
            for begin in range(0, V, buffer.shape[1]):
                kernels.gradient_band(
                    (_rows(student), _rows(head), bias),
                    (_rows(teacher), _rows(teacher_head), teacher_bias),
                    labels, merged, factor, buffer, begin,
                    temperature, kd_weight, divergence, mix, softcap,
                )  # fmt: skip
                band = slice(begin, min(begin + buffer.shape[1], V))
                grad = buffer[:, : band.stop - begin]
                if sums is not None:
                    for piece in range(0, rows, PIECE):
                        sums[piece : piece + PIECE] += grad[piece : piece + PIECE] @ head[band]
                if grads[0] is not None:
                    torch.mm(grad.T, student, out=grads[0][band])
                if grads[1] is not None:
                    grads[1][band] = grad.sum(dim=0, dtype=torch.float32).to(bias.dtype)
            del buffer, grad  # before the last copy is made
        first = None if sums is None else sums.to(student.dtype)
        return (first, *grads, *[None] * 12)


def _in_vocabulary(labels: Tensor, weight: Tensor) -> Tensor:
    return (labels >= 0) & (labels < weight.shape[0])


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _merge(
    found: Tensor, picked: Tensor, temperature: float, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of all bands, [7, N]; and CE and KD of each row, KD of no mixture."""
    tops, logs = found[0:6:2], found[1:6:2]  # student, student at T, teacher at T; [3, bands, N]
    scale = tops.new_tensor([1.0, 1 / temperature, 1 / temperature])[:, None] / math.log(2)
    top = tops.amax(dim=1)  # [3, N]
    below = torch.where(tops > -torch.inf, (top[:, None] - tops) * scale[:, None], torch.inf)
    shares = torch.exp2(logs - below)  # [3, bands, N]
    log = torch.log2(shares.sum(dim=1))
    owner = 1 if reverse else 2  # whose probabilities weight the mean
    share = shares[owner] / torch.exp2(log[owner])  # [bands, N]
    # means of logits relative to a band's largest; a band without common columns has no share
    moved = below[owner] - below[3 - owner]
    mean = torch.where(share > 0, share * (found[6] - moved), 0).sum(dim=0)
    difference = mean - (log[owner] - log[3 - owner])
    # rounding alone can make it negative
    kd = temperature**2 * math.log(2) * difference.clamp(min=0)
    ce = (top[0] - picked) + math.log(2) * log[0]
    # the mean log-ratio is what the gradient of the reverse form takes off
    merged = torch.stack([t for pair in zip(top, log, strict=True) for t in pair] + [difference])
    return merged, ce, kd


def _mixture(sums: Tensor, divergence: int, mix: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and what its gradient takes off, from the sums [2, N]."""
    if divergence == JSD:
        return mix * sums[0] + (1 - mix) * sums[1], (1 - mix) * sums[1]
    return sums[0], (mix - 1) * sums[1]
