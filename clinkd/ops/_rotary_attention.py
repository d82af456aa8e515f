"""The operators of the rotary attention: schema, shapes, autograd; one pair for CPU and Triton."""

from typing import Any

from torch import Tensor

from clinkd.ops import _attention_cpu, _attention_triton
from clinkd.ops._operator import Operator

_IMPLS = {"cpu": _attention_cpu, "triton": _attention_triton}


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, lse, and, on a GPU where `keep`, turned queries and keys for the backward pass.

    Keys without positions are turned already.
    """
    *rest, impl = arguments
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _IMPLS[impl].forward(*rest)
    return found


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, impl = arguments
    found: tuple[Tensor, Tensor, Tensor] = _IMPLS[impl].backward(*rest)
    return found


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, keep, impl = rest
    lse = _attention_cpu.empty_lse(q)
    if impl == "triton":
        lse = lse.contiguous()
    keep = keep and impl == "triton"
    q_turned = q.new_empty(q.shape) if keep else q.new_empty(0)
    k_turned = k.new_empty(k.shape) if keep and options[1] is not None else k.new_empty(0)
    return q.new_empty(q.shape), lse, q_turned, k_turned


def _fake_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q_turned: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return out.new_empty(out.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, positions, key_positions, spec, causal, scale, *packing, _, impl = inputs
    starts, key_starts, window = packing
    out, lse, q_turned, k_turned = output
    ctx.mark_non_differentiable(lse, q_turned, k_turned)
    ctx.set_materialize_grads(False)  # or each of those would get zeros of its size
    if impl == "cpu":  # which turns them again
        q_turned, k_turned = q, k
    elif key_positions is None:
        k_turned = k
    ctx.save_for_backward(
        out, lse, q_turned, k_turned, v, positions, key_positions, starts, key_starts
    )
    ctx.settings = (spec, causal, scale, window, impl)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *kept, starts, key_starts = ctx.saved_tensors
    spec, causal, scale, window, impl = ctx.settings
    found = _BACKWARD(grad, *kept, spec, causal, scale, starts, key_starts, window, impl)
    return (*found, *[None] * 10)


_OPTIONS = (
    "Tensor positions, Tensor? key_positions, int spec, bool causal, float scale, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_k, int window"
)
_BACKWARD = Operator(
    "rotary_attention_backward",
    "(Tensor grad, Tensor out, Tensor lse, Tensor q_turned, Tensor k_turned, Tensor v, "
    f"{_OPTIONS}, str impl) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
ROTARY_ATTENTION = Operator(
    "rotary_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool keep, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _save,
    _gradient,
)
