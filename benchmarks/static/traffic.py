"""Bytes that each op moves between memory and chip, beside the least, and the time they take.

By arithmetic from what the kernels read and write, each tensor once a pass: tiles that several
programs read are taken to come from the second-level cache, which holds the keys and values of a
head for all lengths here. Shapes of Qwen2-VL-2B in bf16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.static.limits import CARDS, least_time

HEADS, KV_HEADS, DIM, ELEMENT = 12, 2, 128, 2
VOCABULARY = 151_936


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
    # one read, one write; positions and speeds beside it
    speeds = 3 * (DIM // 2) * 4
    yield Traffic("rotary 8,192 tokens", 2 * x + positions + speeds, 2 * x, 1.02)
    for length in (1024, 4096, 16384):
        yield from _attention(length)
    for rows in (512, 8192):
        yield from _loss(rows)


def _attention(length: int) -> Iterator[Traffic]:
    q = o = length * HEADS * DIM * ELEMENT
    k = v = length * KV_HEADS * DIM * ELEMENT
    lse = length * HEADS * 4
    pairs = length * (length + 1) / 2 * HEADS  # causal
    prepass = 2 * k  # k in, rotated k out
    least = q + k + v + o + prepass
    yield Traffic(f"rotary_attention forward, {length:,} tokens", prepass + q + k + v + o + lse,
                  least + lse, 1.0, 4 * DIM * pairs, pairs)  # fmt: skip
    yield Traffic(f"rotary_attention forward for training, {length:,} tokens",
                  prepass + q + k + v + o + lse + q, least + lse + q, 1.0, 4 * DIM * pairs,
                  pairs)  # fmt: skip
    # the kernel of the keys and that of the queries each read q, k, v, dO; the second also o
    keys = 2 * q + k + v + lse + lse + k + v
    queries = 3 * q + k + v + lse + lse + q
    yield Traffic(f"rotary_attention backward, {length:,} tokens", keys + queries,
                  4 * q + 2 * k + 2 * v + lse, 2.0, 14 * DIM * pairs, 2 * pairs)  # fmt: skip


def _loss(rows: int) -> Iterator[Traffic]:
    logits = rows * VOCABULARY * ELEMENT
    small = rows * (7 + 2 + 2) * 4
    # statistics and gradient each read both models' logits; one write
    yield Traffic(f"kd_loss forward + backward, {rows:,} rows", 5 * logits + 2 * small,
                  5 * logits, 1.05, special=rows * VOCABULARY * 5)  # fmt: skip
    # on sm_90 a cluster keeps the row between the two: labels and two factors in, CE and KD out
    yield Traffic(f"kd_loss forward + backward in a cluster, {rows:,} rows",
                  3 * logits + rows * (8 + 2 * 4 + 2 * 4), 3 * logits, 1.05,
                  special=rows * VOCABULARY * 5)  # fmt: skip
    top = rows * 64 * 8
    yield Traffic(f"topk_kd_loss forward + backward, {rows:,} rows", 3 * logits + 3 * top + small,
                  3 * logits, 1.05, special=rows * VOCABULARY * 4)  # fmt: skip


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
