"""What the hardware allows: a multiprocessor's resources, and the peak rates of two cards."""

from dataclasses import dataclass

ARCHS = (80, 90, 120)
# Of a multiprocessor: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute
# Capability". Registers are 65,536 on all, given out 256 at a time to each warp, and each of the
# four parts of a multiprocessor has a quarter of them (cuda_occupancy.h of the same toolkit).
WARPS = {80: 64, 90: 64, 120: 48}
BLOCKS = {80: 32, 90: 32, 120: 24}
SHARED = {80: 164 << 10, 90: 228 << 10, 120: 100 << 10}
REGISTERS, STEP, PARTS = 65_536, 256, 4
RESERVED = 1024  # bytes of shared memory that the system keeps a block


def occupancy(arch: int, registers: int, shared: int, warps: int) -> int:
    """Percent of a multiprocessor's warps that a kernel can fill."""
    a_warp = -(-registers * 32 // STEP) * STEP
    by_registers = PARTS * (REGISTERS // PARTS // a_warp) // warps
    by_shared = SHARED[arch] // (shared + RESERVED)
    blocks = min(by_registers, by_shared, WARPS[arch] // warps, BLOCKS[arch])
    return 100 * blocks * warps // WARPS[arch]


@dataclass(frozen=True)
class Card:
    """Peak rates, without sparsity.

    Attributes:
        memory: bytes a second.
        products: of tensor cores, operations a second: bf16 and fp16, and fp32 without them.
        special: special functions a second: 16 a clock and multiprocessor (CUDA C++ Programming
            Guide, "Throughput of Native Arithmetic Instructions").
    """

    name: str
    memory: float
    products: dict[str, float]
    special: float


# NVIDIA A100 Tensor Core GPU datasheet and architecture whitepaper (SXM, 40 GB: 108
# multiprocessors at 1.41 GHz); NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper
# (SXM5, 80 GB: 132 multiprocessors, 1.83 GHz with tensor cores at work).
CARDS = (
    Card("A100", 1555e9, {"16": 312e12, "32": 19.5e12}, 16 * 108 * 1.41e9),
    Card("H100", 3350e9, {"16": 989.4e12, "32": 66.9e12}, 16 * 132 * 1.83e9),
)


def least_time(card: Card, moved: float, products: float, special: float, dtype: str) -> float:
    """Microseconds that the scarcest resource takes; no kernel is faster."""
    rate = card.products["32" if dtype == "fp32" else "16"]
    return 1e6 * max(moved / card.memory, products / rate, special / card.special)
