"""Shapes of the rotary attention's launches: tiles by architecture, pieces of a head, strides."""

from typing import Any, NamedTuple

import torch
from clinkd.kernels.common import INTERPRETED
from torch import Tensor


class Blocks(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    rows: int  # of the side that a program owns
    columns: int  # of the side that it walks over
    warps: int
    stages: int
    whole: bool = False  # a head that is a power of two is one piece in every product
    narrow: bool = False  # rows of the other side are counted in 32 bits, where these suffice


def pieces(head_dim: int, whole: bool) -> tuple[int, int]:
    """D0 and D1: powers of two of at least 16, together at least head_dim.

    A power of two from 64 on is two halves unless `whole`: half a tile at a time takes fewer
    registers, and products of sm_90 that read whole tiles fewer instructions.
    """
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    if rest:
        return first, max(16, 1 << (rest - 1).bit_length())
    return (first, 0) if whole or first < 64 else (first // 2, first // 2)


def forward_blocks(head_dim: int, element_size: int, arch: int) -> Blocks:
    """Of the forward kernel; the largest that spill no register.

    On sm_90, here and below, those that were fastest on an H100 or H200.
    """
    if INTERPRETED:
        return Blocks(32, 16, 4, 1, True, True)
    if arch == 90 and element_size == 2 and head_dim <= 128:
        return Blocks(64, 64, 4, 3, head_dim <= 64, head_dim < 128)
    if element_size == 4:
        if head_dim > 128 or (arch >= 90 and 64 < head_dim < 128):
            return Blocks(32, 16, 8, 2)
        return Blocks(64, 32, 8, 2) if arch >= 90 and head_dim == 128 else Blocks(64, 16, 8, 2)
    if head_dim <= 64:
        return Blocks(128, 64, 8 if arch >= 120 and head_dim > 32 else 4, 3)
    if head_dim < 128:
        return Blocks(128, 32, 8, 3)
    return Blocks(128, 64, 8, 2) if head_dim == 128 else Blocks(64, 32, 8, 2)


def keys_blocks(head_dim: int, element_size: int, arch: int) -> Blocks:
    """Of the kernel that owns keys."""
    if INTERPRETED:
        return Blocks(32, 16, 4, 1, True, True)
    if arch == 90 and element_size == 2 and head_dim <= 128:
        rows, columns, warps = (64, 64, 4) if head_dim <= 64 else (128, 32, 8)
        return Blocks(rows, columns, warps, 3, True, True)
    if element_size == 4:
        if head_dim > 128:
            return Blocks(16, 16, 8, 2)
        if arch < 90 and 64 < head_dim <= 80:
            return Blocks(32, 16, 8, 2)
        return Blocks(32, 32, 8, 2 if 80 < head_dim <= 96 else 1)
    if head_dim <= 64:
        return Blocks(64, 32, 4, 2)
    if head_dim < 128:
        return Blocks(64, 32 if head_dim < 96 else 16, 8, 2)
    return Blocks(32, 32, 4, 2) if head_dim == 128 else Blocks(32, 16, 8, 1)


def queries_blocks(head_dim: int, element_size: int, arch: int) -> Blocks:
    """Of the backward kernel that owns queries."""
    if INTERPRETED:
        return Blocks(32, 16, 4, 1, True, True)
    if arch == 90 and element_size == 2 and head_dim <= 128:
        return Blocks(64, 64, 4, 2, head_dim <= 64, head_dim < 128)
    if element_size == 4:
        return Blocks(32, 32, 8, 1) if head_dim <= 128 else Blocks(16, 16, 8, 1)
    if head_dim <= 64:
        return Blocks(64, 64, 4, 2)
    return Blocks(64, 32, 8, 2) if head_dim <= 128 else Blocks(32, 16, 8, 1)


def walk(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, row and head; the batch's is 0 where x is packed."""
    first, second, *rest = x.stride()
    return (0, first, second) if x.dim() == 3 else (first, second, rest[0])


def is_narrow(blocks: Blocks, *walked: Tensor) -> bool:
    """Whether a kernel counts rows [..., S, H, D] of these in 32 bits.

    Only on sm_90: elsewhere the compiler steps a pointer for each row, which takes less still.
    """
    return blocks.narrow and all(x.shape[-3] * x.stride(-3) < 1 << 31 for x in walked)


def count_tiles(rows: int, block: int, sequences: int, packed: bool) -> int:
    """Programs that cover all rows: packed ones may leave some without work, which saves a wait."""
    tiles = -(-rows // block)
    return tiles + sequences if packed else tiles * sequences


def constants(x: Tensor, spec: Any, blocks: Blocks) -> dict[str, Any]:
    """Compile-time values of a head, and options of the launch, that every kernel takes."""
    D = x.shape[-1]
    D0, D1 = pieces(D, blocks.whole)
    return {
        "D": D,
        "R": spec.pairs,
        "PAIR_STRIDE": spec.pair_stride,
        "D0": D0,
        "D1": D1,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
