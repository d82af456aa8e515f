"""Rotary attention on the CPU: a C++ kernel, which turns queries and keys as it reads them.

What that kernel does not take is turned, and goes through torch's flash kernel. Nothing turned is
kept for the backward pass.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from clinkd.ops import _attention_flash
from clinkd.ops._impl import TYPES, built, extension
from clinkd.ops._memory import fresh_like
from clinkd.ops.rotary import native_arguments, resolve_rotary, turn, turn_inplace

# for fewer queries of a sequence, times the heads that share a key, copying keys into panels is
# not worth while, unless the keys are as few; of packed ones the mean counts
FEWEST_QUERIES = 48
FEWEST_KEYS = 8  # of packed sequences in the mean: panels have room for 16 or 32 of each

_Place = tuple[int, int, int, int]  # pointer; strides of batch, token and head


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
    lse = empty_lse(q)
    nothing = q.new_empty(0), q.new_empty(0)  # an operator's outputs share no memory
    if not takes(q, k, cu_seqlens):
        q, k = _turn(q, k, positions, key_positions, spec)
        mask = causal, scale, cu_seqlens, cu_seqlens_k, window
        return _attention_flash.forward(q, k, v, lse, *mask), lse, *nothing
    q, k, v = (_side_by_side(t) for t in (q, k, v))
    out = fresh_like(q)
    options = positions, key_positions, spec, causal, scale, cu_seqlens, cu_seqlens_k, window
    extension().attention_cpu(_attention(q, k, v, out, lse, *options), torch.get_num_threads())
    return out, lse, *nothing


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    if not takes(q, k, cu_seqlens):
        q, k = _turn(q, k, positions, key_positions, spec)
        mask = causal, scale, cu_seqlens, cu_seqlens_k, window
        found = _attention_flash.backward(grad, out, lse, q, k, v, *mask)
        impl = resolve_rotary("auto", q.device, q.dtype)
        turn_inplace(found[0], positions, spec, True, impl)
        if key_positions is not None:
            turn_inplace(found[1], key_positions, spec, True, impl)
        return found
    q, k, v, out, grad = (_side_by_side(t) for t in (q, k, v, out, grad))
    of_q, of_k, of_v = (fresh_like(t) for t in (q, k, v))
    options = positions, key_positions, spec, causal, scale, cu_seqlens, cu_seqlens_k, window
    extension().attention_backward_cpu(
        _attention(q, k, v, out, lse, *options),
        [_place(t) for t in (grad, of_q, of_k, of_v)],
        torch.get_num_threads(),
    )
    return of_q, of_k, of_v


def takes(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the C++ kernel does it, and not torch's: by types, sizes and the processor."""
    if q.dtype not in TYPES or not built("attention_cpu"):
        return False
    if q.numel() == 0 or k.numel() == 0 or _has_tiles(q.dtype):
        return False
    sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    queries, keys = (t.shape[:-2].numel() // max(1, sequences) for t in (q, k))
    if cu_seqlens is not None and keys < FEWEST_KEYS:
        return False
    return queries * q.shape[-2] // k.shape[-2] >= min(FEWEST_QUERIES, keys)


def empty_lse(q: Tensor) -> Tensor:
    """[B, H, S] or [H, N] for queries [B, S, H, D] or [N, H, D], laid out as torch does."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:-1], dtype=dtype).transpose(-1, -2)


@lru_cache(maxsize=4)
def _has_tiles(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies tiles of this type (AMX), as torch's kernel does then."""
    name = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype)
    asked = getattr(torch.cpu, "get_capabilities", None)
    return name is not None and asked is not None and bool(asked().get(name, False))


def _turn(
    q: Tensor, k: Tensor, positions: Tensor, key_positions: Tensor | None, spec: int
) -> tuple[Tensor, Tensor]:
    """Both turned; torch's kernel takes a head's tokens a little faster where they lie together."""
    impl = resolve_rotary("auto", q.device, q.dtype)
    q = turn(q, positions, spec, False, impl, heads_first=True)
    if key_positions is not None:
        k = turn(k, key_positions, spec, False, impl, heads_first=True)
    return q, k


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _place(x: Tensor) -> _Place:
    """Of [B, S, H, D], or of packed [N, H, D], which is one batch."""
    batch, token, head = x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])
    return x.data_ptr(), batch, token, head


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    positions: Tensor,
    key_positions: Tensor | None,
    spec: int,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> Any:
    """The C++ kernel's arguments; the tensors must outlive them."""
    if cu_seqlens is None or cu_seqlens_k is None:
        sequences, starts = len(q), (0, 0)
    else:
        sequences, starts = len(cu_seqlens) - 1, (cu_seqlens.data_ptr(), cu_seqlens_k.data_ptr())
    batch, head, token = lse.stride() if lse.dim() == 3 else (0, *lse.stride())
    return extension().Attention(
        _turned(q, positions, spec, False),
        _turned(
            k, positions if key_positions is None else key_positions, spec, key_positions is None
        ),
        (_place(v), _place(out), (lse.data_ptr(), batch, token, head)),
        starts,
        sequences,
        causal,
        window,
        scale,
    )


def _turned(x: Tensor, positions: Tensor, spec: int, already: bool) -> Any:
    """Queries or keys, and how they are turned, unless they are `already`."""
    place, _, positions_place, how = native_arguments(x, x, positions, spec)
    return extension().Turned(place, positions_place, how, already, TYPES[x.dtype])
