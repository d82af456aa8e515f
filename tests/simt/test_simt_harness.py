"""The harness itself: what its threads may do, what it refuses, what 16 bits hold."""

from pathlib import Path

import pytest
import torch
from simt_build import Change
from simt_harness import SCHEDULES, Fault, Schedule

PROBES = Path(__file__).parent / "probes"
KERNELS = (
    "block_sum", "exchange", "count_distinct", "barrier_in_a_branch", "two_barriers",
    "lane_that_is_gone", "foreign_mask", "shared_past_the_end", "rounded",
    "through_memory", "one_place_for_all_blocks", "cluster_sum", "from_a_neighbour",
    "no_shared_memory",
)  # fmt: skip
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.order} {s.seed}")


@pytest.fixture(scope="module")
def machine(simt):
    return simt("probes.cu", folder=PROBES)


@pytest.fixture(scope="module")
def races(simt):
    return simt("probes.cu", folder=PROBES, races=True)


def fields(
    kernel, given, out, words=None, blocks=1, threads=64, dynamic_bytes=0, cluster=1, **more
):
    """`ProbeArgs` of a kernel."""
    return {
        "in": given, "out": out, "words": words, "size": given.numel(), "blocks": blocks,
        "threads": threads, "dynamic_bytes": dynamic_bytes, "cluster": cluster,
        "which": KERNELS.index(kernel),
    } | more  # fmt: skip


def run(machine, kernel, given, out, schedule=SCHEDULES[0], **more):
    machine.run("probe_cuda", fields(kernel, given, out, **more), schedule)
    return out


@each_schedule
def test_blocks_and_barriers(machine, schedule):
    given = torch.randint(-50, 50, (7 * 64,)).float()
    found = run(machine, "block_sum", given, torch.full((7,), torch.nan), schedule, blocks=7)
    assert torch.equal(found, given.view(7, 64).sum(1))


def test_a_missing_barrier_is_seen(machine):
    barrier = machine.built.barriers[0]
    given = torch.randint(1, 50, (64,)).float()
    wrong = []
    for s in SCHEDULES:
        schedule = Schedule(s.order, s.seed, dropped=barrier)
        found = run(machine, "block_sum", given, torch.full((1,), torch.nan), schedule)
        wrong.append(found.item() != given.sum().item())
    assert sum(wrong) >= 3


@each_schedule
def test_exchange(machine, schedule):
    v = torch.randn(64)
    out, words = torch.full((64, 6), torch.nan), torch.zeros(64, 3, dtype=torch.int32)
    run(machine, "exchange", v, out, schedule, words=words)
    warps = v.view(2, 32)
    down, up = warps.clone(), warps.clone()
    down[:, :-3], up[:, 3:] = warps[:, 3:], warps[:, :-3]
    eights = v.view(8, 8).clone()
    eights[:, :-1] = v.view(8, 8)[:, 1:]
    halves = warps.clone()
    halves[:, :16] = warps[:, [*range(8, 16), *range(8)]]
    swapped = v.view(-1, 2).flip(1).reshape(-1)
    expected = (warps[:, 5:6].expand(2, 32), down, up, swapped, eights, halves)
    for i, values in enumerate(expected):
        assert torch.equal(out[:, i], values.reshape(-1)), i
    bits = [sum(1 << i for i in range(32) if warp[i] > 0) for warp in warps]
    assert (words[:, 0].view(2, 32).long() & 0xFFFFFFFF).tolist() == [[b] * 32 for b in bits]
    assert words[:, 1].tolist() == [
        int(bool((warp > 2).any())) for warp in warps for _ in range(32)
    ]
    assert words[:, 2].tolist() == [
        int(bool((warp > -2).all())) for warp in warps for _ in range(32)
    ]


@each_schedule
def test_dynamic_memory_and_atomics(machine, schedule):
    given = torch.randint(0, 96, (256,)).float()
    words = torch.zeros(1, dtype=torch.int32)
    run(
        machine, "count_distinct", given, torch.zeros(1), schedule,
        words=words, threads=256, dynamic_bytes=12,
    )  # fmt: skip
    assert words.item() == len(given.unique())


