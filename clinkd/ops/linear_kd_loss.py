"""The distillation loss from hidden states: a chunk of the logits exists at a time, or none."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clinkd.ops._checks import check_float, check_labels, check_options, check_rows
from clinkd.ops._impl import native_impl, resolve_impl, why_not_triton
from clinkd.ops._kd_loss_native import gradient_in_place, operator_options
from clinkd.ops._linear_kd_triton import DIVERGENCES as ONE_WALK
from clinkd.ops._linear_kd_triton import LinearKDTriton
from clinkd.ops.kd_loss import IMPLS, KDLoss, default_num_items, why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows

WORKSPACE_BYTES = 512 << 20  # of logits at a time, student's and teacher's together
LEAST_ROWS = {False: 64, True: 256}  # on a GPU: fewer would only reread the weights


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
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
    teacher_bias: Tensor | None = None,
    workspace: int | str = "auto",
    impl: str = "auto",
) -> KDLoss:
    """`kd_loss` of `hidden @ weight.T + bias`, in row chunks; ignored rows are dropped first.

    Args:
        student_hidden: [N, Cs], gets a gradient, as do `student_weight` and `student_bias`.
        student_weight: [Vs, Cs], the output head.
        teacher_hidden: [N, Ct].
        teacher_weight: [Vt, Ct].
        labels: [N] int64, already shifted.
        student_bias: [Vs].
        teacher_bias: [Vt].
        workspace: bytes that the logits of a chunk may take, or "auto" (512 MB, at least 256 rows
            on a GPU, 64 elsewhere). 0: no logit is stored at all; Triton kernels make them tile by
            tile, twice, for forward_kl and reverse_kl.
        impl: of the row kernel between the matrix products, as for `kd_loss`.

    The other arguments are those of `kd_loss`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl`, or `workspace=0`, that cannot run here.
    """
    rows = student_hidden.shape[0]
    for name, hidden, head in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        check_float(f"{name}_hidden", hidden, 2, "[N, C]")
        check_float(f"{name}_weight", head, 2, "[V, C]")
        if hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{name}_weight must be [V, C] with C = {hidden.shape[1]} as in {name}_hidden, "
                f"got shape {tuple(head.shape)}"
            )
    if teacher_hidden.shape[0] != rows:
        raise ValueError(
            f"teacher_hidden must have N = {rows} rows, got shape {tuple(teacher_hidden.shape)}"
        )
    check_labels(labels, rows)
    check_options(kd_weight, temperature, divergence, DIVERGENCES, beta, skew)
    count = default_num_items(labels, ignore_index) if num_items is None else num_items
    kept = (labels != ignore_index).nonzero().squeeze(1)
    tensors = (
        student_hidden[kept],
        student_weight,
        student_bias,
        teacher_hidden.detach()[kept],
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        labels[kept],
        None if weight is None else weight[kept],
        kept,
        kd_weight,
    )
    device, dtype = labels.device, student_hidden.dtype
    if workspace == 0:
        if divergence not in ONE_WALK:
            raise ValueError(
                f"workspace must be above 0 for {divergence}: it needs both distributions before "
                f"its sum; 0 takes {' and '.join(ONE_WALK)}"
            )
        if reason := why_not_triton(device, dtype):
            raise RuntimeError(f"workspace=0 cannot run here: {reason}")
        loss, parts = LinearKDTriton.apply(
            *tensors, temperature, divergence == "reverse_kl", softcap
        )
    else:
        wide = torch.promote_types(dtype, teacher_hidden.dtype)
        impl = resolve_impl(impl, IMPLS, native_impl(device), why_not, device, wide)
        rows = _chunk_rows(workspace, student_weight, teacher_weight)
        kind = (temperature, divergence, beta, skew, ignore_index, softcap, impl)
        loss, parts = _LinearKDLoss.apply(*tensors, kind, rows)
    parts = parts.detach() / count
    return KDLoss(loss / count, parts[0], parts[1])


def _chunk_rows(workspace: int | str, student_weight: Tensor, teacher_weight: Tensor) -> int:
    row = sum(w.shape[0] * w.element_size() for w in (student_weight, teacher_weight))
    if workspace == "auto":
        least = LEAST_ROWS[student_weight.device.type == "cuda"]
        return max(least, WORKSPACE_BYTES // row)
    if not isinstance(workspace, int) or workspace < 0:
        raise ValueError(f"workspace must be a number of bytes, 0 or 'auto', got {workspace!r}")
    return max(1, workspace // row)


class _LinearKDLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, and scaled in the backward pass."""

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
        kind: tuple[Any, ...],
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3]
        compute = torch.promote_types(student_hidden.dtype, torch.float32)
        inputs = (student_hidden, student_weight, student_bias)
        grads = [
            torch.zeros_like(tensor, dtype=compute) if need and tensor is not None else None
            for tensor, need in zip(inputs, needs, strict=True)
        ]
        parts = student_hidden.new_zeros(2, dtype=compute)  # sums of CE and KD
        for start in range(0, student_hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden = student_hidden[rows]
            found, grad = _chunk(
                F.linear(hidden, student_weight, student_bias),
                F.linear(teacher_hidden[rows], teacher_weight, teacher_bias),
                labels[rows],
                None if weight is None else weight[rows],
                numbers[rows],
                kd_weight,
                kind,
                any(needs),
            )
            parts += found
            if grad is None:
                continue
            if grads[0] is not None:
                grads[0][rows] = grad @ student_weight
            if grads[1] is not None:
                if grad.dtype == compute:
                    grads[1].addmm_(grad.T, hidden)
                else:
                    grads[1] += grad.T @ hidden
            if grads[2] is not None:
                grads[2] += grad.sum(dim=0, dtype=compute)
        ctx.save_for_backward(
            *(
                grad.to(tensor.dtype)
                for grad, tensor in zip(grads, inputs, strict=True)
                if grad is not None and tensor is not None
            )
        )
        ctx.present = [g is not None for g in grads]
        return (parts[0] + kd_weight * parts[1]) / (1 + kd_weight), parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = []
        for present in ctx.present:
            grad = next(saved) if present else None
            grads.append(None if grad is None else grad * grad_loss.to(grad.dtype))
        return (*grads, *([None] * 9))


def _chunk(
    logits: Tensor,
    target: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    numbers: Tensor,
    kd_weight: float,
    kind: tuple[Any, ...],
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of CE and KD [2], and the gradient of the logits, which may take their place."""
    temperature, divergence, beta, skew, ignore_index, softcap, impl = kind
    check_rows(logits, target, labels, ignore_index, numbers)
    if impl == "reference":
        with torch.set_grad_enabled(needs_grad):
            logits = logits.detach().requires_grad_(needs_grad)
            ce, kd = kd_loss_rows(
                logits, target, labels, temperature=temperature, divergence=divergence,
                beta=beta, skew=skew, ignore_index=ignore_index, softcap=softcap,
            )  # fmt: skip
            if weight is not None:
                ce, kd = ce * weight, kd * weight
            loss = (ce.sum() + kd_weight * kd.sum()) / (1 + kd_weight)
        parts = torch.stack([ce.detach().sum(), kd.detach().sum()])
        return parts, torch.autograd.grad(loss, logits)[0] if needs_grad else None
    dtype = logits.dtype
    wide = torch.promote_types(dtype, target.dtype)
    logits, target = logits.to(wide), target.to(wide)
    options = operator_options(*kind)
    ce, kd, statistics = torch.ops.clinkd.kd_rows(logits, target, labels, *options)
    factor = torch.full_like(ce, 1 / (1 + kd_weight))
    if weight is not None:
        ce, kd, factor = ce * weight, kd * weight, factor * weight
    parts = torch.stack([ce.sum(), kd.sum()])
    if not needs_grad:
        return parts, None
    gradient_in_place(factor, factor * kd_weight, logits, target, labels, statistics, *options)
    return parts, logits.to(dtype)
