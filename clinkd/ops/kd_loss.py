"""Cross-entropy and knowledge distillation over given logits."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clinkd.ops._checks import (
    check_devices,
    check_labels,
    check_logits,
    check_num_items,
    check_options,
    check_rows,
    check_weight,
)
from clinkd.ops._impl import native_impl, resolve_impl, why_not_native
from clinkd.ops._kd_at_once import WithGradient, rows_with_gradient, why_not_at_once
from clinkd.ops._kd_loss_native import KD_ROWS, operator_options
from clinkd.ops._kd_mean import (
    KDLoss,
    MeanOfRows,
    has_gradient,
    item_count,
    mean_rows,
    weight_of_counted,
)
from clinkd.ops._operator import is_traced, out_of_inference
from clinkd.ops._vocab_parallel import KD_WHOLE_ROWS, check_columns
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows

IMPLS = ("auto", "reference", "cpu", "cuda")


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    process_group: dist.ProcessGroup | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> KDLoss:
    """The distillation loss of logits, see `clinkd.ops.reference.kd_loss` for the formula.

    Args:
        student_logits: [N, Vs], gets the gradient.
        teacher_logits: [N, Vt].
        labels: [N] int64, already shifted.
        kd_weight: a in (CE + a KD) / (1 + a); the paper's alpha.
        temperature: T > 0.
        divergence: forward_kl, reverse_kl, jsd (with `beta`) or skew_kl (with `skew`).
        ignore_index: tokens with this label count for nothing.
        weight: [N] factor of each token.
        num_items: divisor of the sum over tokens; default: the number of labelled tokens. Give the
            count of the whole optimiser step where batches are accumulated or sharded.
        softcap: Gemma's logit cap, in both models.
        process_group: the vocabulary is cut over these ranks: rank r gives the logits of columns
            `r * V … (r + 1) * V - 1` of both models (a column that is none: -inf), and the labels
            of the whole vocabulary. All ranks get the loss, each the gradient of its columns. A
            softcap makes -inf finite: with one, cut a vocabulary that all ranks can share evenly.
        inplace: the gradient takes the place of student_logits, which nobody may need any more;
            where a graph does, its backward pass raises. Nothing of the logits' size is allocated.
            A traced graph, as of `torch.compile`, has its memory from the compiler, and ignores it.
        impl: "auto", "reference", "cpu" or "cuda". The kernels read both logits once for the loss
            and once for the gradient, and keep seven numbers a row between the two; logits of two
            dtypes are widened to the larger first. On the CPU, and on sm_90 with
            CLINKD_KD_CLUSTER=1 in the environment, a loss whose gradient may be asked for makes it
            in the forward pass, row by row, in one read; not of float16 logits.

    With CLINKD_CHECK=1 in the environment a row without a finite maximum, with a NaN or a label out
    of range is an error that names it; without, it gives NaN.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    check_logits("student_logits", student_logits, "[N, Vs]")
    check_logits("teacher_logits", teacher_logits, "[N, Vt]")
    check_labels(labels, student_logits.shape[0], ignore_index)
    if teacher_logits.shape[0] != student_logits.shape[0]:
        raise ValueError(
            f"teacher_logits must have N = {student_logits.shape[0]} rows, "
            f"got shape {tuple(teacher_logits.shape)}"
        )
    check_options(kd_weight, temperature, divergence, DIVERGENCES, beta, skew, softcap)
    check_weight(weight, student_logits.shape[0])
    check_num_items(num_items)
    check_devices(
        labels, student_logits=student_logits, teacher_logits=teacher_logits, weight=weight
    )
    weight = weight_of_counted(weight, labels, ignore_index)
    if process_group is None:
        check_rows(student_logits, teacher_logits, labels, ignore_index)
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    impl = resolve_impl(impl, IMPLS, native_impl(labels.device), why_not, labels.device, dtype)
    if process_group is not None:
        require_kernels(impl)
        check_columns(student_logits.shape[1], teacher_logits.shape[1])
    count = item_count(labels, ignore_index, num_items)
    traced = is_traced(student_logits, teacher_logits, labels, weight)
    if inplace and not traced:
        _check_inplace(student_logits, dtype, impl, process_group, has_gradient(weight, count))
    if impl == "reference":
        ce, kd = kd_loss_rows(
            student_logits,
            teacher_logits,
            labels,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            skew=skew,
            ignore_index=ignore_index,
            softcap=softcap,
        )
    else:
        options = operator_options(temperature, divergence, beta, skew, ignore_index, softcap, impl)
        teacher = teacher_logits.detach().to(dtype)
        parts = (student_logits.to(dtype), teacher if traced else out_of_inference(teacher), labels)
        if process_group is not None:
            ce, kd, *_ = KD_WHOLE_ROWS(*parts, process_group.group_name, *options)
        elif traced or has_gradient(weight, count):
            ce, kd, _ = KD_ROWS(*parts, *options)
        elif _gradient_at_once(*parts[:2], impl):
            return _loss_with_gradient(parts, options, kd_weight, weight, count, inplace)
        else:
            return KDLoss(*MeanOfRows.apply(*parts, weight, count, kd_weight, options, inplace))
    return mean_rows(ce, kd, kd_weight, weight, count)


