"""The distillation loss from a teacher's top logits and the student's hidden states."""

from torch import Tensor

from clinkd.ops._checks import (
    check_bias,
    check_devices,
    check_head,
    check_labels,
    check_num_items,
    check_options,
    check_top_rows,
    check_vocab_size,
    check_weight,
)
from clinkd.ops._impl import native_impl, resolve_impl
from clinkd.ops._kd_mean import KDLoss, item_count
from clinkd.ops._linear_topk_chunks import LINEAR_TOPK_KD
from clinkd.ops._row_chunks import chunk_rows
from clinkd.ops.kd_loss import IMPLS, why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES
from clinkd.ops.topk_kd_loss import check_top


def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    teacher_lse: Tensor,
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
    workspace: int | str = "auto",
    vocab_size: int | None = None,
    impl: str = "auto",
) -> KDLoss:
    """`topk_kd_loss` of `hidden @ weight.T + bias`, in row chunks; ignored rows are dropped first.

    Args:
        student_hidden: [N, Cs], gets a gradient, as do `student_weight` and `student_bias`.
        student_weight: [Vs, Cs], the output head.
        student_bias: [Vs].
        workspace: bytes that the logits of a chunk may take, or "auto", as for `linear_kd_loss`;
            above 0.
        vocab_size: as for `linear_kd_loss`.

    The other arguments are those of `topk_kd_loss`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    check_head("student", student_hidden, student_weight)
    check_vocab_size(vocab_size, student_weight)
    check_labels(labels, student_hidden.shape[0], ignore_index)
    check_top(teacher_logits, teacher_ids, teacher_lse, labels.shape[0])
    check_top_rows(teacher_logits, teacher_lse, labels, ignore_index)
    check_options(kd_weight, temperature, divergence, DIVERGENCES, beta, skew, softcap)
    check_weight(weight, labels.shape[0], learns=False)
    check_num_items(num_items)
    check_bias("student_bias", student_bias, student_weight)
    check_devices(
        labels,
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_logits=teacher_logits,
        teacher_ids=teacher_ids,
        teacher_lse=teacher_lse,
        weight=weight,
    )
    if workspace == 0:
        raise ValueError("workspace must be above 0: top-k distillation stores a chunk's logits")
    impl = resolve_impl(
        impl, IMPLS, native_impl(labels.device), why_not, labels.device, student_hidden.dtype
    )
    count = item_count(labels, ignore_index, num_items)
    mix = beta if divergence == "jsd" else skew
    columns = vocab_size or student_weight.shape[0]
    chunk = chunk_rows(workspace, student_weight[:columns])
    return LINEAR_TOPK_KD(
        (student_hidden, student_weight, student_bias), labels, weight, count, kd_weight,
        ignore_index, chunk, columns, "", teacher_logits.detach(), teacher_ids,
        teacher_lse.detach(), temperature, divergence, mix, softcap or 0.0, columns, impl,
        graph=impl != "reference",
    )  # fmt: skip
