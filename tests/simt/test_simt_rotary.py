"""The CUDA kernel of `rotary` on the CPU: against float64, in every schedule, with faults."""

import pytest
import torch
from simt_build import Change
from simt_harness import SCHEDULES, Fault, Schedule, poisoned

from clinkd.ops._impl import TYPES
from clinkd.ops.reference.rotary import rotary as reference
from clinkd.ops.rotary import spec_tensors
from clinkd.rotary import RotarySpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = {
    "paper": RotarySpec.split(128),
    "unequal": RotarySpec.split(80, 24),
    "split-half": RotarySpec.split(64, layout="half"),
    "warm": RotarySpec.alternate(64),
    "mrope": RotarySpec.mrope(128),
    "mrope-interleaved": RotarySpec.mrope(128, (24, 20, 20), 5e6, interleaved=True),
    "vision": RotarySpec.axial(80),
    "partial": RotarySpec.rope(64, rotary_dim=24),
    "partial-neighbours": RotarySpec.rope(48, layout="interleaved", rotary_dim=22),
    "odd-pairs": RotarySpec.rope(18),
}


@pytest.fixture(scope="module")
def machine(simt):
    return simt("rotary.cu")


def fields(x, out, positions, spec, inverse=False):
    """`RotaryArgs` for x [B, S, H, D] and positions [A, B, S]."""
    axis, hi, lo = spec_tensors(spec.key, torch.device("cpu"))
    batch, tokens, heads, head_dim = x.shape
    return {
        "x": x, "out": out, "positions": positions, "axis": axis, "hi": hi, "lo": lo,
        "batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim,
        "x_stride": x.stride()[:3], "out_stride": out.stride()[:3],
        "positions_stride": positions.stride(), "pairs": spec.pairs,
        "pair_stride": spec.pair_stride, "inverse": inverse, "type": TYPES[x.dtype],
    }  # fmt: skip


def make(spec, shape=(2, 5, 9), dtype=torch.float32, seed=0):
    """x, and half-integer positions up to 131,072 on one axis more than the spec reads."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, spec.head_dim, generator=g).to(dtype)
    positions = torch.rand(spec.axes + 1, *shape[:2], generator=g) * 262_144
    return x, positions.round() / 2


def check(found, x, positions, spec, inverse=False):
    """Float32 to 1e-5 relative; 16-bit types with at most twice plain torch's error."""
    exact = reference(x.double(), positions, spec, inverse=inverse)
    error = (found.double() - exact).abs().max().item()
    if x.dtype == torch.float32:
        assert error <= 1e-5 * exact.abs().max().item()
    else:
        plain = reference(x.float(), positions, spec, inverse=inverse).to(x.dtype)
        assert error <= 2 * (plain.double() - exact).abs().max().item()


def layouts(x):
    """The same values with other strides: heads first, cut out of a wider tensor (unaligned)."""
    B, S, H, D = x.shape
    yield "plain", x
    yield "heads first", x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((B, S, 3 * H, D + 5), torch.nan, dtype=x.dtype)
    yield "cut", wide[:, :, H : 2 * H, 3 : 3 + D].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_matches_float64(machine, name, dtype):
    spec = SPECS[name]
    x, positions = make(spec, dtype=dtype)
    for inverse in (False, True):
        for _, given in layouts(x):
            out = poisoned(x)
            machine.run("rotary_cuda", fields(given, out, positions, spec, inverse))
            check(out, x, positions, spec, inverse)
            kept = given.clone(memory_format=torch.preserve_format)
            machine.run("rotary_cuda", fields(given, given, positions, spec, inverse))
            assert torch.equal(given, out)  # in place
            given.copy_(kept)


def test_strided_positions_and_output(machine):
    spec = SPECS["mrope"]
    x, positions = make(spec)
    apart = positions.movedim(0, -1).contiguous().movedim(-1, 0)
    wide = torch.full((2, 5, 12, 128), torch.nan)
    machine.run("rotary_cuda", fields(x, wide[:, :, 2:11], apart, spec))
    check(wide[:, :, 2:11], x, positions, spec)
    assert wide[:, :, [0, 1, 11]].isnan().all()
    row = positions[:, :1].expand(-1, 2, -1)
    out = poisoned(x)
    machine.run("rotary_cuda", fields(x, out, row, spec))
    check(out, x, row, spec)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 131, 2), (1, 7, 17)])
