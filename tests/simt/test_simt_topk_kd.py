"""The CUDA kernels of `topk_kd_loss` on the CPU, inside their operators: against float64."""

import ctypes
import itertools

import pytest
import torch
from simt_build import Change
from simt_harness import SCHEDULES, Fault, Schedule

from clinkd.ops import _topk_kd_native as native
from clinkd.ops._impl import TYPES
from clinkd.ops._topk_kd_native import ascending
from clinkd.ops.reference.kd_loss import DIVERGENCES
from clinkd.ops.reference.topk_kd_loss import bucket_loss_rows, topk_kd_loss_rows

PLACES = (
    "student", "ids", "labels", "statistics", "top_factor", "tail_factor", "soft_factor",
    "picked_factor", "grad",
)  # fmt: skip
SIZES = ("rows", "columns", "k", "student_stride", "grad_stride")


@pytest.fixture(scope="module")
def machine(simt):
    return simt("topk_kd.cu")


@pytest.fixture
def run(machine, monkeypatch):
    """CE, KD and the gradient of their sum, by the operators with the harness as the GPU."""
    schedules = []

    def run_native(name, impl, tensor, places, sizes, ignore_index, temperature, softcap):
        fields = dict(zip(PLACES, places, strict=True)) | dict(zip(SIZES, sizes, strict=True))
        fields |= {"ignore_index": ignore_index, "temperature": temperature}
        fields |= {"softcap": softcap, "type": TYPES[tensor.dtype]}
        if name == "topk_tails":  # what is written is NaN before
            ctypes.memset(fields["statistics"], 0xFF, 4 * native.STATISTICS * fields["rows"])
        else:
            size = fields["rows"] * fields["grad_stride"] * tensor.element_size()
            ctypes.memset(fields["grad"], 0xFF, size)
        machine.run(f"{name}_{impl}", fields, schedules[-1])

    monkeypatch.setattr(native, "run_native", run_native)

    def run(z, t, ids, lse, labels, softcap, schedule=SCHEDULES[0], **options):
        schedules.append(schedule)
        z = z.detach().requires_grad_()
        logits, ids, lse = ascending(t, ids, lse, z.shape[1])
        numbers = (options["temperature"], options["ignore_index"], softcap or 0.0, "cuda")
        top, tail, soft_tail, picked, _ = torch.ops.clinkd.topk_rows(z, ids, labels, *numbers)
        ce, kd = bucket_loss_rows(top, tail, soft_tail, picked, logits, lse, labels, **options)
        return ce.detach(), kd.detach(), torch.autograd.grad((ce + kd).sum(), z)[0]

    return run


def make(N, Vs, Vt, K, temperature, dtype=torch.float32):
    """Student's logits, the teacher's top K of Vt, labels with an ignored one."""
    g = torch.Generator().manual_seed(Vs)
    z, t = (torch.randn(N, V, generator=g) * 3 for V in (Vs, Vt))
    lse = (t / temperature).logsumexp(1)
    top, ids = t.topk(K, dim=1)
    labels = torch.randint(0, Vs, (N,), generator=g)
    labels[1::5] = -100
    return z.to(dtype), top, ids, lse, labels


def exact(dtype, z, t, ids, lse, labels, softcap, **options):
    z = z.detach().to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    teacher = (t.to(wide), ids, lse.to(wide))
    ce, kd = topk_kd_loss_rows(z, *teacher, labels, softcap=softcap, **options)
    return ce.detach(), kd.detach(), torch.autograd.grad((ce + kd).sum(), z)[0]


def check(found, *inputs, **options):
    """Float32 to 1e-5 relative; 16-bit types with at most twice plain torch's error."""
    plain = exact(inputs[0].dtype, *inputs, **options)
    for a, e, p in zip(found, exact(torch.float64, *inputs, **options), plain, strict=True):
        size = e.abs().max().item()
        least = 1e-5 * max(size, 1e-3) + options["temperature"] ** 2 * 2.4e-7
        if a.dtype != torch.float32:
            least = torch.finfo(a.dtype).eps * size
        assert (a - e).abs().max().item() <= max(2 * (p - e).abs().max().item(), least)


