"""Rotary attention in Triton. Kernels are imported where they run: the ops need torch alone."""

import importlib

from torch import Tensor

from clinkd.ops._impl import on_device
from clinkd.ops.rotary import resolve_rotary, spec_tensors, turn
from clinkd.rotary import RotarySpec


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    key_positions: Tensor | None,
    spec: int,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's outputs, see `clinkd.ops._rotary_attention`."""
    launch = importlib.import_module("clinkd.kernels.rotary_attention").launch_forward
    k_turned = k
    if key_positions is not None:
        k_turned = turn(k, key_positions, spec, False, resolve_rotary("auto", k.device, k.dtype))
    q, k_turned, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_turned, v))
    with on_device(q):
        out, lse, q_turned = launch(
            q,
            k_turned,
            v,
            positions,
            spec_tensors(spec, q.device),
            RotarySpec.known[spec],
            causal,
            scale,
            cu_seqlens,
            cu_seqlens_k,
            window,
            keep,
        )
    if not keep or key_positions is None:  # an operator's output may not be its input
        k_turned = k_turned.new_empty(0)
    return out, lse, q_turned, k_turned


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q_turned: Tensor,
    k_turned: Tensor,
    v: Tensor,
    positions: Tensor,
    key_positions: Tensor | None,
    spec: int,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    launch = importlib.import_module("clinkd.kernels.rotary_attention_backward").launch_backward
    with on_device(grad):
        found: tuple[Tensor, Tensor, Tensor] = launch(
            grad,
            out,
            lse,
            q_turned,
            *(t if t.stride(-1) == 1 else t.contiguous() for t in (k_turned, v)),
            positions,
            key_positions,
            spec_tensors(spec, out.device),
            RotarySpec.known[spec],
            causal,
            scale,
            cu_seqlens,
            cu_seqlens_k,
            window,
        )
    return found
