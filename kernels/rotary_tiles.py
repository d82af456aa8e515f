"""What the rotary attention kernels share: turning a tile, finding a tile's sequence.

A head's D components are held as one piece, or two, D0 and D1 wide, both powers of two: 80 is
64 + 16 and 96 is 64 + 32, so that no product is padded to 128.
"""

import triton
import triton.language as tl


@triton.jit
def cos_sin(position, hi, lo):
    """Cosine and sine of `hi + lo` quarter turns per unit of position.

    The whole turns are taken off by an exact fma before anything is rounded, as csrc/rotary_angle.h
    does; whether the compiler fuses other products changes nothing.
    """
    whole = tl.floor(position * hi + 0.5)
    t = tl.fma(position, lo, tl.fma(position, hi, -whole))  # quarter turns, -1/2 to 1/2
    z = t * t
    s = t * (1.57079637 + z * (-0.645963490 + z * (0.0796802267 + z * -0.00460217427)))
    c = 1.0 + z * (-1.23370051 + z * (0.253669232 + z * (-0.0208602883 + z * 0.000904021552)))
    quarter = whole - 4.0 * tl.floor(whole * 0.25)  # 0, 1, 2 or 3
    odd = (quarter == 1.0) | (quarter == 3.0)
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos)
    sin = tl.where(quarter >= 2.0, -sin, sin)
    return cos, sin


