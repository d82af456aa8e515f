"""A loss of hidden states through an output head: a chunk of the logits exists at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clinkd.ops._impl import graph_is_kept
from clinkd.ops._kd_at_once import scale_in_place
from clinkd.ops._kd_mean import has_gradient
from clinkd.ops._memory import fresh, large_pages, linear
from clinkd.ops._operator import first_order
from clinkd.ops._vocab_parallel import group_named

# of logits at a time, student's and teacher's together; by whether on a GPU, where more rows make
# faster products
WORKSPACE_BYTES = {False: 640 << 20, True: 1 << 30}
LEAST_ROWS = {False: 64, True: 256}  # fewer would only reread the weights

# (rows, their logits, whether a gradient is needed) -> sums of CE and KD [2], the gradient of the
# rows' loss by the logits, which may take their place
Score = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]


def auto_rows(row: int, cuda: bool) -> int:
    """Rows of a chunk where nobody says how many; `row`: bytes of the logits of one."""
    return max(LEAST_ROWS[cuda], WORKSPACE_BYTES[cuda] // row)


def chunk_rows(workspace: int | str, *weights: Tensor) -> int:
    """Rows whose logits of all these heads [V, C] fit into a workspace."""
    row = sum(w.shape[0] * w.element_size() for w in weights)
    if workspace == "auto":
        return auto_rows(row, weights[0].device.type == "cuda")
    if not isinstance(workspace, int) or workspace < 0:
        raise ValueError(f"workspace must be a number of bytes, 0 or 'auto', got {workspace!r}")
    return max(1, workspace // row)


def shares(
    weight: Tensor | None, labels: Tensor, count: Tensor | int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | int]:
    """What each row's loss is multiplied by [N], and what the sum of them is then divided by.

    Divided by the count before, the gradient is right as it is made, and the backward pass need not
    go over it. Not in float16, where what scales a loss up must do so before.
    """
    ones = torch.ones_like(labels, dtype=torch.float32)
    factor = ones if weight is None else weight.to(torch.promote_types(weight.dtype, ones.dtype))
    if dtype == torch.float16 or has_gradient(count):
        return factor, count
    return factor / count, 1


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Type of the logits of hidden states, which autocast may have chosen."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return hidden.dtype
    return torch.get_autocast_dtype(kind)


def row_chunks(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    needs: Sequence[bool],
    score: Score,
    kd_weight: float,
    chunk_rows: int,
    vocab_size: int,
    group: str,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The loss, the sums of CE and KD [2], and the loss's gradients by the inputs.

    Rows of the head from `vocab_size` on take no part: their gradient is zero. In float16 those of
    head and bias stay in float32: a sum over rows can pass its range, however the loss is scaled.

    Args:
        inputs: hidden states [N, C], head [V, C], bias [V] or None.
        needs: which of them get a gradient.
        group: name of the process group over which the head is cut; "" for none.
    """
    hidden, weight, bias = inputs
    compute = torch.promote_types(hidden.dtype, torch.float32)
    chunks = -(-len(hidden) // chunk_rows)
    wide = product_dtype(hidden) == torch.float16
    # wide where several products are added up; one product is rounded once as it is
    widths = (
        compute if group else hidden.dtype,
        weight.dtype if chunks == 1 and not wide else compute,
        compute,
    )
    grads = [
        _memory_for(tensor, dtype) if need and tensor is not None else None
        for tensor, need, dtype in zip(inputs, needs, widths, strict=True)
    ]
    unwritten = 0 if len(hidden) == 0 else len(weight[:vocab_size])
    for grad in grads[1:]:
        if grad is not None:
            grad[unwritten:].zero_()
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    of_hidden = grads[0]
    of_weight, of_bias = (None if g is None else g[:vocab_size] for g in grads[1:])
    parts = hidden.new_zeros(2, dtype=compute)
    size = -(-len(hidden) // chunks) if chunks else 1  # all alike
    narrow = weight
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        found, grad = score(rows, linear(hidden[rows], weight, bias), any(needs))
        parts += found
        if grad is None:
            continue
        narrow = narrow.to(grad.dtype)  # autocast: logits have fewer bits than the head
        if of_hidden is not None:
            _add_product(of_hidden[rows], grad, narrow, first=True)
        if of_weight is not None:
            _add_product(of_weight, grad.T, hidden[rows].to(grad.dtype), first=start == 0)
        if of_bias is not None:
            columns = grad.sum(dim=0, dtype=compute)
            of_bias.copy_(columns) if start == 0 else of_bias.add_(columns)
        del grad  # before the next chunk's logits come
    if group and of_hidden is not None:
        dist.all_reduce(of_hidden, group=group_named(group))  # each rank has its columns' share
    found_grads = [
        None if grad is None or tensor is None else grad if stays else grad.to(tensor.dtype)
        for grad, tensor, stays in zip(grads, inputs, (False, wide, wide), strict=True)
    ]
    return (parts[0] + kd_weight * parts[1]) / (1 + kd_weight), parts, found_grads


def _memory_for(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a gradient, which autograd wants to lie as its tensor does."""
    if tensor.is_contiguous():
        return fresh(tensor.shape, tensor, dtype)
    return large_pages(torch.empty_like(tensor, dtype=dtype))


class RowChunks(torch.autograd.Function):
    """`row_chunks`, whose gradients are scaled in the backward pass.

    `learns`: whether gradients are on, which torch does not tell a function.
    Gives the loss, which has the gradient, and the sums of CE and KD [2].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        score: Score,
        kd_weight: float,
        chunk_rows: int,
        vocab_size: int,
        group: str,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = [learns and need for need in ctx.needs_input_grad[:3]]
        loss, parts, grads = row_chunks(
            (hidden, weight, bias), needs, score, kd_weight, chunk_rows, vocab_size, group
        )
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        ctx.present = [grad is not None for grad in grads]
        return loss, parts

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = []
        kept = graph_is_kept()  # if not, the head's gradient need not exist twice
        for present in ctx.present:
            grad = next(saved) if present else None
            if grad is not None:
                grad = grad * grad_loss if kept else scale_in_place(grad, grad_loss)
            grads.append(grad)
        return (*grads, *([None] * 6))


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """`out += a @ b`; the first one to come does not read `out`, which holds nothing yet."""
    if a.dtype == torch.float16 and not a.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)  # in float16 the product itself could overflow
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=0.0 if first else 1.0)
    elif a.is_cuda:  # the product itself writes float32: neither rounded nor written twice
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=0.0 if first else 1.0, out=out)
    elif first:
        out.copy_(a @ b)
    else:
        out += a @ b
