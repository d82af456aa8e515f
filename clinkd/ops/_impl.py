"""Choosing the implementation of an op: explicit means explicit, nothing falls back in silence."""

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

# why an implementation cannot run for tensors of a device and dtype; None where it can
WhyNot = Callable[[str, torch.device, torch.dtype], str | None]

# element types that the C++ and CUDA kernels take: FloatType of csrc/floats.h
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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
        reason = why_not(native, device, dtype)
        if reason is not None and device.type == "cuda" and dtype in TYPES:
            _warn_slow(reason)
        return native if reason is None else "reference"
    if reason := why_not(impl, device, dtype):
        raise RuntimeError(f"impl={impl!r} cannot run here: {reason}")
    return impl


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_slow(reason: str) -> None:
    _warn_once(reason)


@lru_cache(maxsize=64)
def _warn_once(reason: str) -> None:
    warnings.warn(f"clinkd.ops runs plain torch on this GPU: {reason}", stacklevel=2)


def native_impl(device: torch.device) -> str:
    """Where an op has C++ and CUDA kernels: what "auto" takes, unless `why_not` speaks against."""
    return "cuda" if device.type == "cuda" else "cpu"


def why_not_native(
    op: str, kernel: str, impl: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why an op with C++ and CUDA kernels cannot run one for such tensors; None where it can.

    Args:
        kernel: name of the op's function in the extension, without its "_cpu" or "_cuda".
    """
    if impl == "reference":
        return None
    if device.type != impl:
        return f"it takes {impl} tensors, got {device.type}"
    if dtype not in TYPES:
        return f"it takes float32, float16 and bfloat16, got {dtype}"
    if not built(f"{kernel}_{impl}"):
        return (
            f"this installation has no {op} for {impl}: clinkd._C was built without it, or not "
            "built; `clinkd doctor` says what there is"
        )
    return why_no_code(device) if impl == "cuda" else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_no_code(device: torch.device) -> str | None:
    """Why the CUDA kernels that were built cannot run on a card; None where they can."""
    return _why_no_code(device)


@lru_cache(maxsize=64)
def _why_no_code(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None  # whatever is asked for such a device says so
    return _why_not_built_for(torch.cuda.get_device_capability(device), extension().cuda_archs)


def _why_not_built_for(card: tuple[int, int], archs: str) -> str | None:
    """`archs`: as setup.py has it; the first and the last are there as PTX too."""
    built_for = archs.split(";")
    for arch in built_for:
        digits = arch.rstrip("af")
        major, minor = int(digits[:-1]), int(digits[-1])
        if card == (major, minor):
            return None
        if arch.endswith("a"):  # code of sm_90a runs on no other card
            continue
        family = card[0] == major and card[1] >= minor
        newer = card >= (major, minor) and arch in (built_for[0], built_for[-1])
        if family or (newer and digits == arch):
            return None
    return (
        f"clinkd._C has code for sm_{', sm_'.join(built_for)}, and this card is sm_{card[0]}"
        f"{card[1]}: build it with CLINKD_CUDA_ARCHS={card[0]}{card[1]}, or use a newer card"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def built(name: str) -> bool:
    """Whether the compiled extension has this function."""
    return _built(name)


@lru_cache(maxsize=64)
def _built(name: str) -> bool:
    return importlib.util.find_spec("clinkd._C") is not None and hasattr(extension(), name)


def extension() -> Any:
    """The compiled extension; here, so that importing the ops needs torch alone."""
    return importlib.import_module("clinkd._C")


def run_native(name: str, impl: str, tensor: torch.Tensor, *arguments: Any) -> None:
    """Call `name_cpu` or `name_cuda` of the extension for tensors like this one.

    The type of its elements follows the arguments, then the number of threads or the stream.
    """
    run = _kernel(name, impl)
    kind = TYPES[tensor.dtype]
    if impl == "cpu":
        run(*arguments, kind, torch.get_num_threads())
        return
    with on_device(tensor):
        error = run(*arguments, kind, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"the kernel {name}_{impl} could not start: CUDA error {error}")


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's GPU as the current one, on which kernels start."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache(maxsize=64)
def _kernel(name: str, impl: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(extension(), f"{name}_{impl}")
    return found


def wrote(*tensors: torch.Tensor) -> None:
    """Tell autograd that a kernel changed these: a graph that still needs them must not run."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def graph_is_kept() -> bool:
    """Whether the backward pass under way may come again; where torch does not tell, it may.

    If not, a function may give its saved tensors out, changed in place.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())


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
