"""The ops inside Hugging Face models."""

from clinkd.models.apply import (
    apply,
    check_grids,
    load,
    packed_position_ids,
    positions_of,
    restore,
)

__all__ = [
    "apply",
    "check_grids",
    "load",
    "packed_position_ids",
    "positions_of",
    "restore",
]
