"""Bytes that each op moves between memory and chip, beside the least, and the time they take.

How often a kernel reads or writes each tensor is counted as it runs, in the tests: every access of
the CUDA kernels (tests/simt/test_simt_traffic.py), every byte that a launch of a Triton kernel
touches (tests/ops/test_attention_traffic.py), since tiles that several programs read come from the
second-level cache, which holds the keys and values of a head for all lengths here. The sizes below
are arithmetic from these counts. Shapes of Qwen2-VL-2B in bf16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.static.limits import CARDS, least_time

HEADS, KV_HEADS, DIM, ELEMENT = 12, 2, 128, 2
VOCABULARY = 151_936
ROTARY_PASSES = {"x": 1, "out": 1}
KD_PASSES = {"student": 2, "teacher": 2, "grad": 1}  # forward and backward
TOPK_PASSES = {"student": 2, "grad": 1}


@dataclass(frozen=True)
class Traffic:
    """One op at one size.

    Attributes:
        moved: bytes of all its passes.
        least: bytes that no implementation of the rule in `most` can do without.
        most: what `moved / least` may be.
        products: multiplications and additions of tensor cores.
        special: exponentials.
    """

    name: str
    moved: float
    least: float
    most: float
    products: float = 0.0
    special: float = 0.0

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def traffics() -> Iterator[Traffic]:
    """All ops, at the sizes of Qwen2-VL-2B."""
    tokens = 8192
    x = tokens * HEADS * DIM * ELEMENT
    positions = 3 * tokens * 4
    speeds = 3 * (DIM // 2) * 4
    moved = sum(ROTARY_PASSES.values()) * x + positions + speeds
    yield Traffic("rotary 8,192 tokens", moved, 2 * x, 1.02)
    for length in (1024, 4096, 16384):
        yield from _attention(length)
    for rows in (512, 8192):
        yield from _loss(rows)


def forward_bytes(q: int, k: int, lse: int, keep: bool) -> int:
    """Of the attention's forward kernel; each argument the bytes of one tensor, o as q, v as k.

    Args:
        keep: turned queries are written, for training.
    """
    return q + k + k + q + lse + (q if keep else 0)


def backward_bytes(q: int, k: int, lse: int) -> tuple[int, int]:
    """Of the kernel of the queries and of that of the keys, where no keys are shared by programs.

    Both read turned q, k, v, the gradient and lse; the first also o, to write delta and the rows'
    levels; what a program has just written and turns back is in a cache.
    """
    return (3 * q + 2 * k + 3 * lse + q, 2 * q + 2 * k + 2 * lse + 2 * k)


def _attention(length: int) -> Iterator[Traffic]:
    q = o = length * HEADS * DIM * ELEMENT
    k = v = length * KV_HEADS * DIM * ELEMENT
    lse = length * HEADS * 4
    pairs = length * (length + 1) / 2 * HEADS  # causal
    turning = sum(ROTARY_PASSES.values()) * k  # k in, rotated k out, by `rotary`
    for keep in (False, True):
        name = f"rotary_attention forward{' for training' * keep}, {length:,} tokens"
        # the rule: q, k, v and o once, one pass of k, and of training one write of q
        least = q + k + v + o + 2 * k + lse + q * keep
        yield Traffic(name, turning + forward_bytes(q, k, lse, keep), least, 1.0,
                      4 * DIM * pairs, pairs)  # fmt: skip
    yield Traffic(f"rotary_attention backward, {length:,} tokens",
                  sum(backward_bytes(q, k, lse)), 4 * q + 2 * k + 2 * v + lse, 2.0,
                  14 * DIM * pairs, 2 * pairs)  # fmt: skip


def _loss(rows: int) -> Iterator[Traffic]:
    logits = rows * VOCABULARY * ELEMENT
    small = rows * (7 + 2 + 2) * 4
    moved = sum(KD_PASSES.values()) * logits + 2 * small
    yield Traffic(f"kd_loss forward + backward, {rows:,} rows", moved, 5 * logits, 1.05,
                  special=rows * VOCABULARY * 5)  # fmt: skip
    # on sm_90 a cluster keeps the row between the two: labels and two factors in, CE and KD out
    yield Traffic(f"kd_loss forward + backward in a cluster, {rows:,} rows",
                  3 * logits + rows * (8 + 2 * 4 + 2 * 4), 3 * logits, 1.05,
                  special=rows * VOCABULARY * 5)  # fmt: skip
    moved = sum(TOPK_PASSES.values()) * logits + 3 * rows * 64 * 8 + small
    yield Traffic(f"topk_kd_loss forward + backward, {rows:,} rows", moved, 3 * logits, 1.05,
                  special=rows * VOCABULARY * 4)  # fmt: skip


def report() -> list[str]:
    """Print the table; the ops that move more than they may."""
    heads = " ".join(f"{card.name + ' us':>10}" for card in CARDS)
    print(f"\n{'op, bf16':52} {'MB':>9} {'of least':>9} {heads}")
    wrong = []
    for each in traffics():
        times = [least_time(c, each.moved, each.products, each.special, "bf16") for c in CARDS]
        shown = " ".join(f"{time:10.1f}" for time in times)
        print(f"{each.name:52} {each.moved / 1e6:9.1f} {each.ratio:9.3f} {shown}")
        if each.ratio > each.most:
            wrong.append(f"{each.name}: {each.ratio:.3f} of the least bytes, at most {each.most}")
    print("Times: the scarcest of memory, tensor cores and special functions; none is measured.")
    return wrong