@each_schedule
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("barrier_in_a_branch", r"1 threads ended without the barrier at .*probes\.cu:"),
        ("two_barriers", r"threads wait at different barriers: .*probes\.cu:\d+ and .*probes\.cu"),
        ("lane_that_is_gone", r"no thread can go on: 0 at .*probes\.cu:"),
        ("foreign_mask", r"this thread is not in its own mask 0xffff at .*probes\.cu:"),
    ],
)
def test_broken_rules_are_errors(machine, kernel, message, schedule):
    with pytest.raises(Fault, match=message):
        run(machine, kernel, torch.zeros(64), torch.zeros(64), schedule)
    given = torch.ones(64)  # and the next launch is a fresh one
    assert run(machine, "block_sum", given, torch.zeros(1), schedule).item() == 64


@pytest.mark.parametrize(
    "launch",
    [
        {"threads": 1025}, {"threads": 0}, {"blocks": 0}, {"dynamic_bytes": 49_153},
        {"blocks": 9, "cluster": 9}, {"blocks": 3, "cluster": 2}, {"cluster": 0},
    ],
)  # fmt: skip
def test_launches_that_a_gpu_refuses(machine, launch):
    with pytest.raises(Fault, match="CUDA error 9"):
        run(machine, "block_sum", torch.zeros(64), torch.zeros(1), **launch)


@each_schedule
def test_clusters(machine, schedule):
    given = torch.randint(-50, 50, (12 * 64,)).float()
    found = run(
        machine, "cluster_sum", given, torch.full((12,), torch.nan), schedule, blocks=12, cluster=4
    )
    sums = given.view(3, 4 * 64).sum(1)
    assert torch.equal(found, sums.repeat_interleave(4))
    options = {"blocks": 12, "cluster": 4, "dynamic_bytes": 256, "size": 3}
    found = run(machine, "from_a_neighbour", given, given.clone().fill_(torch.nan), schedule,
                **options)  # fmt: skip
    assert torch.equal(found.view(3, 4, 64), given.view(3, 4, 64).flip(1, 2))


def cluster_faults(machine, kernel, given, out, dropped, **options):
    """Messages, by schedule, of a launch with a barrier left out."""
    messages = []
    for s in SCHEDULES:
        try:
            run(machine, kernel, given, out, Schedule(s.order, s.seed, dropped), **options)
            messages.append("")
        except Fault as fault:
            messages.append(str(fault))
    return messages


def test_broken_rules_of_clusters_are_errors(machine):
    first, second, filled, read = [b for b in machine.built.barriers if b in cluster_sites()][:4]
    given, out = torch.ones(128), torch.full((128,), torch.nan)
    options = {"blocks": 2, "cluster": 2}
    found = cluster_faults(machine, "cluster_sum", given, out, first, **options)
    assert all("may not run yet: no cluster barrier before" in message for message in found)
    found = cluster_faults(machine, "cluster_sum", given, out, second, **options)
    assert any(found) or out[:2].tolist() != [128, 128]
    options |= {"dynamic_bytes": 256, "size": 1}
    found = cluster_faults(machine, "from_a_neighbour", given, out, read, **options)
    assert any("of the cluster has ended" in message for message in found)
    found = cluster_faults(machine, "from_a_neighbour", given, out, filled, **options)
    assert all("may not run yet" in message for message in found)
    options["size"] = 6
    with pytest.raises(Fault, match="of a cluster of 2"):
        run(machine, "from_a_neighbour", given, out, **options)
    with pytest.raises(Fault, match="outside of shared memory"):
        run(machine, "no_shared_memory", given, out, **options)


