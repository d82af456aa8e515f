"""Rotary embedding with real-valued positions on several axes."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from clinkd.ops._checks import Form, check_float
from clinkd.ops._finite import check_finite
from clinkd.ops._impl import extension, native_impl, resolve_impl, run_native, why_not_native, wrote
from clinkd.ops._memory import fresh_like
from clinkd.ops._operator import Operator, is_traced, is_watched
from clinkd.ops.reference.rotary import rotary as reference_rotary
from clinkd.rotary import RotarySpec

IMPLS = ("auto", "reference", "cpu", "cuda")


def rotary(
    x: Tensor,
    positions: Tensor,
    spec: RotarySpec,
    *,
    inverse: bool = False,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Turn every rotary pair of x; see `clinkd.ops.reference.rotary` for the formula.

    Args:
        x: [B, S, H, D] or packed [N, H, D], any strides; gets a gradient.
        positions: [A, B, S] or [A, N] float32, any strides; gets none.
        spec: axis and speed of each pair.
        inverse: turn back.
        inplace: write into x and return it; x must not need a gradient.
        impl: "auto", "reference", "cpu" or "cuda".

    A position that is not finite is an error; on a GPU it gives NaN, and a later call raises, as no
    host waits, unless CLINKD_CHECK=1 is in the environment.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    watched = is_watched(x, positions)
    fit = _fit if watched else _fit_once
    impl = fit(
        x.shape,
        x.dtype,
        x.device,
        positions.shape,
        positions.dtype,
        positions.device,
        spec.key,
        impl,
    )
    check_numbers("positions", positions, watched)
    if not inplace:
        run = _ROTARY if watched else _ROTARY.unwatched
        out: Tensor = run(x, positions, spec.key, inverse, impl)
        return out
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("inplace must be False where x needs a gradient")
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"inplace must be False where elements of x share memory, got strides {x.stride()}"
        )
    _ROTARY_INPLACE(x, positions, spec.key, inverse, impl)
    return x


def resolve_rotary(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs for such tensors.

    Raises:
        ValueError: an unknown name.
        RuntimeError: an explicit one that cannot run here.
    """
    return resolve_impl(impl, IMPLS, native_impl(device), why_not, device, dtype)


