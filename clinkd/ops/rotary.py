"""Rotary embedding with real-valued positions on several axes."""

from typing import Any

import torch
from torch import Tensor

from clinkd.ops._checks import check_float
from clinkd.ops.reference.rotary import rotary as reference_rotary
from clinkd.rotary import RotarySpec

LIBRARY = torch.library.Library("clinkd", "FRAGMENT")  # type: ignore[no-untyped-call]
_ARGUMENTS = "Tensor positions, int spec, bool inverse, str impl"
torch.library.define("clinkd::rotary", f"(Tensor x, {_ARGUMENTS}) -> Tensor", lib=LIBRARY)
torch.library.define("clinkd::rotary_", f"(Tensor(a!) x, {_ARGUMENTS}) -> ()", lib=LIBRARY)


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
        impl: "auto", "reference" or "cpu".

    Returns:
        x's shape and dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    _check(x, positions, spec)
    impl = resolve(impl, x.device)
    if not inplace:
        out: Tensor = torch.ops.clinkd.rotary(x, positions, spec.key, inverse, impl)
        return out
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("inplace must be False where x needs a gradient")
    torch.ops.clinkd.rotary_(x, positions, spec.key, inverse, impl)
    return x


def resolve(impl: str, device: torch.device) -> str:
    """The implementation that runs for tensors on `device`.

    Raises:
        ValueError: an unknown name.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl must be 'auto' or 'reference', got {impl!r}")
    return "reference"


def _check(x: Tensor, positions: Tensor, spec: RotarySpec) -> None:
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, S, H, D] or [N, H, D], got shape {tuple(x.shape)}")
    check_float("x", x, x.dim(), "")
    if x.shape[-1] != spec.head_dim:
        raise ValueError(
            f"x must have the spec's head_dim {spec.head_dim} as its last size, "
            f"got shape {tuple(x.shape)}"
        )
    check_positions("positions", positions, x.shape[:-2], spec, x.device)


def check_positions(
    name: str, positions: Tensor, tokens: torch.Size, spec: RotarySpec, device: torch.device
) -> None:
    """float32 on x's device, [A, *tokens], with an axis for each that the spec names."""
    if positions.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32, which bfloat16 and float16 cannot stand in for "
            f"(they round positions above 128 and 2,048), got {positions.dtype}"
        )
    if positions.shape[1:] != tokens or positions.dim() != len(tokens) + 1:
        raise ValueError(
            f"{name} must be [A, {', '.join(str(n) for n in tokens)}] like x's tokens, "
            f"got shape {tuple(positions.shape)}"
        )
    if positions.shape[0] < spec.axes:
        raise ValueError(
            f"{name} must have the spec's {spec.axes} axes first, got {positions.shape[0]}"
        )
    if positions.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {positions.device}")


@torch.library.impl(LIBRARY, "rotary", "CompositeExplicitAutograd")
def _rotary(x: Tensor, positions: Tensor, spec: int, inverse: bool, impl: str) -> Tensor:
    return reference_rotary(x, positions, RotarySpec.known[spec], inverse=inverse).contiguous()


@torch.library.impl(LIBRARY, "rotary_", "CompositeExplicitAutograd")
def _rotary_inplace(x: Tensor, positions: Tensor, spec: int, inverse: bool, impl: str) -> None:
    x.copy_(reference_rotary(x, positions, RotarySpec.known[spec], inverse=inverse))


def _rotary_fake(x: Tensor, positions: Tensor, spec: int, inverse: bool, impl: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rotary_inplace_fake(*_: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, *ctx.settings = inputs
    ctx.save_for_backward(positions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    spec, inverse, impl = ctx.settings
    # a rotation's transpose is its inverse
    return torch.ops.clinkd.rotary(grad, positions, spec, not inverse, impl), None, None, None, None


torch.library.register_fake("clinkd::rotary", _rotary_fake, lib=LIBRARY)
torch.library.register_fake("clinkd::rotary_", _rotary_inplace_fake, lib=LIBRARY)
torch.library.register_autograd("clinkd::rotary", _backward, setup_context=_save, lib=LIBRARY)
