"""Choosing the implementation of an op: explicit means explicit, nothing falls back in silence."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

# why an implementation cannot run for tensors of a device and dtype; None where it can
WhyNot = Callable[[str, torch.device, torch.dtype], str | None]


def resolve_impl(
    impl: str,
    known: Sequence[str],
    native: str,
    why_not: WhyNot,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The implementation that runs for such tensors.

    Args:
        known: names that the op takes, "auto" and "reference" among them.
        native: what "auto" takes on this device unless it cannot run.
        why_not: the op's own.

    Raises:
        ValueError: an unknown name.
        RuntimeError: an explicit one that cannot run here.
    """
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
    if impl == "auto":
        return native if why_not(native, device, dtype) is None else "reference"
    if reason := why_not(impl, device, dtype):
        raise RuntimeError(f"impl={impl!r} cannot run here: {reason}")
    return impl


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a Triton kernel cannot run for such tensors; None where it can."""
    if dtype == torch.float64:
        return "it takes float32, float16 and bfloat16, got torch.float64"
    if not has_triton():
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it takes cuda tensors (cpu under TRITON_INTERPRET=1), got {device.type}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_triton() -> bool:
    """Whether Triton is installed."""
    return _find_triton()


@lru_cache(maxsize=1)
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