@triton.jit
def turned(
    x_ptrs,  # [M] where each row's components begin
    is_row,  # [M]
    d,  # [W] components
    position_ptrs,  # [M] each row's position on axis 0
    position_stride_a,
    axis_ptr,  # [R]
    hi_ptr,  # [R]
    lo_ptr,  # [R]
    D,
    R: tl.constexpr,
    PAIR_STRIDE: tl.constexpr,
    SIGN: tl.constexpr,  # 1, or -1 to turn back
):
    """Components d of rows in memory, turned: [M, W] float32.

    Each component reads its partner too, from the cache, so that any layout costs the same and no
    lane has to pass a value to another.
    """
    within = d % (2 * PAIR_STRIDE)
    is_first = within < PAIR_STRIDE
    turns = d < 2 * R
    pair = tl.where(turns, d // (2 * PAIR_STRIDE) * PAIR_STRIDE + within % PAIR_STRIDE, 0)
    partner = tl.where(turns, tl.where(is_first, d + PAIR_STRIDE, d - PAIR_STRIDE), d)
    axis = tl.load(axis_ptr + pair)
    hi = tl.load(hi_ptr + pair)
    lo = tl.load(lo_ptr + pair)
    position = tl.load(
        position_ptrs[:, None] + axis[None, :] * position_stride_a, mask=is_row[:, None], other=0.0
    )
    cos, sin = cos_sin(position, hi[None, :], lo[None, :])
    sin = tl.where(is_first[None, :], -sin, sin) * SIGN
    cos = tl.where(turns[None, :], cos, 1.0)
    sin = tl.where(turns[None, :], sin, 0.0)
    inside = is_row[:, None] & (d < D)[None, :]
    x = tl.load(x_ptrs[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptrs[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    return x * cos + y * sin


@triton.jit
def turned_and_rounded(
    x_ptrs,
    is_row,
    d,  # [W]
    position_ptrs,
    position_stride_a,
    axis_ptr,
    hi_ptr,
    lo_ptr,
    factor,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIR_STRIDE: tl.constexpr,
    W: tl.constexpr,
):
    """Components d of rows, turned, times factor, in the type of memory: [M, W].

    A whole head is turned half by half, for which a thread needs fewer registers.
    """
    HALVES: tl.constexpr = W == D and W >= 64
    N: tl.constexpr = W // 2 if HALVES else W
    element = x_ptrs.dtype.element_ty
    x = turned(
        x_ptrs, is_row, d if not HALVES else tl.arange(0, N), position_ptrs, position_stride_a,
        axis_ptr, hi_ptr, lo_ptr, D, R, PAIR_STRIDE, 1,
    )  # fmt: skip
    x = (x * factor).to(element)
    if HALVES:
        y = turned(
            x_ptrs, is_row, N + tl.arange(0, N), position_ptrs, position_stride_a, axis_ptr,
            hi_ptr, lo_ptr, D, R, PAIR_STRIDE, 1,
        )  # fmt: skip
        y = (y * factor).to(element)
        x = tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (x.shape[0], W))
    return x


@triton.jit
def find_tile(
    starts_ptr,  # [n + 1] int32, or nothing where rows are not packed
    other_starts_ptr,  # the same of the other side (keys for queries)
    tile,
    S,  # rows of a sequence where they are not packed
    other_S,
    n,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    SEQUENCES: tl.constexpr,  # power of two, at least n
    AGAIN: tl.constexpr = False,  # read from memory, even if the compiler knows the values
):
    """Which rows a tile holds.

    Returns:
        Sequence (n or more: none), first row within it, its first row in memory and its length,
        and the same two of the other side.
    """
    if PACKED:
        i = tl.arange(0, SEQUENCES)
        begin = tl.load(starts_ptr + i, mask=i < n, other=0, volatile=AGAIN)
        end = tl.load(starts_ptr + i + 1, mask=i < n, other=0, volatile=AGAIN)
        tiles = (end - begin + BLOCK - 1) // BLOCK
        done = tl.cumsum(tiles, 0)
        sequence = tl.sum((done <= tile).to(tl.int32))
        row = (tile - tl.sum(tl.where(i < sequence, tiles, 0))) * BLOCK
        known = tl.minimum(sequence, n - 1)
        start = tl.load(starts_ptr + known, volatile=AGAIN)
        length = tl.load(starts_ptr + known + 1, volatile=AGAIN) - start
        other_start = tl.load(other_starts_ptr + known, volatile=AGAIN)
        other_length = tl.load(other_starts_ptr + known + 1, volatile=AGAIN) - other_start
        sequence = tl.where(sequence >= SEQUENCES, n, sequence)
    else:
        tiles = (S + BLOCK - 1) // BLOCK
        sequence = tile // tiles
        row = tile % tiles * BLOCK
        start = tile * 0
        other_start = tile * 0
        length = S
        other_length = other_S
    return sequence, row, start, length, other_start, other_length


@triton.jit
def tile_rows(base, first, stride, BLOCK: tl.constexpr):
    """Where rows first … first + BLOCK - 1 begin, [BLOCK], counted in the stride's type.

    In 64 bits every row's product may take five instructions of a loop, in 32 one.
    """
    return base + (first + tl.arange(0, BLOCK)) * stride


@triton.jit
def load_piece(
    ptrs, is_row, d, D, UPCAST: tl.constexpr, ALL_ROWS: tl.constexpr, WHOLE: tl.constexpr
):
    """Components d of rows, [M, W]; 0 outside. WHOLE: no component is outside."""
    at = ptrs[:, None] + d[None, :]
    if WHOLE:
        x = tl.load(at) if ALL_ROWS else tl.load(at, mask=is_row[:, None], other=0.0)
    else:
        inside = (d < D)[None, :] if ALL_ROWS else is_row[:, None] & (d < D)[None, :]
        x = tl.load(at, mask=inside, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def softmax_weights(
    q0, q1, k0, k1, i, j, Sk, offset, lse,
    D1: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax weights [M, N] of queries i with keys j; lse in powers of two, inf: no weight."""
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        scores = tl.dot(q1, tl.trans(k1), acc=scores, input_precision=PRECISION)
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:
        seen = (j < Sk)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None] + offset)
        if WINDOW > 0:
            seen = seen & (j[None, :] > i[:, None] + (offset - WINDOW))
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit
def turn_back(
    x_ptrs,  # [M] rows that this program has just written, to be turned in place
    is_row,
    position_ptrs,
    position_stride_a,
    axis_ptr,
    hi_ptr,
    lo_ptr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIR_STRIDE: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """Turn rows by minus their angles. Barriers part the program's writes, reads and writes."""
    HALVES: tl.constexpr = D0 == D and D0 >= 64
    W0: tl.constexpr = D0 // 2 if HALVES else D0
    W1: tl.constexpr = D0 // 2 if HALVES else D1
    d0 = tl.arange(0, W0)
    d1 = W0 + tl.arange(0, W1 if W1 > 0 else 1)
    tl.debug_barrier()
    x0 = turned(
        x_ptrs, is_row, d0, position_ptrs, position_stride_a, axis_ptr, hi_ptr, lo_ptr,
        D, R, PAIR_STRIDE, -1,
    )  # fmt: skip
    x1 = x0
    if W1 > 0:
        x1 = turned(
            x_ptrs, is_row, d1, position_ptrs, position_stride_a, axis_ptr, hi_ptr, lo_ptr,
            D, R, PAIR_STRIDE, -1,
        )  # fmt: skip
    tl.debug_barrier()
    element = x_ptrs.dtype.element_ty
    tl.store(x_ptrs[:, None] + d0[None, :], x0.to(element), mask=is_row[:, None])
    if W1 > 0:
        inside = is_row[:, None] & (d1 < D)[None, :]
        tl.store(x_ptrs[:, None] + d1[None, :], x1.to(element), mask=inside)
