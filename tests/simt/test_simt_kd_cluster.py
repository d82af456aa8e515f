"""`kd_loss` in one read, by clusters of blocks, on the CPU: against float64, with faults."""

import pytest
import torch
from kd_rows import DTYPES, Rows, make, run
from simt_build import Change
from simt_harness import SCHEDULES, Fault, Schedule

from clinkd.ops.reference.kd_loss import DIVERGENCES

SOURCE = "kd_loss_cluster.cu"
AT_ONCE = ("cluster",)


@pytest.fixture(scope="module")
def machine(simt):
    return simt(SOURCE)


def on_16_bytes(x):
    """The same logits in rows that begin on 16 bytes, NaN between them."""
    wide = torch.full((len(x), x.shape[1] // 8 * 8 + 16), torch.nan, dtype=x.dtype)
    return wide[:, : x.shape[1]].copy_(x)


def at_once(machine, z, t, labels, factors, **options):
    """The launch, its gradient over the student's logits."""
    z, t = on_16_bytes(z), on_16_bytes(t)
    return run(machine, z, t, labels, factors, inplace=True, parts=AT_ONCE, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(machine, divergence, dtype):
    for T, cap, widths in (
        (1.0, 0.0, (1104, 1104)),
        (2.0, 5.0, (1101, 1101)),
        (0.7, 0.0, (2000, 611)),
        (2.0, 0.0, (377, 800)),
        (0.7, 5.0, (5, 5)),  # all but one block of the cluster have nothing
        (2.0, 0.0, (1, 3)),
    ):
        rows = at_once(machine, *make(2, *widths, dtype), temperature=T, softcap=cap,
                       divergence=divergence)  # fmt: skip
        rows.check()


def test_several_packs_a_thread_and_a_gradient_of_its_own(machine):
    """And more than the 48 KB of shared memory that a launch has without asking."""
    for dtype, V in ((torch.bfloat16, 151_936), (torch.float32, 60_000)):
        rows = run(machine, *make(1, V, V - 40, dtype), parts=AT_ONCE, temperature=2.0)
        rows.check()
        assert not torch.equal(rows.grad, rows.inputs[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_models_that_are_nearly_one(machine, divergence):
    z, noise, labels, factors = make(2, 2000, 2000)
    for T, apart in ((1.0, 1e-3), (2.0, 1e-2)):
        rows = at_once(machine, z, z + apart * noise, labels, factors, temperature=T,
                       divergence=divergence)  # fmt: skip
        rows.check()
        exact = rows.expected(torch.float64)[1]
        assert torch.allclose(rows.kd.double(), exact, rtol=1e-5, atol=0)


def test_columns_of_minus_infinity_and_large_logits(machine):
    z, t, labels, factors = make(3, 700, 700)
    z, t = z * 3000, t * 3000
    at_once(machine, z, t, labels, factors, temperature=0.7).check()
    z[:, 7], t[:, 7], labels[labels == 7] = -torch.inf, -torch.inf, 8
    z[:, 512:], t[:, 512:], labels[labels >= 512] = -torch.inf, -torch.inf, 8
    at_once(machine, z, t, labels, factors, temperature=2.0).check()


def test_wrong_rows_give_nan_alone(machine):
    z, t, labels, factors = make(6, 40, 40)
    labels[:] = 3
    z[0, 5] = torch.nan
    z[1] = -torch.inf
    labels[2] = 40
    t[3] = torch.nan
    rows = at_once(machine, z, t, labels, factors, temperature=2.0)
    assert (rows.ce + rows.kd).isnan().tolist() == [True] * 4 + [False] * 2
    assert rows.grad[4:].isfinite().all()
    assert rows.grad[:4].isnan().any(dim=1).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_schedule_gives_the_same(machine, divergence):
    inputs = make(2, 900, 700)
    results = [at_once(machine, *inputs, schedule=s, divergence=divergence) for s in SCHEDULES]
    results[0].check()
    for other in results[1:]:
        for a, b in zip(other.found, results[0].found, strict=True):
            assert torch.equal(a, b)


def test_what_does_not_fit_is_refused(machine):
    z, t, labels, factors = make(1, 40, 40)
    with pytest.raises(Fault, match="CUDA error 1"):
        run(machine, z[:, 1:], t[:, 1:], labels, factors, parts=AT_ONCE)
    z, t, labels, factors = make(1, 8 * 28_676, 4)  # 4 columns a block too many
    with pytest.raises(Fault, match="CUDA error 1"):
        run(machine, z, t, labels, factors, parts=AT_ONCE)


def own_barriers(machine):
    """Those of the cluster's kernel, three of the cluster and three of a block."""
    barriers = machine.built.barriers
    assert len(barriers) == 6
    return barriers


def caught_by(machine, schedule):
    """Divergences with which a schedule shows a fault: not float64's result, or an error."""
    caught = []
    for divergence in DIVERGENCES:
        try:
            inputs = make(1, 400, 333)
            at_once(machine, *inputs, schedule=schedule, divergence=divergence).check()
        except (AssertionError, Fault):
            caught.append(divergence)
    return caught


def test_every_barrier_is_needed(machine):
    for barrier in own_barriers(machine):
        schedules = [Schedule(s.order, s.seed, dropped=barrier) for s in SCHEDULES]
        assert any(caught_by(machine, s) for s in schedules), f"{barrier} can go"
    assert not caught_by(machine, Schedule("warps up"))


@pytest.mark.slow
def test_no_thread_races_another(simt):
    """Whatever the schedule; and each barrier that is left out makes a race or an error."""
    machine = simt(SOURCE, races=True)
    inputs = make(2, 603, 500, torch.bfloat16)
    for divergence in DIVERGENCES:
        at_once(machine, *inputs, divergence=divergence).check()
    for barrier in own_barriers(machine):
        with pytest.raises(Fault, match=r"a race: thread|may not run yet"):
            at_once(machine, *inputs, schedule=Schedule(dropped=barrier), divergence="jsd")


def sanitized_rows():
    """Rows with every path of the kernel."""
    for divergence, dtype, (Vs, Vt), T in (
        ("forward_kl", torch.float32, (72, 72), 1.0),
        ("reverse_kl", torch.bfloat16, (72, 48), 2.0),
        ("jsd", torch.float16, (400, 120), 0.7),
    ):
        yield Rows(*make(2, Vs, Vt, dtype), divergence=divergence, temperature=T, parts=AT_ONCE)


def run_sanitized(machine):
    rows = list(sanitized_rows())
    machine.run_apart([job for some in rows for job in some.jobs()])
    for some in rows:
        some.check()


@pytest.mark.slow
def test_the_sanitizers_find_nothing_but_what_is_planted(simt):
    run_sanitized(simt(SOURCE, sanitize=True, flags=("-O0",)))
    change = Change("kd_loss.h", "return 2 * kd_cluster", "return kd_cluster")
    machine = simt(SOURCE, changes=(change,), sanitize=True, flags=("-O0",))
    with pytest.raises(Fault, match="heap-buffer-overflow"):
        run_sanitized(machine)


WRONG = [
    Change("kd_loss_cluster.cuh", "of_blocks + rank", "of_blocks + (rank ^ 1) % 7"),
    Change("kd_loss_cluster.cuh", "label - begin", "label"),
    Change("kd_loss_cluster.cuh", "kept_student + share", "kept_student + share / 2"),
    Change("kd_loss_cluster.cuh", "block_pairs + rank", "block_pairs"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.new)
def test_the_comparison_finds_a_wrong_place(simt, change):
    machine = simt(SOURCE, changes=(change,), flags=("-O0",))
    with pytest.raises(AssertionError):
        at_once(machine, *make(3, 1100, 1100), temperature=0.7, divergence="jsd").check()
