"""Keys turned and put into a cache together with their values, in one pass."""

import torch
from torch import Tensor

from clinkd.ops._checks import checking, raise_first
from clinkd.ops._impl import native_impl, resolve_impl, run_native, why_not_native, wrote
from clinkd.ops._operator import Operator
from clinkd.ops.reference.rotary_append import rotary_append as reference_append
from clinkd.ops.rotary import check_numbers, check_rotary, native_arguments
from clinkd.rotary import RotarySpec

IMPLS = ("auto", "reference", "cpu", "cuda")


def rotary_append(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    spec: RotarySpec,
    key_cache: Tensor,
    value_cache: Tensor,
    starts: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Turn new keys into their cache and copy the values; see `ops.reference.rotary_append`.

    Keys and values are read once and written once, and no turned copy of the keys is made. It is
    for answering: nothing here has a gradient.

    Args:
        k, v: [B, S, H, D], keys not turned; any strides.
        positions: [A, B, S] float32, any strides.
        spec: axis and speed of each pair.
        key_cache, value_cache: [B, L, H, D] of k's dtype, components side by side, otherwise any
            strides: `cache.transpose(1, 2)` of a cache [B, H, L, D] will do.
        starts: [B] int64 on the same device, the slot of each row's first new token. The host does
            not wait for it: a token whose slot is not in 0 … L - 1 is not written. With
            CLINKD_CHECK=1 such a row is an error.
        impl: "auto", "reference", "cpu" or "cuda".

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    _check(k, v, positions, spec, key_cache, value_cache, starts)
    impl = resolve_impl(impl, IMPLS, native_impl(k.device), why_not, k.device, k.dtype)
    _APPEND(k, v, positions, spec.key, key_cache, value_cache, starts, impl)


def why_not(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run for such tensors; None where it can."""
    return why_not_native("rotary_append", "rotary_append", impl, device, dtype)


def _check(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    spec: RotarySpec,
    key_cache: Tensor,
    value_cache: Tensor,
    starts: Tensor,
) -> None:
    if k.dim() != 4:
        raise ValueError(f"k must be [B, S, H, D], got shape {tuple(k.shape)}")
    check_rotary("k", k, positions, spec)
    check_numbers("positions", positions)
    B, S, H, D = k.shape
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4 or cache.shape != (B, key_cache.shape[1], H, D):
            raise ValueError(
                f"{name} must be [B, L, H, D] with B, H, D = {B}, {H}, {D} as in k and one L for "
                f"both, got shape {tuple(cache.shape)}"
            )
        if cache.stride(3) != 1 and D > 1:
            raise ValueError(
                f"{name} must have its components side by side, got strides {cache.stride()}"
            )
        if torch.is_grad_enabled() and cache.requires_grad:
            raise ValueError(f"{name} must not need a gradient: it is written in place")
    for name, tensor in (("v", v), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.dtype != k.dtype:
            raise TypeError(f"{name} must be {k.dtype} as k, got {tensor.dtype}")
        if tensor.device != k.device:
            raise ValueError(f"{name} must be on {k.device}, got {tensor.device}")
    if starts.dtype != torch.int64:
        raise TypeError(f"starts must be int64, got {starts.dtype}")
    if starts.shape != (B,) or starts.device != k.device:
        raise ValueError(
            f"starts must be [B] = [{B}] on {k.device}, got shape {tuple(starts.shape)} "
            f"on {starts.device}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} must not need a gradient: rotary_append has none")
    if checking():
        slots = key_cache.shape[1]
        outside = (starts < 0) | (starts > slots - S)
        raise_first(f"starts must leave room for {S} tokens in {slots} slots", outside, None)


def _append(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    spec: int,
    key_cache: Tensor,
    value_cache: Tensor,
    starts: Tensor,
    impl: str,
) -> None:
    if impl == "reference":
        known = RotarySpec.known[spec]
        reference_append(k, v, positions, known, key_cache, value_cache, starts)
        return
    if k.numel() == 0 or key_cache.numel() == 0:
        return
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    starts = starts.contiguous()
    run_native(
        "rotary_append",
        impl,
        k,
        *native_arguments(k, key_cache, positions, spec),
        (v.data_ptr(), value_cache.data_ptr(), starts.data_ptr()),
        (v.stride()[:3], value_cache.stride()[:3]),
        key_cache.shape[1],
    )
    wrote(key_cache, value_cache)


_APPEND = Operator(
    "rotary_append",
    "(Tensor k, Tensor v, Tensor positions, int spec, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor starts, str impl) -> ()",
    _append,
    lambda *_: None,
)
