"""What the compilers make of every kernel, without a GPU.

    python -m benchmarks.static                      # compile, print, compare with budgets.json
    python -m benchmarks.static --only prefix --arch 80
    python -m benchmarks.static --update             # write what was found into budgets.json
    python -m benchmarks.static --peers              # others' kernels and losses beside ours
    python -m benchmarks.static --every              # float32 heads of all sizes: no spills

Each Triton kernel is compiled for sm_80, sm_90 and sm_120 with the constants, alignments, warps and
stages of a launch, by the compiler that a launch uses; each CUDA C++ kernel by nvcc, where there is
one, with the build's flags. Registers, stack (spills) and instructions are read off those very
binaries. A check of the code's shape, not of its speed: other versions change every number, so the
budgets name theirs.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# as a program only: tests that import this run kernels in the interpreter
if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", None):
    print("TRITON_INTERPRET is set: unset it, this compiles", file=sys.stderr)

import triton

from benchmarks.static.cases import WITHOUT, cases
from benchmarks.static.compiling import (
    CUDA_SOURCES,
    ONE_ARCH,
    Figures,
    compile_one,
    nvcc_version,
)
from benchmarks.static.limits import ARCHS
from benchmarks.static.traffic import report

BUDGETS = Path(__file__).parent.parent / "budgets.json"
MOST_FOR_ROTATION = 1.02  # instructions of a main loop, over the same without rotation
AT_MOST = ("registers", "stack", "local", "shared", "loop", "loops_sine_cosine")
AT_LEAST = ("occupancy", "mma")
COLUMNS = {
    "registers": "regs", "stack": "stack", "local": "local", "shared": "shared",
    "occupancy": "occ%", "mma": "mma", "special": "mufu", "loop": "loop", "loop_mma": "l.mma",
    "loop_exp2": "l.ex2", "loop_other": "l.other", "loops_sine_cosine": "l.sincos",
}  # fmt: skip


def over_budget(found: Figures, budget: dict[str, int]) -> list[str]:
    """In what a binary is worse than its budget allows."""
    worse = [
        f"{name} {getattr(found, name)}, budget {budget[name]}"
        for name in AT_MOST
        if getattr(found, name) > budget[name]
    ]
    return worse + [
        f"{name} {getattr(found, name)}, budget at least {budget[name]}"
        for name in AT_LEAST
        if getattr(found, name) < budget[name]
    ]


def rules(found: Figures, attention: bool, twin: Figures | None) -> list[str]:
    """What must hold of every version of a compiler.

    Args:
        twin: the same kernel with rotation compiled out.
    """
    broken = []
    if found.stack or found.local:
        broken.append(f"spills: {found.stack} bytes of stack, {found.local} loads and stores")
    if attention and found.loops_sine_cosine:
        broken.append(f"{found.loops_sine_cosine} sines and cosines in loops of an attention")
    if found.loops_serial:
        broken.append(f"{found.loops_serial} loops in which products wait for one another")
    if twin is not None and twin.loop and found.loop > MOST_FOR_ROTATION * twin.loop:
        broken.append(f"main loop of {found.loop} instructions, {twin.loop} without rotation")
    return broken


def main() -> None:
    """Compile all, print a table, fail where a budget is exceeded or a rule broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--arch", type=int, choices=ARCHS, action="append", help="default: all")
    parser.add_argument("--peers", action="store_true", help="nothing but ours beside others'")
    parser.add_argument("--every", action="store_true", help="more sizes, which have no budget")
    parser.add_argument("--update", action="store_true", help="write budgets.json")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    arguments = parser.parse_args()
    book: dict[str, Any] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {"cases": {}}
    if not arguments.update and book.get("triton") != triton.__version__:
        raise SystemExit(
            f"budgets.json was made with triton {book.get('triton')}, this is {triton.__version__}"
        )
    nvcc = nvcc_version()
    with_cuda = nvcc is not None and (arguments.update or nvcc == book.get("nvcc"))
    if not with_cuda:
        print(f"CUDA C++ left out: nvcc is {nvcc}, budgets.json was made with {book.get('nvcc')}")
    if arguments.peers:
        finish(compare(tuple(arguments.arch or ARCHS), with_cuda))
        return
    jobs = [
        ("triton", arch, case.name)
        for arch in arguments.arch or ARCHS
        for case in cases(arch, arguments.every)
        if arguments.only in case.name
    ]
    if with_cuda:
        jobs += [
            ("cuda", arch, source)
            for arch in arguments.arch or ARCHS
            for source in CUDA_SOURCES
            if arguments.only in source and ONE_ARCH.get(source, arch) == arch
        ]
    failed: list[str] = []
    everything: dict[str, Figures] = {}
    attentions: set[str] = set()
    print(f"{'kernel':58} arch " + " ".join(f"{head:>8}" for head in COLUMNS.values()))
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for (_, arch, _), results in zip(jobs, pool.map(compile_one, jobs), strict=True):
            for name, (found, attention) in results.items():
                numbers = " ".join(f"{getattr(found, column):8}" for column in COLUMNS)
                print(f"{name:58} {arch:4} {numbers}", flush=True)
                key = f"{name} sm_{arch}"
                everything[key] = found
                attentions |= {key} if attention else set()
                if arguments.update and not arguments.every:
                    book["cases"][key] = asdict(found)
                    continue
                budget = book["cases"].get(key)
                none = [] if arguments.every else ["no budget: run with --update"]
                worse = over_budget(found, budget) if budget else none
                failed += [f"{key}: {reason}" for reason in worse]
    for key, found in everything.items():
        twin = everything.get(key.replace(" sm_", f"{WITHOUT} sm_"))
        failed += [f"{key}: {reason}" for reason in rules(found, key in attentions, twin)]
    failed += report()
    if arguments.update and not arguments.every:
        book |= {"triton": triton.__version__, "nvcc": nvcc}
        if not arguments.only and not arguments.arch:
            book["cases"] = {key: asdict(found) for key, found in everything.items()}
        BUDGETS.write_text(json.dumps(book, indent=1, sort_keys=True) + "\n")
    finish(failed)


def compare(archs: tuple[int, ...], with_cuda: bool) -> list[str]:
    """Print ours beside others'; where others do without a stack and ours does not."""
    from benchmarks.static import losses, peers  # here: they look for what may not be installed

    failed = peers.report(archs, with_cuda, COLUMNS)
    losses.report()
    return failed


def finish(failed: list[str]) -> None:
    """Fail where there is a reason to."""
    for reason in failed:
        print(f"over: {reason}")
    if failed:
        raise SystemExit(f"{len(failed)} figures over what is allowed")


if __name__ == "__main__":
    main()
