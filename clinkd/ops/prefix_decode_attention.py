"""Attention of one decode step for hypotheses that share one prompt."""

import importlib

import torch
from torch import Tensor

from clinkd.ops._checks import check_float
from clinkd.ops._impl import on_device, resolve_impl, why_not_triton
from clinkd.ops._operator import Operator
from clinkd.ops.reference.prefix_decode_attention import default_visible
from clinkd.ops.reference.prefix_decode_attention import prefix_decode_attention as reference

IMPLS = ("auto", "reference", "cpu", "triton")


def prefix_decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    suffix_lengths: Tensor,
    prefix_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend from every hypothesis to its question's prompt and its own suffix.

    The prompt's keys and values are stored and read once for all hypotheses of a question. Formula:
    `clinkd.ops.reference.prefix_decode_attention`. There is no gradient. On a GPU nothing waits for
    the device, and a captured CUDA graph stays right while lengths and places change.

    Args:
        q: [B, K, Hq, D], rotated.
        prefix_k, prefix_v: [B, Hkv, P, D].
        suffix_k, suffix_v: [B, Hkv, M, D].
        suffix_lengths: [B] int32 or int64.
        prefix_lengths: [B] int32 or int64; default: all P.
        visible: [B, K, M] bool; default: hypothesis k sees places k, k + K, k + 2 K, …
        scale: default `D ** -0.5`.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        [B, K, Hq, D] in q's dtype; NaN for a hypothesis that sees nothing.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: an explicit `impl` that cannot run here.
    """
    _check(q, prefix_k, prefix_v, suffix_k, suffix_v, suffix_lengths, prefix_lengths, visible)
    out: Tensor = _PREFIX_DECODE(
        q,
        prefix_k,
        prefix_v,
        suffix_k,
        suffix_v,
        prefix_lengths,
        suffix_lengths,
        visible,
        q.shape[-1] ** -0.5 if scale is None else scale,
        resolve_prefix_decode(impl, q.device, q.dtype),
    )
    return out


def resolve_prefix_decode(impl: str, device: torch.device, dtype: torch.dtype) -> str:
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
    if impl == "reference":
        return None
    if impl == "cpu":
        return None if device.type == "cpu" else f"it takes cpu tensors, got {device.type}"
    return why_not_triton(device, dtype)


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    prefix_lengths: Tensor | None,
    visible: Tensor | None,
) -> None:
    check_float("q", q, 4, "[B, K, Hq, D]")
    B, K, Hq, D = q.shape
    Hkv = prefix_k.shape[1] if prefix_k.dim() == 4 else 0
    for name, key, value, room in (
        ("prefix", prefix_k, prefix_v, "P"),
        ("suffix", suffix_k, suffix_v, "M"),
    ):
        for tensor, suffix in ((key, "k"), (value, "v")):
            fits = tensor.dim() == 4 and (*tensor.shape[:2], tensor.shape[3]) == (B, Hkv, D)
            if not fits or tensor.shape != key.shape:
                raise ValueError(
                    f"{name}_{suffix} must be [B, Hkv, {room}, D] = [{B}, {Hkv}, {room}, {D}], "
                    f"got shape {tuple(tensor.shape)}"
                )
            if tensor.dtype != q.dtype:
                raise TypeError(f"{name}_{suffix} must be {q.dtype} as q, got {tensor.dtype}")
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise ValueError(f"{name}_{suffix} must not need a gradient: decoding has none")
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("q must not need a gradient: decoding has none; use torch.no_grad()")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"q's Hq = {Hq} must be a multiple of prefix_k's Hkv = {Hkv}")
    for name, lengths in (("suffix_lengths", suffix_lengths), ("prefix_lengths", prefix_lengths)):
        if lengths is None:
            continue
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
        if lengths.shape != (B,):
            raise ValueError(f"{name} must be [B] = [{B}], got shape {tuple(lengths.shape)}")
    for name, given in (
        ("prefix_k", prefix_k),
        ("prefix_v", prefix_v),
        ("suffix_k", suffix_k),
        ("suffix_v", suffix_v),
        ("suffix_lengths", suffix_lengths),
        ("prefix_lengths", prefix_lengths),
        ("visible", visible),
    ):
        if given is not None and given.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {given.device}")
    if visible is not None:
        if visible.dtype != torch.bool:
            raise TypeError(f"visible must be bool, got {visible.dtype}")
        if visible.shape != (B, K, suffix_k.shape[2]):
            raise ValueError(
                f"visible must be [B, K, M] = [{B}, {K}, {suffix_k.shape[2]}], "
                f"got shape {tuple(visible.shape)}"
            )


def _cpu(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    prefix_lengths: Tensor | None,
    suffix_lengths: Tensor,
    visible: Tensor | None,
    scale: float,
) -> Tensor:
    """Two matrix products a part, hypotheses × query heads of a key-value head as their rows."""
    B, K, Hq, D = q.shape
    Hkv, M = prefix_k.shape[1], suffix_k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    # lengths lie on the host: no place beyond them is touched
    _, used = _bounds("suffix_lengths", suffix_lengths, M)
    shortest = P = prefix_k.shape[2]
    if prefix_lengths is not None:
        shortest, P = _bounds("prefix_lengths", prefix_lengths, P)
    if P + used == 0:  # a softmax over nothing would leave 0
        return q.new_full(q.shape, torch.nan)
    keys = [prefix_k[:, :, :P].to(compute), suffix_k[:, :, :used].to(compute)]
    values = [prefix_v[:, :, :P].to(compute), suffix_v[:, :, :used].to(compute)]

    G = Hq // Hkv
    rows = q.to(compute).reshape(B, K, Hkv, G, D).transpose(1, 2)
    rows = (rows * scale).reshape(B, Hkv, K * G, D)
    scores = rows.new_empty(B, Hkv, rows.shape[2], P + used)
    scores[..., :P] = rows @ keys[0].transpose(-1, -2)
    scores[..., P:] = rows @ keys[1].transpose(-1, -2)
    if prefix_lengths is not None and shortest < P:
        beyond = torch.arange(P, device=q.device) >= prefix_lengths[:, None]
        scores[..., :P].masked_fill_(beyond[:, None, None], float("-inf"))
    seen = default_visible(B, K, M, q.device) if visible is None else visible
    places = torch.arange(used, device=q.device)
    hidden = ~(seen[..., :used] & (places < suffix_lengths[:, None])[:, None])
    by_hypothesis = scores.view(B, Hkv, K, G, P + used)[..., P:]
    by_hypothesis.masked_fill_(hidden[:, None, :, None], float("-inf"))
    weights = scores.softmax(dim=-1)
    out = weights[..., :P] @ values[0] + weights[..., P:] @ values[1]
    if not bool(out.isfinite().all()):
        # places that nobody sees may hold anything, and 0 * NaN has reached the sum: clear a copy
        if shortest < P:
            values[0] = values[0].masked_fill(beyond[:, None, :, None], 0.0)
        values[1] = values[1].masked_fill(hidden.all(dim=1)[:, None, :, None], 0.0)
        out = weights[..., :P] @ values[0] + weights[..., P:] @ values[1]
    merged: Tensor = out.view(B, Hkv, K, G, D).transpose(1, 2).reshape(B, K, Hq, D).to(q.dtype)
    return merged


def _bounds(name: str, lengths: Tensor, room: int) -> tuple[int, int]:
    """The least and the largest of some lengths on the host."""
    if lengths.numel() == 0:
        return 0, 0
    least, most = (int(n) for n in lengths.aminmax())
    if least < 0 or most > room:
        raise ValueError(f"{name} must be in 0 … {room}, got {least} … {most}")
    return least, most


def _triton(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    prefix_lengths: Tensor | None,
    suffix_lengths: Tensor,
    visible: Tensor | None,
    scale: float,
) -> Tensor:
    if prefix_k.shape[2] + suffix_k.shape[2] == 0:  # the kernel has no blocks of no places
        return q.new_full(q.shape, torch.nan)
    # by name: ops need torch alone, and the kernels' folder is outside the package's
    launch = importlib.import_module("clinkd.kernels.prefix_decode_attention").launch

    B, K = q.shape[:2]
    if prefix_lengths is None:
        prefix_lengths = torch.full((B,), prefix_k.shape[2], dtype=torch.int32, device=q.device)
    if visible is None:
        visible = default_visible(B, K, suffix_k.shape[2], q.device)
    with on_device(q):
        out: Tensor = launch(
            q if q.stride(-1) == 1 else q.contiguous(),
            *_like_strides(prefix_k, prefix_v),
            *_like_strides(suffix_k, suffix_v),
            prefix_lengths.int(),
            suffix_lengths.int(),
            visible.contiguous(),
            scale,
        )
    return out


def _like_strides(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both with equal strides and components side by side, copied only where they are not."""
    if key.stride(-1) == 1 and key.stride() == value.stride():
        return key, value
    return key.contiguous(), value.contiguous()


def _run(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    prefix_lengths: Tensor | None,
    suffix_lengths: Tensor,
    visible: Tensor | None,
    scale: float,
    impl: str,
) -> Tensor:
    parts = (q, prefix_k, prefix_v, suffix_k, suffix_v)
    if impl == "reference":
        return reference(
            *parts,
            suffix_lengths=suffix_lengths,
            prefix_lengths=prefix_lengths,
            visible=visible,
            scale=scale,
        ).contiguous()
    run = _cpu if impl == "cpu" else _triton
    return run(*parts, prefix_lengths, suffix_lengths, visible, scale)


def _fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


_PREFIX_DECODE = Operator(
    "prefix_decode_attention",
    "(Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor suffix_k, Tensor suffix_v, "
    "Tensor? prefix_lengths, Tensor suffix_lengths, Tensor? visible, float scale, str impl) "
    "-> Tensor",
    _run,
    _fake,
)