def test_every_schedule_gives_the_same(machine, shape):
    spec = SPECS["vision"]
    x, positions = make(spec, shape, torch.bfloat16)
    results = []
    for schedule in SCHEDULES:
        results.append(poisoned(x))
        machine.run("rotary_cuda", fields(x, results[-1], positions, spec), schedule)
    check(results[0], x, positions, spec)
    assert all(torch.equal(found, results[0]) for found in results)


def test_non_finite_positions_give_nan_alone(machine):
    spec = SPECS["warm"]
    x, positions = make(spec, (1, 3, 2))
    positions[:, 0, 1] = torch.inf
    out = poisoned(x)
    machine.run("rotary_cuda", fields(x, out, positions, spec))
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()


@pytest.mark.slow
def test_no_thread_races_another(simt):
    machine = simt("rotary.cu", races=True)
    for name, dtype in (("paper", torch.bfloat16), ("partial", torch.float32)):
        x, positions = make(SPECS[name], dtype=dtype)
        before = x.clone()
        machine.run("rotary_cuda", fields(x, x, positions, SPECS[name]))
        check(x, before, positions, SPECS[name])


def jobs():
    """Launches with every path of the kernel, and the means to check them."""
    for name, dtype in (
        ("paper", torch.bfloat16),
        ("partial", torch.float32),
        ("odd-pairs", DTYPES[1]),
    ):
        spec = SPECS[name]
        x, positions = make(spec, (2, 3, 9), dtype)
        for _, given in layouts(x):
            yield given, poisoned(x), positions, spec


def run_sanitized(machine):
    """All jobs in one sanitized process; the results must be right too."""
    todo = list(jobs())
    machine.run_apart([("rotary_cuda", fields(*job), Schedule()) for job in todo])
    for x, out, positions, spec in todo:
        check(out, x, positions, spec)


@pytest.mark.slow
def test_the_sanitizers_find_nothing(simt):
    run_sanitized(simt("rotary.cu", sanitize=True))


KERNEL = "rotary_kernel.cuh"
FAULTS = {
    "one pair too many": (
        Change(KERNEL, "if (pair >= a.pairs) {", "if (pair > a.pairs) {"),
        "heap-buffer-overflow",
    ),
    "tokens past the end": (
        Change(KERNEL, "none = place >= static_cast<uint32_t>(a.batch) * tokens", "none = false"),
        "heap-buffer-overflow",
    ),
    "heads past the end": (
        Change(KERNEL, "begin + kHeadsPerThread < a.heads ? begin", "true ? begin"),
        "heap-buffer-overflow",
    ),
    "16 bytes where they are not aligned": (
        Change(KERNEL, "return pairs && places % 16 == 0", "return pairs"),
        "misaligned",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_sanitizers_find_a_planted_fault(simt, name):
    change, message = FAULTS[name]
    with pytest.raises(Fault, match=message):
        run_sanitized(simt("rotary.cu", changes=(change,), sanitize=True, flags=("-O0",)))


WRONG = [
    Change(KERNEL, "second = NEIGHBOURS ? first + V", "second = NEIGHBOURS ? first"),
    Change(KERNEL, "pair / n * 2 * n + pair % n", "pair / n * n + pair % n"),
    Change(KERNEL, "a.axis[pair + j] *", "a.axis[pair] *"),
    Change(KERNEL, "head += a.x_stride[2]", "head += 0"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.new)
def test_the_comparison_finds_a_wrong_index(simt, change):
    machine = simt("rotary.cu", changes=(change,), flags=("-O0",))
    caught = 0
    for spec in SPECS.values():
        x, positions = make(spec)
        out = poisoned(x)
        machine.run("rotary_cuda", fields(x, out, positions, spec))
        try:
            check(out, x, positions, spec)
        except AssertionError:
            caught += 1
    assert caught
