"""In place of transformers' rotary embeddings: positions as the rotary op reads them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clinkd.errors import ConfigError
from clinkd.ops.reference.rotary import angles
from clinkd.ops.rotary import resolve_rotary
from clinkd.rotary import PositionConfig, RotarySpec

IMPLS = ("auto", "reference", "cpu", "cuda", "eager")
UNCHANGING = ("default", "linear", "yarn", "llama3", "proportional")  # whatever the length


def text_spec(config: Any, positions: PositionConfig, *, eager: bool = False) -> RotarySpec:
    """Axis and speed of every pair in the language layers.

    Raises:
        ConfigError: a kind of scaled RoPE, or a head size, that the preset cannot take.
    """
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    if positions.preset == "paper":
        if eager:
            raise ConfigError("impl='eager' has no interleaved layout, which 'paper' uses")
        return RotarySpec.split(head_dim, base=positions.base)
    speeds = _text_ladder(config)
    if len(speeds) != head_dim // 2:
        raise ConfigError(
            f"the model turns {2 * len(speeds)} of {head_dim} components; only full rotary "
            "embeddings are supported"
        )
    if positions.preset == "warm":
        axis = RotarySpec.alternate(head_dim).axis
    else:
        default = [24, 20, 20] if config.model_type.startswith("qwen3") else [16, 24, 24]
        sections = config.rope_parameters.get("mrope_section", default)
        interleaved = config.model_type.startswith("qwen3")
        axis = RotarySpec.mrope(head_dim, sections, interleaved=interleaved).axis
    return RotarySpec(head_dim, axis, speeds, head_dim // 2)


def vision_spec(config: Any) -> RotarySpec:
    """The vision tower's: height and width, as it came."""
    width = getattr(config, "embed_dim", None) or config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_heads
    spec = RotarySpec.axial(head_dim)
    base = config.rope_parameters["rope_theta"]
    speeds = 1.0 / (
        base ** (torch.arange(0, head_dim // 2, 2, dtype=torch.float) / (head_dim // 2))
    )
    return RotarySpec(head_dim, spec.axis, tuple(speeds.tolist()) * 2, head_dim // 2)


def _text_ladder(config: Any) -> tuple[float, ...]:
    """Speeds as transformers computes them, in float32 whatever the model was cast to."""
    kind = config.rope_parameters["rope_type"]
    if kind not in UNCHANGING:
        raise ConfigError(
            f"rope_type {kind!r} changes with the length of the text; supported are "
            f"{', '.join(UNCHANGING)}"
        )
    if kind == "default":
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return tuple((1.0 / config.rope_parameters["rope_theta"] ** exponents).tolist())
    speeds, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if scaling != 1.0:
        raise ConfigError(f"rope_type {kind!r} with attention scaling {scaling} is not supported")
    return tuple(speeds.tolist())


class _Rotary(nn.Module):
    """What both towers share: spec, implementation, and the module that was here before."""

    def __init__(self, stock: nn.Module, spec: RotarySpec, impl: str) -> None:
        super().__init__()
        self.stock = stock
        self.spec = spec
        self.impl = impl

    def embed(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`positions` [A, ..., S] for a kernel; for the reference also cosine and sine, once."""
        if self.impl == "eager":
            return self._eager(positions)
        if resolve_rotary(self.impl, positions.device, dtype) != "reference":
            return (positions,)
        return (positions, *angles(positions, self.spec, torch.promote_types(dtype, torch.float32)))

    def _eager(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        axis = torch.tensor(self.spec.axis, device=positions.device)
        speeds = torch.tensor(self.spec.inv_freq, dtype=torch.float, device=positions.device)
        angle = positions.float()[axis].movedim(0, -1) * speeds
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


class TextRotary(_Rotary):
    """Of the language model: position ids [1 or 3, B, S] in, float32 positions out."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return `embed`'s tensors for x [B, S, C]."""
        if position_ids.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(f"position_ids must be float32 or integers, got {position_ids.dtype}")
        positions = position_ids.to(device=x.device, dtype=torch.float32)
        positions = positions.expand(3, x.shape[0], -1)
        if self.spec.axes < 3:
            positions = positions[1:]
        found = self.embed(positions, x.dtype)
        return tuple(t.to(x.dtype) for t in found) if self.impl == "eager" else found


class VisionRotary(_Rotary):
    """Of the vision tower: position ids [N, 2] in; tokens stay first, as window attention needs."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return positions [N, 2], and cosine and sine [N, R] for the reference."""
        found = self.embed(position_ids.to(x.device, torch.float32).T, x.dtype)
        return found if self.impl == "eager" else (found[0].T, *found[1:])
