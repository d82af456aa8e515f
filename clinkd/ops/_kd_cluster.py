"""`kd_loss` with its gradient in one read of the logits: a cluster of blocks a row, on sm_90.

The kernels of `_kd_loss_native` read both models' logits for the loss and again for the gradient.
Here the gradient is written in the forward pass, at a scale of 1, and the backward pass multiplies
it by what comes in, unless that is 1. It has not run on a GPU yet, so it needs a request,
CLINKD_KD_CLUSTER=1.
"""

import os
import re
from typing import Any

import torch
from torch import Tensor

from clinkd.ops import _kd_loss_native as native
from clinkd.ops._impl import built, extension

SWITCH = "CLINKD_KD_CLUSTER"


def why_no_clusters(device: torch.device) -> str | None:
    """Why the two-pass kernels run on a device, whatever the logits; None where clusters do."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it takes a GPU of compute capability 9.0"
    if not (built("kd_cluster_cuda") and re.search(r"\b90", extension().cuda_archs)):
        return "clinkd._C has no code for sm_90"
    if os.environ.get(SWITCH) != "1":
        return f"it has not been timed yet; {SWITCH}=1 turns it on"
    return None


def why_not_cluster(student: Tensor, teacher: Tensor) -> str | None:
    """Why the two-pass kernels run for logits of one type; None where a cluster holds a row.

    Args:
        student: [N, Vs].
        teacher: [N, Vt].
    """
    if torch.compiler.is_compiling():
        return "a compiled graph may not scale the gradient in place"
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
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    ce, kd = (torch.empty(len(labels), device=student.device) for _ in range(2))
    native.launch("cluster", impl, student, teacher, labels, None, numbers,
                  sums=(ce, kd), factors=(ce_factor, kd_factor), grad=grad)  # fmt: skip
    return ce, kd, grad


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """Multiply a gradient [N, V] by a number on its device, of which the host learns nothing."""
    none = torch.empty(0, dtype=torch.int64, device=grad.device)
    native.launch("scale", "cuda", grad, grad, none, None, (1.0, 0, 0.0, 0, 0.0),
                  factors=(factor, factor), grad=grad)  # fmt: skip
    torch.autograd.graph.increment_version(grad)


class WithGradient(torch.autograd.Function):
    """A loss whose gradient [N, V] by the logits is known. It is given out once, not copied.

    So a second backward pass through it (`retain_graph`) is an error, autograd's own: the saved
    gradient "has been modified by an inplace operation".
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        scale_in_place(grad, grad_loss)
        return grad, None, None
