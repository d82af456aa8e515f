"""Attention with the rotary embedding inside: queries and keys come in unrotated."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from clinkd.ops._checks import Form, check_float, form
from clinkd.ops._impl import resolve_impl, why_not_triton
from clinkd.ops._operator import is_traced, is_watched
from clinkd.ops._rotary_attention import ROTARY_ATTENTION
from clinkd.ops.reference.rotary_attention import rotary_attention as reference_attention
from clinkd.ops.rotary import check_numbers, check_positions, check_rotary
from clinkd.rotary import RotarySpec

IMPLS = ("auto", "reference", "cpu", "triton")
FARTHEST = 2**31 - 1  # tokens: a wider window is as wide for the kernels


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    spec: RotarySpec,
    *,
    key_positions: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    turned_keys: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal or full attention, see `clinkd.ops.reference.rotary_attention` for the formula.

    Args:
        q: [B, Sq, Hq, D], or packed [N, Hq, D] with `cu_seqlens`; not rotated. Any strides.
        k: [B, Sk, Hkv, D] or [Nk, Hkv, D], not rotated; Hkv divides Hq.
        v: as k.
        positions: [A, B, Sq] or [A, N] float32, of the queries.
        spec: axis and speed of each pair.
        key_positions: [A, B, Sk] or [A, Nk], in any order; default: those of the queries.
        causal: the last query sees the last key, the one before it the one before that.
        scale: of the scores, above 0; default D ** -0.5. For one that learns, multiply q by it.
        cu_seqlens: int32 [n + 1], where each packed sequence starts, and N.
        cu_seqlens_k: the same for keys; default `cu_seqlens`.
        window: each query sees so many keys up to its own place.
        turned_keys: k is rotated already, as a cache holds it; so is its gradient.
        return_lse: also return the log-sum-exp, float32 [B, Hq, Sq] or [Hq, N], without gradient.
        impl: "auto", "reference", "cpu" or "triton".

    A position that is not finite is an error; on a GPU it gives NaN, and a later call raises, as no
    host waits, unless CLINKD_CHECK=1 is in the environment.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    if turned_keys and key_positions is not None:
        raise ValueError("key_positions must be None where turned_keys says k is rotated already")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor: multiply q by it, scale=1 here")
    if scale is not None and not 0 < scale < math.inf:  # a mask of -inf is multiplied by it
        raise ValueError(f"scale must be above 0 and finite, or None, got {scale}")
    tensors = (q, k, v, positions, key_positions, cu_seqlens, cu_seqlens_k)
    watched = is_watched(*tensors)
    fit: Callable[..., str] = _fit if watched else _fit_once
    impl = fit(*[form(tensor) for tensor in tensors], spec.key, turned_keys, impl)
    check_numbers("positions", positions, watched)
    if key_positions is not None:
        check_numbers("key_positions", key_positions, watched)
    if cu_seqlens is not None:
        _check_starts("cu_seqlens", cu_seqlens, q)
        cu_seqlens = cu_seqlens.contiguous()
    if cu_seqlens_k is not None:
        _check_starts("cu_seqlens_k", cu_seqlens_k, k)
        cu_seqlens_k = cu_seqlens_k.contiguous()
    if key_positions is None and not turned_keys:
        key_positions = positions
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        with torch.autocast(q.device.type, enabled=False):  # its products stay as wide as q
            out, lse = reference_attention(
                q,
                k,
                v,
                positions,
                spec,
                key_positions=key_positions,
                causal=causal,
                scale=scale,
                cu_seqlens=cu_seqlens,
                cu_seqlens_k=cu_seqlens_k,
                window=window,
                turned_keys=turned_keys,
            )
    else:
        run = ROTARY_ATTENTION if watched else ROTARY_ATTENTION.unwatched
        out, lse = run(
            q,
            k,
            v,
            positions,
            key_positions,
            spec.key,
            causal,
            scale,
            cu_seqlens,
            cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
            min(window or 0, FARTHEST),
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
            impl,
        )[:2]
    return (out, lse.detach()) if return_lse else out


def resolve_attention(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs for such tensors.

    Raises:
        ValueError: an unknown name.
        RuntimeError: an explicit one that cannot run here.
    """
    return resolve_impl(impl, IMPLS, native_impl(device), why_not, device, dtype)


def native_impl(device: torch.device) -> str:
    """What "auto" takes on a device, unless `why_not` speaks against it."""
    return "triton" if device.type == "cuda" else "cpu"


def why_not(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run for such tensors; None where it can."""
    if impl == "cpu" and device.type != "cpu":
        return f"it takes cpu tensors, got {device.type}"
    if impl == "triton":
        return why_not_triton(device, dtype)
    return None


def _fit(
    q: Form,
    k: Form,
    v: Form,
    positions: Form,
    key_positions: Form | None,
    cu_seqlens: Form | None,
    cu_seqlens_k: Form | None,
    spec: int,
    turned_keys: bool,
    impl: str,
) -> str:
    """The implementation that runs; raises where the tensors do not fit each other."""
    check_rotary("q", q, positions, RotarySpec.known[spec])
    packed = cu_seqlens is not None
    shape = "[N, H, D] with cu_seqlens" if packed else "[B, S, H, D] without cu_seqlens"
    if len(q.shape) != 4 - packed:
        raise ValueError(f"q must be {shape}, got shape {tuple(q.shape)}")
    for name, t in (("k", k), ("v", v)):
        check_float(name, t, 4 - packed, shape)
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(
                f"{name} must be {q.dtype} on {q.device} like q, got {t.dtype} {t.device}"
            )
        if t.shape[-1] != q.shape[-1] or (not packed and t.shape[0] != q.shape[0]):
            raise ValueError(f"{name} must have q's batch and head_dim, got shape {tuple(t.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"k must have a number of heads that divides q's {q.shape[-2]}, got {k.shape[-2]}"
        )
    if key_positions is not None:
        check_positions(
            "key_positions", key_positions, k.shape[:-2], RotarySpec.known[spec], q.device
        )
    elif k.shape[:-2] != q.shape[:-2] and not turned_keys:
        raise ValueError(
            "key_positions must be given where there are other keys than queries: "
            f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    for name, starts in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if starts is not None and (
            starts.dtype != torch.int32 or len(starts.shape) != 1 or starts.device != q.device
        ):
            raise TypeError(
                f"{name} must be int32 [n + 1] on {q.device}, got {starts.dtype} "
                f"{tuple(starts.shape)} on {starts.device}"
            )
    if cu_seqlens_k is not None and (cu_seqlens is None or cu_seqlens_k.shape != cu_seqlens.shape):
        raise ValueError(
            "cu_seqlens_k must come with a cu_seqlens of its length, got shapes "
            f"{cu_seqlens and tuple(cu_seqlens.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    return resolve_attention(impl, q.device, q.dtype)


_fit_once = lru_cache(maxsize=1024)(_fit)


def _check_starts(name: str, starts: Tensor, x: Tensor) -> None:
    """Raise unless they rise from 0 to N; on the CPU alone: elsewhere the host would wait."""
    if x.device.type == "cpu" and not is_traced(starts):
        numbers = starts.tolist()
        if numbers[:1] != [0] or numbers[-1] != x.shape[0] or sorted(numbers) != numbers:
            raise ValueError(f"{name} must rise from 0 to N = {x.shape[0]}, got {numbers}")