def options_of(divergence, temperature):
    return {
        "temperature": temperature, "divergence": divergence, "beta": 0.3, "skew": 0.2,
        "ignore_index": -100,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(run, divergence, dtype):
    sizes = ((1100, 1100, 16), (377, 800, 40), (40, 60, 24), (5, 5, 3))
    for T, softcap, (Vs, Vt, K) in itertools.product((1.0, 0.7), (None, 5.0), sizes):
        inputs = (*make(3, Vs, Vt, K, T, dtype), softcap)
        options = options_of(divergence, T)
        check(run(*inputs, **options), *inputs, **options)


def test_every_schedule_gives_the_same(run):
    inputs, options = (*make(3, 900, 900, 20, 2.0), None), options_of("forward_kl", 2.0)
    results = [run(*inputs, schedule=schedule, **options) for schedule in SCHEDULES]
    check(results[0], *inputs, **options)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def launches(columns, k, dtype):
    """Both launches over three rows, and what they write."""
    z, _, ids, _, labels = make(3, columns, columns, k, 1.0, dtype)
    ids = ids.sort(dim=1).values.to(torch.int32)
    ids[:, -1] = columns  # a token that the student does not have
    g = torch.Generator().manual_seed(k)
    top, rows = torch.randn(3, k, generator=g), torch.randn(3, 3, generator=g)
    statistics = torch.full((3, native.STATISTICS), torch.nan)
    grad = torch.full_like(z, torch.nan)
    tensors = (z, ids, labels, statistics, top, *rows, grad)
    fields = dict(zip(PLACES, tensors, strict=True))
    fields |= dict(zip(SIZES, (3, columns, k, z.stride(0), z.stride(0)), strict=True))
    fields |= {"ignore_index": -100, "temperature": 0.7, "softcap": 0.0, "type": TYPES[dtype]}
    jobs = [(f"topk_{part}_cuda", fields, SCHEDULES[0]) for part in ("tails", "gradient")]
    return jobs, (statistics, grad)


def run_sanitized(simt, machine, *changes):
    """In a sanitized process as here, to the bit."""
    sanitized = simt("topk_kd.cu", changes=changes, sanitize=True, flags=("-O0",))
    for shape in ((70, 9, torch.float32), (64, 64, torch.bfloat16), (33, 5, torch.float16)):
        jobs, found = launches(*shape)
        sanitized.run_apart(jobs)
        jobs, wanted = launches(*shape)
        for job in jobs:
            machine.run(*job)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert all(a.isfinite().any() for a in found)


def in_place(machine, columns, k, dtype, schedule=SCHEDULES[0]):
    for function, fields, _ in launches(columns, k, dtype)[0]:
        machine.run(function, fields | {"grad": fields["student"]}, schedule)


@pytest.mark.slow
def test_no_thread_races_another(simt):
    """The gradient in place too; and each barrier that is left out makes a race."""
    machine = simt("topk_kd.cu", races=True)
    in_place(machine, 700, 600, torch.float32)
    in_place(machine, 704, 90, torch.bfloat16)
    for barrier in machine.built.barriers:
        with pytest.raises(Fault, match="a race: thread"):
            in_place(machine, 700, 600, torch.float32, Schedule(dropped=barrier))


@pytest.mark.slow
def test_the_sanitizers_find_nothing(simt, machine):
    run_sanitized(simt, machine)


KERNEL = "topk_kd_kernel.cuh"
FAULTS = [
    Change(KERNEL, "if (id >= columns) continue;", ""),
    Change(KERNEL, "if (id < a.columns) atomicOr", "atomicOr"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", FAULTS, ids=["logit", "map"])
def test_the_sanitizers_find_a_planted_fault(simt, machine, change):
    with pytest.raises(Fault, match="heap-buffer-overflow"):
        run_sanitized(simt, machine, change)
