"""Rotary embedding of real-valued positions in plain torch: the definition."""

import torch
from torch import Tensor

from clinkd.rotary import RotarySpec


def rotary(x: Tensor, positions: Tensor, spec: RotarySpec, *, inverse: bool = False) -> Tensor:
    """Turn every pair of every head by its position times its speed.

        angle[token, i] = positions[axis[i], token] * inv_freq[i]
        (a, b) -> (a cos - b sin, a sin + b cos)

    Su et al. 2021, arXiv:2104.09864, with one position axis a pair. Pair `i` is described at
    `RotarySpec`. The inverse turns by minus the angle, which is also the gradient.

    Shapes:
        A: position axes, at least `spec.axes`; D: `spec.head_dim`.

    Args:
        x: [B, S, H, D] or packed [N, H, D].
        positions: [A, B, S] or [A, N] float32 (float64 is read as it is).

    Returns:
        x's shape and dtype; computed in float32, float64 for float64.
    """
    cos, sin = angles(positions, spec, torch.promote_types(x.dtype, torch.float32))
    return rotate(x, cos, sin, spec, inverse=inverse)


def angles(positions: Tensor, spec: RotarySpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle, [B, S, R] or [N, R].

    The product is float64: in float32 an angle of 30,000 radians is off by 2e-3.
    """
    axis = torch.tensor(spec.axis, device=positions.device)
    speed = torch.tensor(spec.inv_freq, dtype=torch.float64, device=positions.device)
    angle = positions.to(torch.float64)[axis].movedim(0, -1) * speed
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, spec: RotarySpec, *, inverse: bool = False
) -> Tensor:
    """Apply given cosines and sines [..., R] to x [..., H, D]."""
    n = spec.pair_stride
    blocks = spec.pairs // n
    cos = cos.reshape(*cos.shape[:-1], 1, blocks, n)  # 1 for all heads
    sin = sin.reshape(*sin.shape[:-1], 1, blocks, n)
    if inverse:
        sin = -sin
    turned, rest = x[..., : 2 * spec.pairs], x[..., 2 * spec.pairs :]
    a, b = turned.to(cos.dtype).reshape(*x.shape[:-1], blocks, 2, n).unbind(-2)
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-2)
    turned = pairs.flatten(-3).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)
