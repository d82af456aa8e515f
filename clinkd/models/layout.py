"""Which attention a forward of the language layers takes: decided once, for all of them.

The rule of `attention="auto"`: the fused op, except on CUDA where no query needs a mask (rows
without padding, or padded on the right alone; not packed; no window shorter than the row). There
cuDNN's or torch's flash attention behind the rotary op is the faster choice on an H100
(docs/results/h100.md). In both no mask is made: right padding lies behind everything that counts.

Tokens that follow a filled cache take the rotary op and SDPA with transformers' mask.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from clinkd.ops.rotary_attention import native_impl
from clinkd.ops.rotary_attention import why_not as why_not_attention

ATTENTIONS = ("auto", "fused", "sdpa")
ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
)


class Layout(NamedTuple):
    """What the fused op has to know of a batch.

    Args:
        starts: int32 [n + 1], where each sequence starts in the flattened batch, and B * S; a
            row's padding is a sequence too. None: every row is one sequence.
    """

    starts: Tensor | None


def lay_out(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a language model; its `attention` is what `apply` was given.

    Returns:
        Its arguments: for packed rows without a cache; unless it is "sdpa", where the op can run,
        without a mask, and with a `layout` where its layers are to take the op. None: as they came.

    Raises:
        RuntimeError: "fused", and the op cannot do what this forward asks for.
    """
    kwargs = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
    if _may_be_packed(kwargs):
        kwargs["use_cache"] = False  # with one, by transformers' default, sequences would mix
    if text.attention == "sdpa":  # before the length, by which no graph can branch
        return (), kwargs
    past = _cache(kwargs)
    if past is not None and past.get_seq_length() > 0:
        return None
    tokens = kwargs.get("inputs_embeds")
    tokens = kwargs["input_ids"] if tokens is None else tokens
    dtype = tokens.dtype if tokens.is_floating_point() else text.dtype
    dropout = text.config.attention_dropout if text.training else 0.0
    reason = why_not(text.config, dropout, tokens.device, dtype)
    if reason is None:
        reason = _why_not_rows(text, kwargs, tokens)
    starts, needs_mask = None, False
    if reason is None:
        positions = _planes(text, kwargs, tokens)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            starts, needs_mask, reason = _padded(mask.to(tokens.device))
        elif positions is not None and len(positions) == 4 and _finds_packing(text, kwargs):
            starts = _packed(positions[0])
            needs_mask = starts is not None
    if reason is not None:
        if text.attention == "fused":
            raise RuntimeError(f"attention='fused' cannot run here: {reason}")
        return (), kwargs
    kwargs["attention_mask"] = None
    # three planes: transformers would look for packed rows in the fourth, and make a mask
    kwargs["position_ids"] = positions if positions is None else positions[-3:]
    windows = "sliding_attention" in (getattr(text.config, "layer_types", None) or ())
    needs_mask |= windows and tokens.shape[1] > text.config.sliding_window
    if text.attention == "fused" or is_faster(tokens.device.type, needs_mask):
        kwargs["layout"] = Layout(starts)
    return (), kwargs


def is_faster(device: str, needs_mask: bool) -> bool:
    """Whether "auto" takes the fused op.

    Args:
        needs_mask: SDPA would need one, beyond its `is_causal`.
    """
    return device != "cuda" or needs_mask


def why_not(config: Any, dropout: float, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why attention layers of this config cannot take the fused op; None where they can."""
    if config._attn_implementation != "sdpa":
        return f"attn_implementation is {config._attn_implementation!r}, not 'sdpa'"
    if dropout > 0:
        return f"it has no attention dropout, {dropout} is asked for"
    if why_not_attention(native_impl(device), device, dtype) is not None:
        return f"there is no kernel for {dtype} on {device.type}"
    return None


def _why_not_rows(text: Any, kwargs: dict[str, Any], tokens: Tensor) -> str | None:
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
        return "attention_mask is not [B, S], one value a token"
    if kwargs.get("is_causal", getattr(text.config, "is_causal", None)) is False:
        return "is_causal is False"
    if is_tracing(tokens):
        return "a traced model cannot read where rows are padded or packed"
    return None


def _planes(text: Any, kwargs: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """Position ids [3 or 4, B, S], as transformers expands plain ones."""
    positions: Tensor | None = kwargs.get("position_ids")
    if positions is None or positions.dim() == 3:
        return positions
    planes = 4 if text.config.model_type.startswith("qwen3") else 3
    return positions.expand(planes, tokens.shape[0], -1)


def _may_be_packed(kwargs: dict[str, Any]) -> bool:
    """Whether there are positions as packed rows need them, no mask, and no word of a cache."""
    positions = kwargs.get("position_ids")
    given = [kwargs.get("attention_mask"), kwargs.get("use_cache"), _cache(kwargs)]
    planes = 0 if positions is None or positions.dim() != 3 else len(positions)
    return planes == 4 and all(each is None for each in given)


def _finds_packing(text: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers looks for packed rows: only where nothing is cached."""
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = text.config.use_cache
    checkpointing = text.training and text.gradient_checkpointing
    return _cache(kwargs) is None and (checkpointing or not use_cache)


def _cache(kwargs: dict[str, Any]) -> Any:
    """Under its older name or that since transformers 5.24."""
    past = kwargs.get("past_key_values")
    return kwargs.get("cache") if past is None else past


def cache_name(model: Any) -> str:
    """How a model's forward calls its cache; the other name gives a warning, or an error."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _padded(mask: Tensor) -> tuple[Tensor | None, bool, str | None]:
    """Cut each row of a mask [B, S] in padding, tokens, padding: any of them may be empty.

    Returns:
        Starts int32 [3 B + 1], None without padding; whether there is some on the left; why the
        rows cannot be cut so.
    """
    real = mask.bool()
    B, S = real.shape
    first, length = real.int().argmax(1), real.sum(1)
    index = torch.arange(S, device=mask.device)
    filled = (index >= first[:, None]) & (index < (first + length)[:, None])
    facts = torch.stack([real.all(), (first > 0).any(), (filled == real).all()])
    whole, left, one_run = facts.tolist()  # transformers waits for the device here too
    if not one_run:
        return None, False, "attention_mask has zeros between the tokens of a row"
    if whole:
        return None, False, None
    row = torch.arange(B, device=mask.device) * S
    cuts = torch.stack([row, row + first, row + first + length], dim=1).flatten()
    return torch.cat([cuts, cuts.new_full((1,), B * S)]).int(), left, None


def _packed(index: Tensor) -> Tensor | None:
    """Starts int32 [n + 1] of sequences in rows of indices [B, S]; None: one a row."""
    begins = torch.ones_like(index, dtype=torch.bool)
    begins[:, 1:] = index.diff(dim=1) != 1
    starts = begins.flatten().nonzero().squeeze(1)
    if len(starts) == len(index):
        return None
    return torch.cat([starts, starts.new_full((1,), index.numel())]).int()
