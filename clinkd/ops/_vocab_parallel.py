"""The rows of `kd_loss` where each process holds a part of the vocabulary's columns.

Three sums over the processes: the largest logits, the sums of exponentials relative to them, and
the divergence, whose every term needs the whole row's sums.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clinkd.ops._kd_loss_native import (
    KD_DIVERGENCE,
    KD_ROWS,
    KD_ROWS_BACKWARD,
    OPTIONS,
    empty_rows,
)
from clinkd.ops._operator import Operator, first_order
from clinkd.ops.reference.kd_loss import DIVERGENCES

IGNORED = -1


def whole_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    name: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE and KD [N]; statistics [N, 7] of the whole rows and this rank's labels for the gradient.

    Rank r of the group of that name holds columns `r * V … (r + 1) * V - 1` of the student, and as
    many of the teacher. The sums are of the whole vocabulary, the same on all ranks. The gradient
    of this rank's columns is that of `kd_rows` with these statistics and labels. A rank with
    another number of columns, or a label that no rank has, gives NaN.
    """
    group = group_named(name)
    temperature, ignore_index = options[0], options[3]
    columns = student.shape[1]
    ignored = labels == ignore_index
    label = labels - dist.get_rank(group) * columns  # [N]
    owned = (label >= 0) & (label < columns) & ~ignored
    label = torch.where(owned, label, columns).masked_fill(ignored, IGNORED)
    # a label of another rank: any of this one's columns will do for the sums
    inner = label.clamp(max=columns - 1)
    forward = (temperature, DIVERGENCES.index("forward_kl"), *local_options(options)[2:])
    ce, _, own = KD_ROWS(student, teacher, inner, *forward)

    tops, inverses = own[:, 0:6:2], own[:, 1:6:2]  # [N, 3]: at T = 1, at T, the teacher's
    sums = torch.where(tops == -torch.inf, 0, 1 / inverses)
    width = tops.new_tensor([[columns, -columns, 0]])
    most = _all_reduce(torch.cat([tops, width]), dist.ReduceOp.MAX, group)
    even = most[-1, 0] == -most[-1, 1]
    tops_all = most[:-1]
    scale = tops.new_tensor([1, 1 / temperature, 1 / temperature])
    above = ((tops - tops_all.clamp(min=torch.finfo(tops.dtype).min)) * scale).exp()
    picked = tops[:, 0] - tops_all[:, 0] - inverses[:, 0].log() - ce  # relative to the top
    found = torch.stack([torch.where(owned, picked, 0), owned.to(picked.dtype)], dim=1)
    total = _all_reduce(torch.cat([sums * above, found], dim=1), dist.ReduceOp.SUM, group)

    sound = (total[:, 4] == 1) & even
    statistics = torch.zeros_like(own)
    statistics[:, 0:6:2] = tops_all
    statistics[:, 1:6:2] = torch.where(sound[:, None], 1 / total[:, :3], torch.nan)
    statistics.masked_fill_(ignored[:, None], 0)
    whole = KD_DIVERGENCE(student, teacher, label, statistics, *local_options(options))
    value, statistics[:, 6] = _all_reduce(whole, dist.ReduceOp.SUM, group).unbind(1)
    ce = torch.where(sound, total[:, 0].log() - total[:, 3], torch.nan).masked_fill(ignored, 0)
    return ce, temperature**2 * value, statistics, label


def check_columns(student: int, teacher: int) -> None:
    """Raise unless a rank has as many columns of the teacher as of the student.

    Its place in the vocabulary is counted by them.
    """
    if student != teacher:
        raise ValueError(
            "with a process_group a rank must have as many columns of the teacher as of the "
            f"student, got {teacher} and {student}: pad the shorter with columns of -inf"
        )


def check_shards(name: str, head: Tensor) -> None:
    """Raise on every rank of a group unless all have heads [V, C] of as many rows.

    Chunks of rows are as many as a head's width allows: ranks with others would not meet again.
    """
    width = torch.tensor([len(head), -len(head)], device=head.device)
    most, least = _all_reduce(width, dist.ReduceOp.MAX, group_named(name)).tolist()
    if most != -least:
        raise ValueError(
            "all ranks of a process_group must have as many rows of the heads, got from "
            f"{-least} to {most}: pad with rows whose bias is -inf"
        )


def group_named(name: str) -> dist.ProcessGroup:
    """The process group: operators know it by its name, as torch's own of distributed graphs do."""
    group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return group


def local_options(options: Sequence[Any]) -> tuple[Any, ...]:
    """The operators' options, with the mark of an ignored row that no rank's label can have."""
    temperature, divergence, mix, _, softcap, impl = options
    return (temperature, divergence, mix, IGNORED, softcap, impl)


def _all_reduce(values: Tensor, op: Any, group: dist.ProcessGroup) -> Tensor:
    values = values.contiguous()
    dist.all_reduce(values, op=op, group=group)
    return values


def _fake(
    student: Tensor, teacher: Tensor, labels: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_rows(student), torch.empty_like(labels)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, _, _, *options = inputs
    ctx.options = local_options(options)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(student, teacher, output[3], output[2])


@first_order
def _backward(ctx: Any, grad_ce: Tensor, grad_kd: Tensor, *_: Tensor) -> tuple[Any, ...]:
    student, teacher, label, statistics = ctx.saved_tensors
    given = (student, teacher, label, statistics)
    return (KD_ROWS_BACKWARD(grad_ce, grad_kd, *given, *ctx.options), *[None] * 9)


KD_WHOLE_ROWS = Operator(
    "kd_whole_rows",
    f"(Tensor student, Tensor teacher, Tensor labels, str group, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    whole_rows,
    _fake,
    _save,
    _backward,
)
