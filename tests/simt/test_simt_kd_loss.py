"""The CUDA kernels of `kd_loss` on the CPU: against float64, in every schedule, with faults."""

import itertools

import pytest
import torch
from kd_rows import DTYPES, Rows, make, run
from simt_build import Change
from simt_harness import SCHEDULES, Fault, Schedule

from clinkd.ops.reference.kd_loss import DIVERGENCES


@pytest.fixture(scope="module")
def machine(simt):
    return simt("kd_loss.cu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(machine, divergence, dtype):
    widths = ((1100, 1100), (1100, 611), (377, 800), (5, 5))
    for T, cap, (Vs, Vt) in itertools.product((1.0, 2.0, 0.7), (0.0, 5.0), widths):
        if cap and (T, Vs) not in ((1.0, 377), (2.0, 1100), (0.7, 377)):
            continue
        inputs = make(2, Vs, Vt, dtype)
        run(machine, *inputs, temperature=T, softcap=cap, divergence=divergence).check()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strided_and_in_place(machine, divergence):
    z, t, labels, factors = make(3, 600, 600, torch.bfloat16)
    options = {"divergence": divergence, "temperature": 2.0}
    plain = run(machine, z, t, labels, factors, **options)
    for start in (0, 3):  # rows of 620 and an odd start: no 16-byte loads
        wide_z, wide_t = (torch.full((3, 620), torch.nan, dtype=z.dtype) for _ in range(2))
        z_cut, t_cut = wide_z[:, start : start + 600].copy_(z), wide_t[:, :600].copy_(t)
        cut = run(machine, z_cut, t_cut, labels, factors, inplace=True, **options)
        cut.check()
        assert torch.allclose(cut.grad.float(), plain.grad.float(), rtol=1e-2, atol=1e-5)
        assert wide_z[:, start + 600 :].isnan().all()


def test_columns_of_minus_infinity_and_large_logits(machine):
    z, t, labels, factors = make(3, 700, 700)
    z, t = z * 3000, t * 3000
    run(machine, z, t, labels, factors, temperature=0.7).check()
    z[:, 7], t[:, 7], labels[labels == 7] = -torch.inf, -torch.inf, 8
    z[:, 512:], t[:, 512:], labels[labels >= 512] = -torch.inf, -torch.inf, 8
    run(machine, z, t, labels, factors, temperature=2.0).check()


def test_wrong_rows_give_nan_alone(machine):
    z, t, labels, factors = make(6, 40, 40)
    labels[:] = 3
    z[0, 5] = torch.nan
    z[1] = -torch.inf
    labels[2] = 40
    t[3] = torch.nan
    rows = run(machine, z, t, labels, factors, temperature=2.0)
    assert (rows.ce + rows.kd).isnan().tolist() == [True] * 4 + [False] * 2
    assert rows.grad[4:].isfinite().all()
    assert rows.grad[:4].isnan().any(dim=1).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_schedule_gives_the_same(machine, divergence):
    inputs = make(2, 900, 700)
    results = [run(machine, *inputs, schedule=s, divergence=divergence) for s in SCHEDULES]
    results[0].check()
    for other in results[1:]:
        for a, b in zip(other.found, results[0].found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_divergence_adds_up_over_parts_of_the_columns(machine, divergence):
    z, t, labels, factors = make(2, 900, 900)
    whole = run(machine, z, t, labels, factors, divergence=divergence, temperature=2.0)
    value, mean = torch.zeros(2), torch.zeros(2)
    for part in (slice(0, 513), slice(513, 900)):
        rows = Rows(z[:, part], t[:, part], labels, factors, divergence=divergence, temperature=2.0)
        machine.run("kd_divergence_cuda", rows.fields | {"statistics": whole.statistics})
        value, mean = value + rows.kd, mean + rows.ce
    assert torch.allclose(4 * value, whole.kd, rtol=1e-5)
    assert torch.allclose(mean, whole.statistics[:, -1], rtol=1e-5, atol=1e-7)


def caught_by(machine, schedule):
    """Divergences with which a schedule shows a fault: not float64's result, or an error."""
    caught = []
    for divergence in DIVERGENCES:
        try:
            run(machine, *make(1, 40, 40), schedule=schedule, divergence=divergence).check()
        except (AssertionError, Fault):
            caught.append(divergence)
    return caught


@pytest.mark.slow
def test_no_thread_races_another(simt):
    """Whatever the schedule; and each barrier that is left out makes a race."""
    machine = simt("kd_loss.cu", races=True)
    for inplace, divergence in itertools.product((False, True), DIVERGENCES):
        inputs = make(2, 603, 500, torch.bfloat16) if inplace else make(2, 600, 600)
        run(machine, *inputs, inplace=inplace, divergence=divergence).check()
    for barrier in machine.built.barriers:
        with pytest.raises(Fault, match="a race: thread"):
            run(machine, *inputs, schedule=Schedule(dropped=barrier), divergence="jsd")


def test_every_barrier_is_needed(machine):
    """A barrier that is left out shows under some schedule; the harness would miss nothing."""
    assert len(machine.built.barriers) >= 3
    for barrier in machine.built.barriers:
        found = {
            s: caught_by(machine, Schedule(s.order, s.seed, dropped=barrier)) for s in SCHEDULES
        }
        assert any(found.values()), f"{barrier} can go"
    assert not caught_by(machine, Schedule("warps up"))


def sanitized_rows():
    """Rows with every path of the kernels."""
    for divergence, dtype, (Vs, Vt), T in (
        ("forward_kl", torch.float32, (70, 70), 1.0),
        ("reverse_kl", torch.bfloat16, (72, 48), 2.0),
        ("jsd", torch.float16, (33, 65), 0.7),
        ("skew_kl", torch.float32, (64, 64), 2.0),
    ):
        yield Rows(*make(3, Vs, Vt, dtype), divergence=divergence, temperature=T)


def run_sanitized(machine):
    rows = list(sanitized_rows())
    machine.run_apart([job for some in rows for job in some.jobs()])
    for some in rows:
        some.check()


@pytest.mark.slow
def test_the_sanitizers_find_nothing(simt):
    run_sanitized(simt("kd_loss.cu", sanitize=True, flags=("-O0",)))


FAULTS = {
    "one logit too many": (
        Change("kd_loss_row.cuh", "const bool shared = i < common;", "const bool shared = true;"),
        "heap-buffer-overflow",
    ),
    "one warp too many": (
        Change("kd_loss_sums.cuh", "threadIdx.x % kKDWarps", "threadIdx.x % (kKDWarps + 1)"),
        "heap-buffer-overflow",
    ),
    "16 bytes where they are not aligned": (
        Change("kd_loss.h", "(strides * size)) % 16 == 0", "(strides * size)) >= 0"),
        "misaligned",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_sanitizers_find_a_planted_fault(simt, name):
    change, message = FAULTS[name]
    machine = simt("kd_loss.cu", changes=(change,), sanitize=True, flags=("-O0",))
    with pytest.raises(Fault, match=message):
        run_sanitized(machine)


WRONG = [
    Change("kd_loss_row.cuh", "j == label_item", "j == 0"),
    Change("kd_loss_sums.cuh", "combine<32>(mine", "combine<16>(mine"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.new)
def test_the_comparison_finds_a_wrong_index(simt, change):
    machine = simt("kd_loss.cu", changes=(change,), flags=("-O0",))
    with pytest.raises(AssertionError):
        run(machine, *make(9, 1100, 1100), temperature=0.7).check()
