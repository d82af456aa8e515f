"""Positions and rotary ops put into a Qwen-VL model, and saved with it.

Nothing of transformers is subclassed or changed: a few objects of this one model get another
`forward`, method or hook, which `restore` takes back.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from clinkd.errors import ConfigError
from clinkd.models.attention import text_attention, vision_attention
from clinkd.models.embedding import IMPLS, TextRotary, VisionRotary, text_spec, vision_spec
from clinkd.models.layout import ATTENTIONS, lay_out
from clinkd.models.weights import require_weights
from clinkd.positions import Grid, place
from clinkd.positions import check_grids as check_rule
from clinkd.rotary import PositionConfig

CONFIG_KEY = "clinkd_positions"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO = 1, 2  # mm_token_type_ids
# arguments of `from_pretrained` that say where a checkpoint's files are
PLACE = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def apply(
    model: PreTrainedModel,
    positions: PositionConfig | None = None,
    impl: str = "auto",
    attention: str = "auto",
) -> PreTrainedModel:
    """Make a Qwen-VL model follow `positions`, in its language layers and vision tower.

    The configuration is kept in `model.config`, hence in the config.json of a saved checkpoint.
    May be called again with other positions.

    Args:
        model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model of transformers (or PEFT around one).
        positions: default: what the model's config says, else `PositionConfig()`.
        impl: of the rotary op: "auto", "reference", "cpu", "cuda"; or "eager", transformers' own
            arithmetic (float32 angles, cosines rounded to the model's dtype).
        attention: "fused", `rotary_attention` wherever nothing is cached yet, and an error where
            it cannot run; "sdpa", the rotary op and then SDPA; "auto", the faster one, by the rule
            of `clinkd.models.layout`. With impl "reference" or "eager" it is SDPA.

    Returns:
        The same model.

    Raises:
        ConfigError: another architecture, or positions that it cannot follow.
    """
    if impl not in IMPLS:
        raise ConfigError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if attention not in ATTENTIONS:
        raise ConfigError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if impl in ("reference", "eager"):
        if attention == "fused":
            raise ConfigError(f"attention='fused' has kernels alone, impl={impl!r} has none")
        attention = "sdpa"
    inner = _inner(model)
    config = inner.config
    if positions is None:
        positions = positions_of(config) or PositionConfig()
    text, vision = inner.language_model, inner.visual
    spec = text_spec(text.config, positions, eager=impl == "eager")
    spec_of_vision = vision_spec(vision.config)  # both before anything is changed: they may raise
    restore(model)
    text.rotary_emb = TextRotary(text.rotary_emb, spec, impl)
    vision.rotary_pos_emb = VisionRotary(vision.rotary_pos_emb, spec_of_vision, impl)
    if impl != "eager":
        for layer in text.layers:
            layer.self_attn.rotary = (spec, impl)
            layer.self_attn.forward = partial(text_attention, layer.self_attn)
        for block in vision.blocks:
            block.attn.rotary = (spec_of_vision, impl)
            block.attn.attention = attention
            block.attn.forward = partial(vision_attention, block.attn)
    text.attention = attention
    text.layout_hook = text.register_forward_pre_hook(lay_out, with_kwargs=True)
    inner.clinkd_positions = positions
    inner.get_rope_index = partial(_rope_index, inner)
    inner.compute_3d_position_ids = partial(_position_ids, inner)
    for each in {id(c): c for c in (model.config, config)}.values():
        setattr(each, CONFIG_KEY, positions.to_dict())
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Take back everything that `apply` did; a model without it is left as it is."""
    inner = _inner(model)
    text, vision = inner.language_model, inner.visual
    if not isinstance(text.rotary_emb, TextRotary):
        return model
    text.rotary_emb = text.rotary_emb.stock
    vision.rotary_pos_emb = vision.rotary_pos_emb.stock
    for attention in [layer.self_attn for layer in text.layers] + [b.attn for b in vision.blocks]:
        for name in ("forward", "rotary", "attention"):
            attention.__dict__.pop(name, None)
    text.layout_hook.remove()
    del text.layout_hook, text.attention
    for name in ("get_rope_index", "compute_3d_position_ids", "clinkd_positions"):
        inner.__dict__.pop(name, None)
    for config in (model.config, inner.config):
        config.__dict__.pop(CONFIG_KEY, None)
    return model


def load(
    path: str | Path,
    positions: PositionConfig | None = None,
    dtype: torch.dtype | str | None = None,
    impl: str = "auto",
    attention: str = "auto",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint and apply the positions that it was saved with.

    Args:
        path: folder or hub name.
        positions: for a checkpoint that names none, default `mrope`; one that does keeps its own
            (`apply` changes them).
        dtype: of the weights; default: as saved.
        impl, attention: as for `apply`.
        kwargs: go to `from_pretrained`.

    Raises:
        ConfigError: another architecture, positions that it cannot follow, or missing weights.
    """
    # of the same revision and subfolder as the weights
    config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in PLACE if k in kwargs})
    _check_family(config)
    chosen = positions_of(config) or positions or PositionConfig("mrope")
    model, info = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **kwargs
    )
    require_weights(f"checkpoint {str(path)!r}", info)
    return apply(model, chosen, impl, attention)


def positions_of(config: Any) -> PositionConfig | None:
    """The positions that a model's config.json names, if it does."""
    values = getattr(config, CONFIG_KEY, None)
    return None if values is None else PositionConfig.from_dict(values)


def check_grids(model: PreTrainedModel, image_grid_thw: Tensor) -> None:
    """Raise where the model's positions have no place for an image; see `clinkd.positions`."""
    inner = _inner(model)
    positions = getattr(inner, "clinkd_positions", None)
    if positions is not None:
        grids = _grids(inner, image_grid_thw)
        check_rule(grids, positions.rule, positions.pos_scale)


def packed_position_ids(
    model: PreTrainedModel,
    input_ids: Tensor,
    segments: Tensor,
    image_grid_thw: Tensor | None = None,
) -> Tensor:
    """`position_ids` for rows that hold several sequences one after another.

    Give them to the model without an attention mask and without a cache: transformers reads the
    borders off the first row, so that no sequence sees another. `use_cache` is then False by
    default; where it is True no border is looked for.

    Args:
        input_ids: [B, S].
        segments: [B, S] int, the number of each token's sequence.
        image_grid_thw: [images, 3] in reading order.

    Returns:
        [4, B, S] float32: index within the sequence, then the three rows of positions.

    Raises:
        ConfigError: a video, which has no place in a packed row.
    """
    inner = _inner(model)
    if bool((input_ids == inner.config.video_token_id).any()):
        raise ConfigError("packed rows have no rule for videos: give frames as images")
    image_mask = input_ids == inner.config.image_token_id
    grids = _grids(inner, image_grid_thw)
    found, _ = _place(inner, image_mask, grids, None, segments)
    index, _ = place(torch.zeros_like(image_mask), [], "qwen", (1.0, 1.0), segments=segments)
    return torch.cat([index[:1], found])


def _inner(model: Any) -> Any:
    """The part with `language_model` and `visual`."""
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    _check_family(model.config)
    inner = getattr(model, "model", model)
    if not hasattr(inner, "language_model") or not hasattr(inner, "visual"):
        raise ConfigError(f"{type(model).__name__} has no language model beside a vision tower")
    return inner


def _check_family(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"positions can be applied to {', '.join(FAMILIES)}, not to {config.model_type!r}"
        )


def _grids(inner: Any, image_grid_thw: Tensor | None) -> list[Grid]:
    """Merged (h, w) of every image of the batch."""
    if image_grid_thw is None:
        return []
    merge = inner.config.vision_config.spatial_merge_size
    return [(h // merge, w // merge) for _, h, w in image_grid_thw.tolist()]


def _place(
    inner: Any,
    image_mask: Tensor,
    grids: Sequence[Grid],
    attention_mask: Tensor | None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[3, B, S] positions and each row's next one; a two-axis preset leaves row 0 unread."""
    config: PositionConfig = inner.clinkd_positions
    found, following = place(
        image_mask,
        grids,
        config.rule,
        config.pos_scale,
        attention_mask,
        segments,
    )
    return (found if len(found) == 3 else torch.cat([found[:1], found])), following


def _rope_index(
    self: Any,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """In place of `get_rope_index`: positions [3, B, S] float32, and next position minus length."""
    if video_grid_thw is not None:
        preset = self.clinkd_positions.preset
        if preset != "mrope":
            raise ConfigError(
                f"positions {preset!r} have no rule for videos: give frames as images, or use "
                "the preset 'mrope'"
            )
        stock: tuple[Tensor, Tensor] = type(self).get_rope_index(
            self,
            input_ids,
            mm_token_type_ids=mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            **kwargs,
        )
        return stock
    image_mask = mm_token_type_ids.to(input_ids.device) == IMAGE
    found, following = _place(self, image_mask, _grids(self, image_grid_thw), attention_mask)
    length = input_ids.shape[1] if attention_mask is None else attention_mask.long().sum(-1)
    return found, (following - length).unsqueeze(1)


def _position_ids(self: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' `compute_3d_position_ids`, cut to the new tokens where a cache holds the rest.

    Its result is as long as the attention mask.
    """
    found: Tensor | None = type(self).compute_3d_position_ids(self, *args, **kwargs)
    embeds = kwargs.get("inputs_embeds")
    if found is None or embeds is None:
        return found
    return found[..., -embeds.shape[1] :]
