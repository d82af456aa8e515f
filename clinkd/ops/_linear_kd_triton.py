"""`linear_kd_loss` with `workspace=0`: no logit is stored, the backward pass makes them again."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

BANDS = 16  # of the vocabulary, each walked over by one program for each tile of rows
BAND_BYTES = 32 << 20  # of the logits' gradient, one band at a time
DIVERGENCES = ("forward_kl", "reverse_kl")  # whose sums need no other sum first


class LinearKDTriton(torch.autograd.Function):
    """Sums over rows; all rows count.

    Takes student hidden [N, Cs], weight [Vs, Cs], bias [Vs] or None; the teacher's three; labels
    [N]; each row's weight [N] or None; kd_weight, temperature, reverse, softcap.

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
        kd_weight: float,
        temperature: float,
        reverse: bool,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        rows = student_hidden.shape[0]
        parts = student_hidden.new_zeros(2, dtype=torch.float32)
        merged = student_hidden.new_empty(4, rows, dtype=torch.float32)
        if rows > 0:
            kernels = importlib.import_module("clinkd.kernels.linear_kd_loss")
            found = kernels.statistics(
                (_rows(student_hidden), _rows(student_weight), student_bias),
                (_rows(teacher_hidden), _rows(teacher_weight), teacher_bias),
                labels,
                temperature,
                reverse,
                softcap,
                BANDS,
            )
            merged, ce, kd = _merge(found, temperature, reverse)
            if weight is not None:
                ce, kd = ce * weight, kd * weight
            parts = torch.stack([ce.sum(), kd.sum()])
        ctx.save_for_backward(
            student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight,
            teacher_bias, labels, weight, merged,
        )  # fmt: skip
        ctx.settings = (kd_weight, temperature, reverse, softcap)
        ctx.mark_non_differentiable(parts)
        return (parts[0] + kd_weight * parts[1]) / (1 + kd_weight), parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student, head, bias, teacher, teacher_head, teacher_bias, labels, weight, merged = (
            ctx.saved_tensors
        )
        kd_weight, temperature, reverse, softcap = ctx.settings
        needs = ctx.needs_input_grad[:3]
        rows, V = student.shape[0], head.shape[0]
        sums = torch.zeros(student.shape, dtype=torch.float32, device=student.device)
        grads = [
            sums if needs[0] else None,
            torch.zeros_like(head) if needs[1] else None,
            torch.zeros_like(bias) if needs[2] and bias is not None else None,
        ]
        if rows > 0:
            kernels = importlib.import_module("clinkd.kernels.linear_kd_loss")
            factor = (grad_loss / (1 + kd_weight)).expand(rows)
            factor = factor.contiguous() if weight is None else factor * weight
            columns = max(128, BAND_BYTES // (student.element_size() * rows) // 128 * 128)
            buffer = student.new_empty(rows, min(columns, -(-V // 128) * 128))
            for begin in range(0, V, buffer.shape[1]):
                kernels.gradient_band(
                    (_rows(student), _rows(head), bias),
                    (_rows(teacher), _rows(teacher_head), teacher_bias),
                    labels, merged, factor.float(), buffer, begin,
                    temperature, kd_weight, reverse, softcap,
                )  # fmt: skip
                band = slice(begin, min(begin + buffer.shape[1], V))
                grad = buffer[:, : band.stop - begin]
                if grads[0] is not None:
                    sums += grad @ head[band]
                if grads[1] is not None:
                    torch.mm(grad.T, student, out=grads[1][band])
                if grads[2] is not None:
                    grads[2][band] = grad.sum(dim=0, dtype=torch.float32).to(bias.dtype)
        first = sums.to(student.dtype) if needs[0] else None
        return (first, grads[1], grads[2], *[None] * 9)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _merge(found: Tensor, temperature: float, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of all bands, [4, N] in powers of two; and CE and KD of each row."""
    bands = found[:3] * math.log(2)
    sums = torch.logsumexp(bands, dim=1)  # [3, N]: student, student at T, teacher at T
    owner = 1 if reverse else 2  # whose probabilities weight the mean
    share = (bands[owner] - sums[owner]).exp()  # [bands, N]
    mean = (share * found[3]).sum(dim=0)  # of the difference of scores, in powers of two
    other = 3 - owner
    difference = mean * math.log(2) - sums[owner] + sums[other]
    kd = temperature**2 * difference.clamp(min=0)  # rounding alone can make it negative
    ce = sums[0] - found[4].sum(dim=0)
    # the mean log-ratio, which the gradient of the reverse form takes off
    merged = torch.cat([sums / math.log(2), (difference / math.log(2))[None]])
    return merged, ce, kd
