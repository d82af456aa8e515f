"""The distillation loss from hidden states: a chunk of the logits exists at a time, or none."""

import torch
import torch.distributed as dist
from torch import Tensor

from clinkd.ops._checks import (
    check_bias,
    check_devices,
    check_head,
    check_labels,
    check_num_items,
    check_options,
    check_vocab_size,
    check_weight,
)
from clinkd.ops._impl import native_impl, resolve_impl, why_not_triton
from clinkd.ops._kd_mean import KDLoss, divided, item_count
from clinkd.ops._linear_kd_chunks import LINEAR_KD
from clinkd.ops._linear_kd_triton import LINEAR_KD_TILES
from clinkd.ops._row_chunks import chunk_rows, shares
from clinkd.ops._vocab_parallel import check_columns
from clinkd.ops.kd_loss import IMPLS, require_kernels, why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES


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
    process_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
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
        workspace: bytes that the logits of a chunk may take, or "auto" (1 GB and at least
            256 rows on a GPU, 640 MB and 64 rows elsewhere). 0: no logit is stored at all; Triton
            kernels make them tile by tile, twice for forward_kl and reverse_kl, three times for jsd
            and skew_kl.
        process_group: as for `kd_loss`; rank r gives rows `r * V … (r + 1) * V - 1` of both heads,
            all of them the same hidden states, whose gradient is summed over the ranks. All ranks
            have as many rows of each head: pad with rows whose bias is -inf, unless with a softcap.
        vocab_size: rows of the student's head that stand for tokens; the rest, which pads the head
            to a round size, takes no part and gets a zero gradient. Of a teacher give
            `teacher_weight[:size]`. Default: all.
        impl: of the row kernel between the matrix products, as for `kd_loss`.

    The other arguments are those of `kd_loss`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl`, or `workspace=0`, that cannot run here.
    """
    rows = student_hidden.shape[0]
    check_head("student", student_hidden, student_weight)
    check_head("teacher", teacher_hidden, teacher_weight)
    if teacher_hidden.shape[0] != rows:
        raise ValueError(
            f"teacher_hidden must have N = {rows} rows, got shape {tuple(teacher_hidden.shape)}"
        )
    check_labels(labels, rows, ignore_index)
    check_vocab_size(vocab_size, student_weight)
    check_options(kd_weight, temperature, divergence, DIVERGENCES, beta, skew, softcap)
    check_weight(weight, rows, learns=False)
    check_num_items(num_items)
    check_bias("student_bias", student_bias, student_weight)
    check_bias("teacher_bias", teacher_bias, teacher_weight)
    check_devices(
        labels,
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        weight=weight,
    )
    count = item_count(labels, ignore_index, num_items)
    device, dtype = labels.device, student_hidden.dtype
    student = (student_hidden, student_weight, student_bias)
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    teacher = (teacher_hidden.detach(), teacher_weight.detach(), teacher_bias)
    columns = vocab_size or student_weight.shape[0]
    kind = (temperature, DIVERGENCES.index(divergence), beta if divergence == "jsd" else skew)
    cap = softcap or 0.0
    if workspace == 0:
        _require_no_storage(process_group, student, teacher)
        factor, count = shares(weight, labels, count, dtype)
        settings = (kd_weight, ignore_index, *kind, cap, columns)
        loss, parts, _ = LINEAR_KD_TILES(*student, *teacher, labels, factor, *settings)
        return divided(loss, parts, count)
    wide = torch.promote_types(dtype, teacher_hidden.dtype)
    impl = resolve_impl(impl, IMPLS, native_impl(device), why_not, device, wide)
    group = ""
    if process_group is not None:
        require_kernels(impl)
        if vocab_size is not None:
            raise ValueError("vocab_size cannot be given with a process_group: cut the heads")
        check_columns(student_weight.shape[0], teacher_weight.shape[0])
        group = process_group.group_name
    chunk = chunk_rows(workspace, student_weight[:columns], teacher_weight)
    sizes = (chunk, columns, group)
    return LINEAR_KD(
        student, labels, weight, count, kd_weight, ignore_index, *sizes, *teacher, *kind, cap, impl,
        graph=impl != "reference",
    )  # fmt: skip


def _require_no_storage(
    group: dist.ProcessGroup | None,
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Raise where the form that stores no logit cannot be had."""
    if group is not None:
        raise ValueError("workspace must be above 0 with a process_group")
    if reason := why_not_triton(student[0].device, student[0].dtype):
        raise RuntimeError(f"workspace=0 cannot run here: {reason}")
    for name, (hidden, head, _) in (("student", student), ("teacher", teacher)):
        if hidden.dtype != head.dtype:  # autocast
            raise TypeError(
                f"{name}_weight must be {hidden.dtype} as {name}_hidden is for workspace=0, "
                f"got {head.dtype}"
            )
