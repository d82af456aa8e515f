"""Checks at the door of the ops: name the argument, what it must be, what it was."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(name: str, tensor: Tensor, dims: int, shape: str) -> None:
    """A floating tensor with so many dimensions."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}")


def check_labels(labels: Tensor, rows: int) -> None:
    """int64, one a row."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (rows,):
        raise ValueError(f"labels must be [N] = [{rows}], got shape {tuple(labels.shape)}")


def check_options(
    kd_weight: float,
    temperature: float,
    divergence: str,
    known: tuple[str, ...],
    beta: float,
    skew: float,
) -> None:
    """Numbers and names of the distillation loss."""
    if not kd_weight >= 0:
        raise ValueError(f"kd_weight must be at least 0, got {kd_weight}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if divergence not in known:
        raise ValueError(f"divergence must be one of {', '.join(known)}, got {divergence!r}")
    for name, value in (("beta", beta), ("skew", skew)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
