"""`linear_kd_loss` with `workspace=0`: no logit is stored, the backward pass makes them again."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from clinkd.ops._checks import checking, raise_first
from clinkd.ops._impl import on_device
from clinkd.ops._linear_loss import Model, counted_rows, empty_gradients, of_rows
from clinkd.ops._operator import Operator, first_order

BANDS = 16  # of the vocabulary, each walked over by one program for each tile of rows
BAND_BYTES = 24 << 20  # of the logits' gradient, one band at a time
PIECE = 2048  # rows whose share of the hidden states' gradient is made at a time
STATISTICS = 7  # of a row, for its gradient
JSD = 2  # this and later divergences need both distributions before their sum


def _tiles(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    kd_weight: float,
    ignore_index: int,
    temperature: float,
    divergence: int,
    mix: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, sums of CE and KD [2], and what the gradient needs of the rows [7, N]; float32.

    Args:
        hidden: [N, Cs]; head: [Vs, Cs]; bias: [Vs]; the teacher's likewise.
        labels: [N], of which `ignore_index` counts for nothing.
        factor: [N] of each row.
        divergence: its place in `DIVERGENCES` of the reference.
        mix: its beta or skew.
        vocab_size: rows of the student's head that count.
    """
    counted = counted_rows(labels, ignore_index)
    parts = hidden.new_zeros(2, dtype=torch.float32)
    statistics = hidden.new_zeros(STATISTICS, len(labels), dtype=torch.float32)
    if len(counted) > 0:
        kernels = importlib.import_module("clinkd.kernels.linear_kd_loss")
        own, factor, student, teacher = _of_rows(
            counted, labels, factor, (hidden, head[:vocab_size], bias),
            (teacher_hidden, teacher_head, teacher_bias),
        )  # fmt: skip
        cap = softcap or None
        with on_device(hidden):
            found, picked = kernels.statistics(
                student, teacher, own, temperature, divergence, cap, BANDS
            )
        merged, ce, kd = _merge(found, picked, temperature, divergence == 1)
        if divergence >= JSD:
            with on_device(hidden):
                sums = kernels.mixture(
                    student, teacher, merged, temperature, divergence, mix, cap, BANDS
                ).sum(dim=1)
            kd, merged[6] = _mixture(sums, divergence, mix)
            kd = temperature**2 * kd
        right = (own >= 0) & (own < vocab_size)
        ce = torch.where(right, ce, torch.nan)
        if checking():
            rule = f"labels must be in 0 … {vocab_size - 1}, the student's vocabulary"
            raise_first(rule, ~right, counted)
            rule = "logits of both models must have no NaN and a finite maximum"
            raise_first(rule, ~(ce.isfinite() & ~kd.isnan()), counted)
        parts = torch.stack([(ce * factor).sum(), (kd * factor).sum()])
        statistics = statistics.index_copy_(1, counted, merged)
    return (parts[0] + kd_weight * parts[1]) / (1 + kd_weight), parts, statistics


def _tiles_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    statistics: Tensor,
    learns: list[bool],
    kd_weight: float,
    ignore_index: int,
    temperature: float,
    divergence: int,
    mix: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, head and bias; one that nobody asks for has no elements."""
    counted = counted_rows(labels, ignore_index)
    some = len(counted) > 0
    # that of the hidden states is made last, when there is room for it
    grads = empty_gradients(hidden, head, bias, [learns[0] and not some, *learns[1:]])
    for grad in grads:
        grad.zero_()
    if not some:
        return grads
    of_hidden, of_head, of_bias = grads
    kernels = importlib.import_module("clinkd.kernels.linear_kd_gradient")
    head = head[:vocab_size]
    own, factor, student, teacher = _of_rows(
        counted, labels, factor, (hidden, head, bias), (teacher_hidden, teacher_head, teacher_bias)
    )
    factor = factor * (grad_loss / (1 + kd_weight))
    factor = torch.where((own >= 0) & (own < vocab_size), factor, torch.nan)
    merged = statistics if len(counted) == len(labels) else statistics[:, counted]
    rows = len(own)
    sums = student[0].new_zeros(student[0].shape, dtype=torch.float32) if learns[0] else None
    columns = max(128, BAND_BYTES // (hidden.element_size() * rows) // 128 * 128)
    buffer = hidden.new_empty(rows, min(columns, -(-vocab_size // 128) * 128))
    for begin in range(0, vocab_size, buffer.shape[1]):
        with on_device(hidden):
            kernels.gradient_band(
                student, teacher, own, merged, factor, buffer, begin,
                temperature, kd_weight, divergence, mix, softcap or None,
            )  # fmt: skip
        band = slice(begin, min(begin + buffer.shape[1], vocab_size))
        grad = buffer[:, : band.stop - begin]
        if sums is not None:
            for piece in range(0, rows, PIECE):
                sums[piece : piece + PIECE] += grad[piece : piece + PIECE] @ head[band]
        if learns[1]:
            torch.mm(grad.T, student[0], out=of_head[band])
        if bias is not None and learns[2]:
            of_bias[band] = grad.sum(dim=0, dtype=torch.float32).to(bias.dtype)
    del buffer, grad  # before the last copy is made
    if sums is not None:
        of_hidden = sums.to(hidden.dtype)
        if rows < len(hidden) or not hidden.is_contiguous():
            of_hidden = torch.zeros_like(hidden).index_copy_(0, counted, of_hidden)
    return of_hidden, of_head, of_bias


def _of_rows(
    counted: Tensor, labels: Tensor, factor: Tensor, student: Model, teacher: Model
) -> tuple[Tensor, Tensor, Model, Model]:
    """What the kernels take of the rows that count."""
    models = [
        (_rows(of_rows(hidden, counted)), _rows(head), bias)
        for hidden, head, bias in (student, teacher)
    ]
    return of_rows(labels, counted), of_rows(factor, counted).float(), models[0], models[1]


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


def _fake(
    hidden: Tensor, head: Tensor, bias: Any, teacher: Any, weight: Any, other: Any, labels: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = labels.shape[0]
    loss, parts, statistics = (
        hidden.new_empty(shape, dtype=torch.float32) for shape in ((), (2,), (STATISTICS, rows))
    )
    return loss, parts, statistics


def _fake_backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head, bias = arguments[:3]
    return empty_gradients(hidden, head, bias, arguments[9])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings = inputs[:8], inputs[8:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


@first_order
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    learns = list(ctx.needs_input_grad[:3])
    if grad_loss is None or not any(learns):
        return (None,) * 15
    grads = _TILES_BACKWARD(grad_loss, *ctx.saved_tensors, learns, *ctx.settings)
    found = [grad if needed else None for grad, needed in zip(grads, learns, strict=True)]
    return (*found, *[None] * 12)


_TENSORS = (
    "Tensor hidden, Tensor head, Tensor? bias, Tensor teacher_hidden, Tensor teacher_head, "
    "Tensor? teacher_bias, Tensor labels, Tensor factor"
)
_OPTIONS = (
    "float kd_weight, int ignore_index, float temperature, int divergence, float mix, "
    "float softcap, int vocab_size"
)
_TILES_BACKWARD = Operator(
    "linear_kd_tiles_backward",
    f"(Tensor grad_loss, {_TENSORS}, Tensor statistics, bool[] learns, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _tiles_backward,
    _fake_backward,
)
LINEAR_KD_TILES = Operator(
    "linear_kd_tiles",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _tiles,
    _fake,
    _save,
    _backward,
)
