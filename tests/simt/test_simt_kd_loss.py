"""The CUDA kernels of `kd_loss` on the CPU: against float64, in every schedule, with faults."""

import itertools

import pytest
import torch
from simt_build import Change
from simt_harness import SCHEDULES, Fault, Schedule

from clinkd.ops._impl import TYPES
from clinkd.ops._kd_loss_native import STATISTICS
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"temperature": 1.0, "divergence": "forward_kl", "mix": 0.3, "softcap": 0.0}
NAMES = ("ce", "kd", "gradient")


@pytest.fixture(scope="module")
def machine(simt):
    return simt("kd_loss.cu")


def make(N, Vs, Vt, dtype=torch.float32, seed=0):
    """Logits of both models, labels with an ignored one, factors of the rows' CE and KD."""
    g = torch.Generator().manual_seed(seed)
    z, t = ((torch.randn(N, V, generator=g) * 3).to(dtype) for V in (Vs, Vt))
    labels = torch.randint(0, Vs, (N,), generator=g)
    labels[1::5] = -100
    return z, t, labels, torch.rand(2, N, generator=g) + 0.5


class Rows:
    """One launch of the statistics and one of the gradient over the same rows."""

    def __init__(self, z, t, labels, factors, inplace=False, **options):
        options = OPTIONS | options
        self.inputs, self.options = (z.clone(), t, labels, factors), options
        self.ce, self.kd = (torch.full((len(z),), torch.nan) for _ in range(2))
        self.statistics = torch.full((len(z), STATISTICS), torch.nan)
        self.grad = z if inplace else torch.full(z.shape, torch.nan, dtype=z.dtype)
        self.fields = {
            "student": z, "teacher": t, "labels": labels, "rows": len(z),
            "student_columns": z.shape[1], "teacher_columns": t.shape[1],
            "student_stride": z.stride(0), "teacher_stride": t.stride(0), "ignore_index": -100,
            "temperature": options["temperature"], "mix": options["mix"],
            "softcap": options["softcap"], "divergence": DIVERGENCES.index(options["divergence"]),
            "type": TYPES[z.dtype], "ce": self.ce, "kd": self.kd, "statistics": self.statistics,
            "ce_factor": factors[0], "kd_factor": factors[1], "grad": self.grad,
            "grad_stride": self.grad.stride(0),
        }  # fmt: skip

    def jobs(self, schedule=SCHEDULES[0]):
        """The two launches."""
        return [(f"kd_{part}_cuda", self.fields, schedule) for part in ("statistics", "gradient")]

    @property
    def found(self):
        return self.ce, self.kd, self.grad

    def expected(self, dtype):
        """CE, KD and gradient of the reference in a dtype."""
        z, t, labels, factors = (x.to(dtype) if x.is_floating_point() else x for x in self.inputs)
        z = z.detach().requires_grad_()
        temperature, divergence, mix, softcap = self.options.values()
        ce, kd = kd_loss_rows(
            z, t, labels, temperature=temperature, divergence=divergence, beta=mix, skew=mix,
            ignore_index=-100, softcap=softcap or None,
        )  # fmt: skip
        (grad,) = torch.autograd.grad((ce * factors[0] + kd * factors[1]).sum(), z)
        return ce.detach(), kd.detach(), grad

    def check(self):
        """Float32 to 1e-5 relative; 16-bit types with at most twice plain torch's error."""
        exact = self.expected(torch.float64)
        plain = self.expected(self.grad.dtype)
        rounding = self.options["temperature"] ** 2 * torch.finfo(torch.float32).eps
        for name, a, e, p in zip(NAMES, self.found, exact, plain, strict=True):
            size = e.abs().max().item()
            least = 1e-5 * max(size, 1e-3) + (rounding if name == "kd" else 0.0)
            if a.dtype != torch.float32:
                least = torch.finfo(a.dtype).eps * size
            error = (a - e).abs().max().item()
            assert error <= max(2 * (p - e).abs().max().item(), least), name


def run(machine, *inputs, schedule=SCHEDULES[0], **options):
    rows = Rows(*inputs, **options)
    for job in rows.jobs(schedule):
        machine.run(*job)
    return rows


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
        Change(
            "kd_loss_kernel.cuh", "const bool shared = i < common;", "const bool shared = true;"
        ),
        "heap-buffer-overflow",
    ),
    "one warp too many": (
        Change("kd_loss_sums.cuh", "warp < kKDWarps", "warp <= kKDWarps"),
        "heap-buffer-overflow",
    ),
    "16 bytes where they are not aligned": (
        Change("kd_loss.cu", "strides * sizeof(T))) % 16 == 0", "strides * sizeof(T))) >= 0"),
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
    Change("kd_loss_kernel.cuh", "i * V + j == label", "i * V == label"),
    Change("kd_loss_sums.cuh", "distance = 16;", "distance = 8;"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.new)
def test_the_comparison_finds_a_wrong_index(simt, change):
    machine = simt("kd_loss.cu", changes=(change,), flags=("-O0",))
    with pytest.raises(AssertionError):
        run(machine, *make(9, 1100, 1100), temperature=0.7).check()