@each_schedule
def test_races_in_a_cluster(races, schedule):
    given, out = torch.ones(128), torch.full((128,), torch.nan)
    options = {"blocks": 2, "cluster": 2}
    assert run(races, "cluster_sum", given, out, schedule, **options)[:2].tolist() == [128, 128]
    options |= {"dynamic_bytes": 256, "size": 1}
    run(races, "from_a_neighbour", given, out, schedule, **options)
    dropped = Schedule(schedule.order, schedule.seed, cluster_sites()[1])
    with pytest.raises(Fault, match="a race: thread"):
        run(races, "cluster_sum", given, out, dropped, blocks=2, cluster=2)


def cluster_sites():
    """Barriers of clusters in the probes: two of cluster_sum, two of from_a_neighbour, one more."""
    lines = (PROBES / "probes.cu").read_text(encoding="utf-8").splitlines()
    return [f"probes.cu:{n}" for n, line in enumerate(lines, 1) if "cluster.sync()" in line]


@each_schedule
def test_races_are_seen_in_any_schedule(races, schedule):
    given = torch.randn(64)
    assert run(races, "block_sum", given, torch.zeros(1), schedule).item() != 0
    words = torch.zeros(1, dtype=torch.int32)
    numbers = torch.arange(64).float()  # atomics are none
    run(races, "count_distinct", numbers, given, schedule, words=words, dynamic_bytes=12)
    found = run(races, "through_memory", given, torch.zeros(64), schedule)
    assert torch.equal(found, given.view(-1, 2).flip(1).reshape(-1))
    dropped = Schedule(schedule.order, schedule.seed, races.built.barriers[0])
    with pytest.raises(Fault, match="a race: thread"):
        run(races, "block_sum", given, torch.zeros(1), dropped)
    with pytest.raises(Fault, match="a race: thread 0 of block"):
        run(races, "one_place_for_all_blocks", given, torch.zeros(1), schedule, blocks=2)


def test_a_missing_wait_of_a_warp_is_a_race(simt):
    change = Change("probes.cu", """= a.in[threadIdx.x];
  __syncwarp();
  a.out""", """= a.in[threadIdx.x];
  a.out""")  # fmt: skip
    machine = simt("probes.cu", folder=PROBES, races=True, changes=(change,))
    with pytest.raises(Fault, match="a race: thread"):
        run(machine, "through_memory", torch.randn(64), torch.zeros(64))


def test_rounding_to_16_bits(machine):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = torch.cat([every.view(torch.float16).float(), every.view(torch.bfloat16).float()])
    between = (values[1:] + values[:-1]) / 2  # ties among them
    spread = torch.randn(20_000) * 2.0 ** torch.randint(-40, 40, (20_000,))
    given = torch.cat([values, between, between * (1 + 1e-7), spread])
    found = run(machine, "rounded", given, torch.full((len(given), 2), torch.nan), blocks=4)
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        assert torch.equal(found[:, i].nan_to_num(7e30), given.to(dtype).float().nan_to_num(7e30))


@pytest.mark.slow
def test_the_sanitizer_sees_the_end_of_shared_memory(simt):
    machine = simt("probes.cu", folder=PROBES, sanitize=True, flags=("-O0",))
    given, out = torch.ones(64), torch.zeros(1)
    machine.run_apart([("probe_cuda", fields("block_sum", given, out), s) for s in SCHEDULES])
    assert out.item() == 64
    job = ("probe_cuda", fields("shared_past_the_end", given, torch.zeros(64)), SCHEDULES[0])
    with pytest.raises(Fault, match="heap-buffer-overflow"):
        machine.run_apart([job])


@pytest.mark.slow
def test_without_assembly(simt):
    """The way that other processors than x86-64 take."""
    machine = simt("probes.cu", folder=PROBES, flags=("-O1", "-DSIMT_UCONTEXT"))
    for schedule in SCHEDULES:
        test_blocks_and_barriers(machine, schedule)
        test_exchange(machine, schedule)
    with pytest.raises(Fault, match="no thread can go on"):
        run(machine, "lane_that_is_gone", torch.zeros(64), torch.zeros(64))