def why_not(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run for such tensors; None where it can."""
    return why_not_native("rotary", "rotary", impl, device, dtype)


def _fit(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    positions_shape: torch.Size,
    positions_dtype: torch.dtype,
    positions_device: torch.device,
    spec: int,
    impl: str,
) -> str:
    """The implementation that runs; raises where x and its positions do not fit each other."""
    positions = Form(positions_shape, positions_dtype, positions_device)
    check_rotary("x", Form(shape, dtype, device), positions, RotarySpec.known[spec])
    return resolve_rotary(impl, device, dtype)


_fit_once = lru_cache(maxsize=1024)(_fit)


def check_rotary(name: str, x: Tensor | Form, positions: Tensor | Form, spec: RotarySpec) -> None:
    """Raise unless x, called `name`, and its positions fit the spec."""
    if len(x.shape) not in (3, 4):
        raise ValueError(f"{name} must be [B, S, H, D] or [N, H, D], got shape {tuple(x.shape)}")
    check_float(name, x, len(x.shape), "")
    if x.shape[-1] != spec.head_dim:
        raise ValueError(
            f"{name} must have the spec's head_dim {spec.head_dim} as its last size, "
            f"got shape {tuple(x.shape)}"
        )
    check_positions("positions", positions, x.shape[:-2], spec, x.device)


def check_positions(
    name: str, positions: Tensor | Form, tokens: torch.Size, spec: RotarySpec, device: torch.device
) -> None:
    """Raise unless float32 on this device, [A, *tokens], with every axis that the spec names."""
    if positions.dtype != torch.float32:
        raise TypeError(
            f"{name} must be float32, got {positions.dtype}: use positions.float(), and never "
            "hold them in bfloat16 or float16, which round from 128 and 1,024 on"
        )
    if len(positions.shape) != len(tokens) + 1 or positions.shape[1:] != tokens:
        raise ValueError(
            f"{name} must be [A, {', '.join(str(n) for n in tokens)}], one a token, "
            f"got shape {tuple(positions.shape)}"
        )
    if positions.shape[0] < spec.axes:
        raise ValueError(
            f"{name} must have the spec's {spec.axes} axes first, got {positions.shape[0]}"
        )
    if positions.device != device:
        raise ValueError(f"{name} must be on {device}, got {positions.device}")


def check_numbers(name: str, positions: Tensor, watched: bool = True) -> None:
    """Raise where a position is not finite, see `rotary`; `watched`: as `is_watched` says."""
    if (positions.is_cpu or positions.is_cuda) and not (watched and is_traced(positions)):
        check_finite(name, positions)


# kept for good, as `RotarySpec.known` is: kernels are given the places
_TABLES: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}


def spec_tensors(spec: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Axis int32, and speed in quarter turns as a sum of two float32, each [R]."""
    found = _TABLES.get((spec, device))
    if found is None:
        known = RotarySpec.known[spec]
        speed = torch.tensor(known.inv_freq, dtype=torch.float64, device="cpu") * (2 / math.pi)
        hi = speed.float()
        lo = (speed - hi).float()
        axis = torch.tensor(known.axis, dtype=torch.int32, device="cpu")
        made = axis.to(device), hi.to(device), lo.to(device)
        found = _TABLES.setdefault((spec, device), made)  # of two threads the first one's stay
    return found


def native_arguments(x: Tensor, out: Tensor, positions: Tensor, spec: int) -> tuple[Any, ...]:
    """What the C++ and CUDA kernels take first: places, and a `Rotation` of the extension."""
    how = _rotation(x.shape, x.stride(), out.stride(), positions.stride(), x.device, spec)
    return x.data_ptr(), out.data_ptr(), positions.data_ptr(), how


@lru_cache(maxsize=1024)
def _rotation(
    shape: torch.Size,
    x_stride: tuple[int, ...],
    out_stride: tuple[int, ...],
    positions_stride: tuple[int, ...],
    device: torch.device,
    spec: int,
) -> Any:
    """Sizes, strides [B, S, H, D] and pairs."""
    known = RotarySpec.known[spec]
    tables = tuple(table.data_ptr() for table in spec_tensors(spec, device))
    sizes = tuple(shape)
    if len(sizes) == 3:  # packed: one row
        sizes, x_stride, out_stride = (1, *sizes), (0, *x_stride), (0, *out_stride)
        positions_stride = (positions_stride[0], 0, positions_stride[1])
    strides = (x_stride[:3], out_stride[:3], positions_stride)
    return extension().Rotation(tables, sizes, *strides, known.pairs, known.pair_stride)


def _launch(x: Tensor, out: Tensor, positions: Tensor, spec: int, inverse: bool, impl: str) -> None:
    """Run the C++ or CUDA kernel from x to out, whose components lie side by side."""
    run_native("rotary", impl, x, *native_arguments(x, out, positions, spec), inverse)


def turn(
    x: Tensor, positions: Tensor, spec: int, inverse: bool, impl: str, heads_first: bool = False
) -> Tensor:
    """What the operator does: x turned, in memory of its own, all side by side.

    `heads_first`: the tokens of a head lie side by side there, instead of the heads of a token.
    """
    out = fresh_like(x.transpose(-3, -2)).transpose(-3, -2) if heads_first else fresh_like(x)
    if impl == "reference":
        return out.copy_(reference_rotary(x, positions, RotarySpec.known[spec], inverse=inverse))
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.numel() > 0:
        _launch(x, out, positions, spec, inverse, impl)
    return out


def turn_inplace(x: Tensor, positions: Tensor, spec: int, inverse: bool, impl: str) -> None:
    """What the operator in place does."""
    if impl == "reference" or x.stride(-1) != 1:
        x.copy_(turn(x, positions, spec, inverse, impl))
    elif x.numel() > 0:
        _launch(x, x, positions, spec, inverse, impl)
        wrote(x)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, *ctx.settings = inputs
    ctx.save_for_backward(positions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    spec, inverse, impl = ctx.settings
    # a rotation's transpose is its inverse
    return _ROTARY(grad, positions, spec, not inverse, impl), None, None, None, None


_ARGUMENTS = "Tensor positions, int spec, bool inverse, str impl"
_ROTARY = Operator("rotary", f"(Tensor x, {_ARGUMENTS}) -> Tensor", turn, _fake, _save, _backward)
_ROTARY_INPLACE = Operator(
    "rotary_", f"(Tensor(a!) x, {_ARGUMENTS}) -> ()", turn_inplace, lambda *_: None
)