def _check_inplace(
    student: Tensor,
    dtype: torch.dtype,
    impl: str,
    group: dist.ProcessGroup | None,
    weight_learns: bool,
) -> None:
    """Raise unless the gradient can be written over the logits."""
    for logits in (student, student._base):  # a view's own memory
        if logits is not None and logits.is_leaf and logits.requires_grad:
            raise ValueError(
                "inplace must be False where student_logits are a leaf of the graph, or lie in one"
            )
    if student.dtype != dtype:
        raise ValueError(
            f"inplace must be False where student_logits are not {dtype}, the wider type of both "
            f"models, got {student.dtype}"
        )
    if student.stride(1) != 1 or (student.shape[0] > 1 and student.stride(0) < student.shape[1]):
        raise ValueError(
            "inplace must be False where columns of student_logits do not lie side by side or rows "
            f"share memory, got strides {student.stride()}"
        )
    if impl == "reference" or group is not None or weight_learns:
        raise ValueError(
            "inplace must be False with impl='reference', a process_group or a weight that needs a "
            "gradient"
        )


def _gradient_at_once(student: Tensor, teacher: Tensor, impl: str) -> bool:
    """Whether the forward pass makes the gradient too.

    Not of float16: what scales its loss up must do so before the gradient is rounded.
    """
    if student.dtype == torch.float16 or not (torch.is_grad_enabled() and student.requires_grad):
        return False
    return why_not_at_once(impl, student, teacher) is None


def _loss_with_gradient(
    parts: tuple[Tensor, Tensor, Tensor],
    options: tuple[Any, ...],
    kd_weight: float,
    weight: Tensor | None,
    count: Tensor | int,
    inplace: bool,
) -> KDLoss:
    """Loss and gradient of logits by `rows_with_gradient`."""
    student, teacher, labels = parts
    factor = torch.ones_like(labels, dtype=torch.float32) if weight is None else weight
    factor = factor / count / (1 + kd_weight)
    logits = student.detach()
    ce, kd, grad = rows_with_gradient(
        factor, factor * kd_weight, logits, teacher, labels, *options,
        grad=logits if inplace else None,
    )  # fmt: skip
    found = mean_rows(ce, kd, kd_weight, weight, count)
    return found._replace(loss=WithGradient.apply(student, found.loss, grad, inplace))


def why_not(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run for such logits; None where it can."""
    return why_not_native("kd_loss", "kd_statistics", impl, device, dtype)


def require_kernels(impl: str) -> None:
    """Raise where a vocabulary over several processes would have no kernel."""
    if impl == "reference":
        raise RuntimeError(
            "process_group needs impl='cpu' or 'cuda', float32, float16 or bfloat16 logits and "
            "clinkd._C; see `clinkd doctor`"
        )
