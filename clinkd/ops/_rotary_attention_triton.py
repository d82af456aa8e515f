"""The operators of the rotary attention in Triton: schema, shapes, autograd.

Kernels are imported where they run, so that `import clinkd.ops` needs torch alone.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from clinkd.ops.rotary import resolve_rotary, spec_tensors
from clinkd.rotary import RotarySpec

LIBRARY = torch.library.Library("clinkd", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPTIONS = (
    "Tensor positions, Tensor? key_positions, int spec, bool causal, float scale, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_k, int window"
)
torch.library.define(
    "clinkd::rotary_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    lib=LIBRARY,
)
torch.library.define(
    "clinkd::rotary_attention_backward",
    "(Tensor grad, Tensor out, Tensor lse, Tensor q_turned, Tensor k_turned, Tensor v, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    lib=LIBRARY,
)


def _triton(
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
    """Output, lse, and, where `keep`, turned queries and keys for the backward pass.

    Keys without positions are turned already.
    """
    launch = importlib.import_module("clinkd.kernels.rotary_attention").launch_forward
    k_turned = k
    if key_positions is not None:
        pre_pass = resolve_rotary("auto", k.device, k.dtype)
        k_turned = torch.ops.clinkd.rotary(k, key_positions, spec, False, pre_pass)
    q, k_turned, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_turned, v))
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


def _triton_backward(
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
    launch = importlib.import_module("clinkd.kernels.rotary_attention_backward").launch_backward
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


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep, key_positions = rest[-1], rest[1]
    packed = q.dim() == 3
    shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape, dtype=torch.float32)
    q_turned = q.new_empty(q.shape if keep else (0,))
    k_turned = k.new_empty(k.shape if keep and key_positions is not None else (0,))
    return q.new_empty(q.shape), lse, q_turned, k_turned


def _fake_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q_turned: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return out.new_empty(out.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, k, v, positions, key_positions, spec, causal, scale, starts, key_starts, window, _ = inputs
    out, lse, q_turned, k_turned = output
    ctx.mark_non_differentiable(lse, q_turned, k_turned)
    k_turned = k if key_positions is None else k_turned
    ctx.save_for_backward(
        out, lse, q_turned, k_turned, v, positions, key_positions, starts, key_starts
    )
    ctx.settings = (spec, causal, scale, window)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *kept, starts, key_starts = ctx.saved_tensors
    spec, causal, scale, window = ctx.settings
    found = torch.ops.clinkd.rotary_attention_backward(
        grad, *kept, spec, causal, scale, starts, key_starts, window
    )
    return (*found, *[None] * 9)


_KEY = "CompositeExplicitAutograd"
torch.library.impl("clinkd::rotary_attention", _KEY, _triton, lib=LIBRARY)
torch.library.impl("clinkd::rotary_attention_backward", _KEY, _triton_backward, lib=LIBRARY)
torch.library.register_fake("clinkd::rotary_attention", _fake, lib=LIBRARY)
torch.library.register_fake("clinkd::rotary_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "clinkd::rotary_attention", _backward, setup_context=_save, lib=LIBRARY
)
