"""Checks at the door of the ops: name the argument, what it must be, what it was."""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Form(NamedTuple):
    """What most checks look at of a tensor: as a key, it has them made once for all alike."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def form(tensor: Tensor | None) -> Form | None:
    """Its form; None of None."""
    return None if tensor is None else Form(tensor.shape, tensor.dtype, tensor.device)


def check_float(name: str, tensor: Tensor | Form, dims: int, shape: str) -> None:
    """A floating tensor with so many dimensions."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}")
    if len(tensor.shape) != dims:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}")


def check_logits(name: str, logits: Tensor, shape: str) -> None:
    """Floating [N, V] with V above 0."""
    check_float(name, logits, 2, shape)
    if logits.shape[1] == 0:
        raise ValueError(
            f"{name} must be {shape} with at least one column, got {tuple(logits.shape)}"
        )


def check_labels(labels: Tensor, rows: int, ignore_index: int) -> None:
    """int64, one a row; the label of ignored rows is whole, too."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (rows,):
        raise ValueError(f"labels must be [N] = [{rows}], got shape {tuple(labels.shape)}")
    if not hasattr(ignore_index, "__index__"):
        raise TypeError(f"ignore_index must be a whole number, got {ignore_index!r}")


def check_weight(weight: Tensor | None, rows: int, *, learns: bool = True) -> None:
    """Floating, one a row: kernels read it by row.

    Args:
        learns: whether the loss has a gradient by it.
    """
    if weight is None:
        return
    check_float("weight", weight, 1, "[N]")
    if weight.shape != (rows,):
        raise ValueError(f"weight must be [N] = [{rows}], got shape {tuple(weight.shape)}")
    if not learns and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight must need no gradient, of which this loss has none: give weight.detach(), or "
            "take the loss of logits"
        )


def check_num_items(num_items: Tensor | int | None) -> None:
    """A number above 0; of a tensor the shape alone is looked at, so that no host waits."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items must be one number, got a tensor of shape {tuple(num_items.shape)}"
            )
    elif num_items is not None and not 0 < num_items < math.inf:
        raise ValueError(f"num_items must be a finite number above 0, got {num_items}")


def check_devices(labels: Tensor, **others: Tensor | None) -> None:
    """All on the labels' device: a kernel would read another's memory as its own.

    And each whole there: of a DTensor torch itself would say no more than that it mixed types.
    """
    for name, tensor in {"labels": labels, **others}.items():
        if tensor is None:
            continue
        if hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: give {name}.full_tensor(), or, of "
                f"a vocabulary that is cut over a process_group, {name}.to_local()"
            )
        if tensor.device != labels.device:
            raise ValueError(
                f"{name} must be on {labels.device} as labels are, got {tensor.device}"
            )


def check_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    """[V], of a head [V, C]."""
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} must be [V] = [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    _check_same(name, bias, "the head", weight)


def _check_same(name: str, tensor: Tensor, of: str, other: Tensor) -> None:
    """One dtype for the matrix product, unless autocast sees to it."""
    if tensor.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
        raise TypeError(f"{name} must be {other.dtype} as {of} is, got {tensor.dtype}")


def checking() -> bool:
    """Whether rows are looked at one by one (CLINKD_CHECK=1), for which the host waits."""
    return os.environ.get("CLINKD_CHECK") == "1"


def check_head(name: str, hidden: Tensor, weight: Tensor) -> None:
    """Hidden states [N, C] of a model and its output head [V, C]."""
    check_float(f"{name}_hidden", hidden, 2, "[N, C]")
    check_float(f"{name}_weight", weight, 2, "[V, C]")
    if hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}_weight must be [V, C] with C = "
            f"{hidden.shape[1]} as in {name}_hidden and V above 0, got shape {tuple(weight.shape)}"
        )
    _check_same(f"{name}_weight", weight, f"{name}_hidden", hidden)


def check_vocab_size(size: int | None, weight: Tensor) -> None:
    """Rows of a head [V, C] that stand for tokens."""
    if size is not None and not 1 <= size <= weight.shape[0]:
        raise ValueError(
            f"vocab_size must be in 1 … {weight.shape[0]}, the rows of student_weight, got {size}"
        )


def check_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    numbers: Tensor | None = None,
) -> None:
    """With CLINKD_CHECK=1, raise at the first row that would give NaN.

    Args:
        numbers: [N] the rows' numbers in what the caller was given; default 0, 1, ….

    Raises:
        ValueError: NaN, no finite maximum, or a label out of range, in a row that counts.
    """
    if not checking():
        return
    counts = labels != ignore_index
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits is not None and logits.shape[1]:
            nan = counts & logits.isnan().any(dim=1)
            raise_first(f"{name} must have no NaN", nan, numbers)
            flat = counts & ~logits.amax(dim=1).isfinite()
            raise_first(f"{name} must have a finite maximum", flat, numbers)
    outside = counts & ((labels < 0) | (labels >= student.shape[1]))
    rule = f"labels must be {ignore_index} or in 0 … {student.shape[1] - 1}"
    raise_first(f"{rule}, the student's vocabulary", outside, numbers)


def check_top_rows(logits: Tensor, lse: Tensor, labels: Tensor, ignore_index: int) -> None:
    """`check_rows` for what is known of a teacher: K logits and their log-sum-exp."""
    if not checking():
        return
    counts = labels != ignore_index
    nan = counts & ~logits.isfinite().all(dim=1)
    raise_first("teacher_logits must be finite", nan, None)
    raise_first("teacher_lse must be finite", counts & ~lse.isfinite(), None)


def raise_first(rule: str, wrong: Tensor, numbers: Tensor | None) -> None:
    """Raise where a row is wrong [N], naming the first by its number."""
    rows = wrong.nonzero().squeeze(1)
    if len(rows):
        first = int(rows[0] if numbers is None else numbers[rows[0]])
        raise ValueError(f"{rule}: row {first} breaks it, and {len(rows) - 1} more")


def check_options(
    kd_weight: float,
    temperature: float,
    divergence: str,
    known: tuple[str, ...],
    beta: float,
    skew: float,
    softcap: float | None,
) -> None:
    """Numbers and names of the distillation loss."""
    numbers = {"kd_weight": kd_weight, "temperature": temperature, "softcap": softcap}
    for name, value in (numbers | {"beta": beta, "skew": skew}).items():
        if isinstance(value, Tensor):  # one that learns would get no gradient, or a wrong one
            raise TypeError(f"{name} must be a number, got a tensor: give {name}.item()")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, or None, got {softcap}")
    if not 0 <= kd_weight < math.inf:
        raise ValueError(f"kd_weight must be at least 0 and finite, got {kd_weight}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if divergence not in known:
        raise ValueError(f"divergence must be one of {', '.join(known)}, got {divergence!r}")
    for name, value in (("beta", beta), ("skew", skew)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
