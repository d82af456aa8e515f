"""What the throughput benchmarks share: arguments, timing in turn, machine, lines and plot."""

import argparse
import ctypes
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clinkd.ops import release_memory

Step = Callable[[], Any]
Clock = Callable[[], float]  # runs a step once; milliseconds


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help says the first line of a module's text, and every default."""
    return argparse.ArgumentParser(
        description=(description or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def arguments(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """A parser of what every throughput benchmark takes; `seconds` of one comparison."""
    parser = parser_of(description)
    cuda = torch.cuda.is_available()
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of the tensors")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cuda or cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each size and op")
    parser.add_argument("--output", type=Path, help="folder for the lines and the plot")
    return parser


def machine(device: torch.device, **settings: Any) -> dict[str, Any]:
    """What a line says of where it was measured, and the settings of the run."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    threads = torch.get_num_threads()
    return {"device": name, "threads": threads, **settings, "torch": torch.__version__}


def processor() -> str:
    """Model and widest vectors of the CPU, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def wall_clock(step: Step, device: torch.device, before: Step | None = None) -> Clock:
    """Times a step with what Python takes to launch it, but not `before`, which runs first."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def clock() -> float:
        if before is not None:
            before()
        wait()
        begin = time.perf_counter()
        step()
        wait()
        return (time.perf_counter() - begin) * 1e3

    return clock


def time_in_turn(
    clocks: dict[str, Clock], seconds: float, least: int, most: int
) -> dict[str, float]:
    """Median milliseconds of each.

    Contenders run in turn, round after round, so that a busy machine slows all of them alike: at
    least `least` rounds, then until `seconds` are over or `most` rounds are done. Each round has an
    order of its own: what ran before leaves its memory and its lines in the caches to the next.
    """
    order, dice = list(clocks), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in clocks}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < deadline):
        dice.shuffle(order)
        for name in order:
            times[name].append(clocks[name]())
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(step: Step, device: torch.device) -> float:
    """Most memory that a step adds. On the CPU: pages that the process has, as Linux tells, or NaN.

    The first step of its kind may take more, for libraries' code and buffers.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    release_memory()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what others kept
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    except (OSError, AttributeError):
        return math.nan
    before = _resident_kib("VmHWM")
    step()
    return round((_resident_kib("VmHWM") - before) / 2**10, 1)


def _resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def save(rows: list[dict[str, Any]], folder: Path, name: str, x: str, label: str) -> None:
    """Write NAME.jsonl, and NAME.png: milliseconds over column `x`, one panel an op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, axes = pyplot.subplots(1, len(ops), figsize=(5 * len(ops), 4), squeeze=False)
    for axis, op in zip(axes[0], ops, strict=True):
        for contender in dict.fromkeys(row["name"] for row in rows if row["op"] == op):
            own = [row for row in rows if (row["op"], row["name"]) == (op, contender)]
            axis.plot([r[x] for r in own], [r["ms"] for r in own], marker="o", label=contender)
        axis.set(title=op, xlabel=label, ylabel="ms", xscale="log", yscale="log")
        sizes = sorted({row[x] for row in rows if row["op"] == op})
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes], rotation=45)
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(figure)
