"""`kd_loss` with its gradient in the forward pass, a row at a time.

The kernels of `_kd_loss_native` read both models' logits for the loss and again for the gradient.
Here the gradient follows at once, at a scale of 1, and the backward pass multiplies it by what
comes in, unless that is 1. On the CPU the row is still in its cache. On sm_90 a cluster of blocks
holds it; that is slower than two reads on an H200 (docs/results/h200.md), so it needs a request,
CLINKD_KD_CLUSTER=1.
"""

import os
import re
from typing import Any

import torch
from torch import Tensor

from clinkd.ops import _kd_loss_native as native
from clinkd.ops._impl import built, extension, graph_is_kept, why_not_native, wrote
from clinkd.ops._memory import fresh_like
from clinkd.ops._operator import first_order

SWITCH = "CLINKD_KD_CLUSTER"
KERNELS = {"cpu": "at_once", "cuda": "cluster"}


def why_no_clusters(device: torch.device) -> str | None:
    """Why the two-pass kernels run on a device, whatever the logits; None where clusters do."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it takes a GPU of compute capability 9.0"
    if not (built("kd_cluster_cuda") and re.search(r"\b90", extension().cuda_archs)):
        return "clinkd._C has no code for sm_90"
    if os.environ.get(SWITCH) != "1":
        return f"it is slower than two reads on an H200; {SWITCH}=1 turns it on"
    return None


def why_not_at_once(impl: str, student: Tensor, teacher: Tensor) -> str | None:
    """Why the two-pass kernels run for logits of one type; None where the gradient comes at once.

    Args:
        impl: "cpu" or "cuda".
        student: [N, Vs].
        teacher: [N, Vt].
    """
    if torch.compiler.is_compiling():
        return "a compiled graph may not scale the gradient in place"
    if impl == "cpu":
        wide = student.stride(1) != 1 or teacher.stride(1) != 1
        return "columns must lie side by side" if wide else None
    if os.environ.get(SWITCH) != "1":  # before anything that costs time
        return f"{SWITCH} is not 1"
    if reason := why_no_clusters(student.device):
        return reason
    columns, size = student.shape[1], student.element_size()
    if extension().kd_cluster_bytes(columns, size) > extension().kd_cluster_most_bytes:
        return f"{columns} columns of {size} bytes do not fit into a cluster's shared memory"
    starts = [columns * size]  # where a gradient of its own has its rows
    for logits in (student, teacher):
        if logits.stride(1) != 1:
            return "columns must lie side by side"
        starts += [logits.data_ptr(), logits.stride(0) * size]
    if any(start % 16 for start in starts):
        return "every row must begin on 16 bytes"
    return None


def rows_with_gradient(
    ce_factor: Tensor,
    kd_factor: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *options: Any,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """CE and KD of each row [N] and the gradient of `sum(ce_factor * CE + kd_factor * KD)`.

    Args:
        ce_factor, kd_factor: [N].
        options: of the operators, see `operator_options`.
        grad: [N, Vs] where it is written, may be `student`; default: a new tensor.
    """
    *numbers, impl = options
    if grad is None:
        grad = fresh_like(student)
    ce, kd, statistics = native.empty_rows(student)
    native.launch(KERNELS[impl], impl, student, teacher, labels, statistics, numbers,
                  sums=(ce, kd), factors=(ce_factor, kd_factor), grad=grad)  # fmt: skip
    return ce, kd, grad


def scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient by a number on its device, unless that is 1; a GPU's host does not wait.

    Args:
        grad: of any shape; of rows [N, V] a GPU's kernel reads the number before it touches them.
        factor: of no dimensions.
    """
    rows = grad.dim() == 2 and grad.stride(1) == 1
    if not rows or why_not_native("scaling", "kd_scale", "cuda", grad.device, grad.dtype):
        if grad.device.type != "cpu" or factor != 1:  # only there the number is at hand
            grad.mul_(factor)  # which is not rounded to the gradient's type
        return grad
    none = torch.empty(0, dtype=torch.int64, device=grad.device)
    native.launch("scale", "cuda", grad, grad, none, None, (1.0, 0, 0.0, 0, 0.0),
                  factors=(factor, factor), grad=grad)  # fmt: skip
    wrote(grad)
    return grad


class WithGradient(torch.autograd.Function):
    """A loss whose gradient [N, V] by the logits is known.

    It is given out as it is; a backward pass that keeps its graph, and may come again, copies it.
    `inplace`: it lies where the logits were.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, grad: Tensor, inplace: bool) -> Tensor:
        if inplace:
            wrote(grad)  # now: before, a view's graph would be made anew; later, this one is void
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if graph_is_kept():
            return grad * grad_loss, None, None, None
        return scale_in_place(grad, grad_loss), None, None, None
