"""The CUDA kernel of `rotary_append` on the CPU: equal to the kernel of `rotary` and a copy."""

import pytest
import torch
from simt_build import Change
from simt_harness import SCHEDULES, Fault, Schedule, poisoned
from test_simt_rotary import DTYPES, SPECS, check, make
from test_simt_rotary import fields as rotary_fields

STARTS = torch.tensor([0, 2, 5, -2, 9, -100])


@pytest.fixture(scope="module")
def machine(simt):
    return simt("rotary_append.cu", "rotary.cu")


class Append:
    """Six rows of three tokens into caches of seven slots, from and to tensors of any strides."""

    def __init__(self, name, dtype, layout="plain", heads=9, starts=STARTS):
        self.spec, self.starts = SPECS[name], starts
        self.k, self.positions = make(self.spec, (6, 3, heads), dtype)
        self.v, _ = make(self.spec, (6, 3, heads), dtype, seed=1)
        self.caches = [self._cache(layout, heads, dtype) for _ in range(2)]
        if layout == "cut":  # values whose heads do not begin on 16 bytes
            wide = torch.full((*self.v.shape[:3], self.v.shape[3] + 3), torch.nan, dtype=dtype)
            self.v = wide[..., 1:-2].copy_(self.v)

    def _cache(self, layout, heads, dtype):
        D = self.spec.head_dim
        if layout == "heads first":
            return torch.full((6, heads, 7, D), torch.nan, dtype=dtype).transpose(1, 2)
        return torch.full((6, 7, heads, D), torch.nan, dtype=dtype)

    def job(self, schedule=SCHEDULES[0]):
        keys, values = self.caches
        fields = {
            "keys": rotary_fields(self.k, keys, self.positions, self.spec),
            "values": self.v, "value_cache": values, "starts": self.starts,
            "slots": 7, "value_stride": self.v.stride()[:3],
            "value_cache_stride": values.stride()[:3],
        }  # fmt: skip
        return "rotary_append_cuda", fields, schedule

    def check(self, machine):
        """Keys right against float64 and as `rotary` turns them; nothing else was written."""
        turned = poisoned(self.k)
        plain = rotary_fields(self.k.contiguous(), turned, self.positions, self.spec)
        machine.run("rotary_cuda", plain)
        check(turned, self.k, self.positions, self.spec)
        starts = torch.zeros(6).long() if self.starts is None else self.starts
        for cache, new in zip(self.caches, (turned, self.v), strict=True):
            wanted = torch.full(cache.shape, torch.nan, dtype=cache.dtype)
            for b, start in enumerate(starts.tolist()):
                for s in range(3):
                    if 0 <= start + s < 7:
                        wanted[b, start + s] = new[b, s]
            assert torch.equal(cache.nan_to_num(9), wanted.nan_to_num(9))
            assert torch.equal(cache.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_equals_rotary_and_a_copy(machine, name, dtype):
    for layout in ("plain", "heads first", "cut"):
        append = Append(name, dtype, layout)
        machine.run(*append.job())
        append.check(machine)


def test_no_starts_are_zeros(machine):
    append = Append("paper", torch.bfloat16, starts=None)
    machine.run(*append.job())
    append.check(machine)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.order} {s.seed}")
def test_every_schedule_gives_the_same(machine, schedule):
    append = Append("vision", torch.float16, heads=17)
    machine.run(*append.job(schedule))
    append.check(machine)


@pytest.mark.slow
def test_no_thread_races_another(simt):
    append = Append("paper", torch.bfloat16)
    simt("rotary_append.cu", races=True).run(*append.job())


@pytest.mark.slow
def test_two_rows_of_one_cache_are_a_race(simt):
    """What a caller must not do: rows of an expanded cache are the same memory."""
    append = Append("paper", torch.float32, starts=torch.zeros(6, dtype=torch.int64))
    append.caches[0] = append.caches[0][:1].expand(6, -1, -1, -1)
    with pytest.raises(Fault, match="a race: thread"):
        simt("rotary_append.cu", races=True).run(*append.job())


def run_sanitized(simt, machine, *changes):
    sanitized = simt("rotary_append.cu", changes=changes, sanitize=True, flags=("-O0",))
    appends = [
        Append(name, dtype, layout, heads=2, starts=torch.tensor([-1, 2, 0, 3, 5, 6]))
        for name, dtype, layout in (
            ("paper", torch.bfloat16, "plain"),
            ("partial", torch.float32, "heads first"),
            ("odd-pairs", torch.float16, "cut"),
            ("mrope", torch.float32, "cut"),
        )
    ]
    sanitized.run_apart([append.job(Schedule("reverse")) for append in appends])
    for append in appends:
        append.check(machine)


@pytest.mark.slow
def test_the_sanitizers_find_nothing(simt, machine):
    run_sanitized(simt, machine)


KERNEL = "rotary_append_kernel.cuh"
FAULTS = [
    (Change(KERNEL, "slot < 0 || slot >= a.slots", "slot < 0"), "heap-buffer-overflow"),
    (Change(KERNEL, "slot < 0 || slot >= a.slots", "slot >= a.slots"), "heap-buffer-overflow"),
    (Change("rotary_append.cu", "&& places % 16 == 0", ""), "misaligned"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), FAULTS, ids=["end", "start", "alignment"])
def test_the_sanitizers_find_a_planted_fault(simt, machine, change, message):
    with pytest.raises(Fault, match=message):
        run_sanitized(simt, machine, change)
