"""What the compiler makes of every Triton kernel, without a GPU.

    python -m benchmarks.static                      # compile, print, compare with budgets.json
    python -m benchmarks.static --only prefix --arch 80
    python -m benchmarks.static --update             # write what was found into budgets.json

Each kernel is compiled for sm_80, sm_90 and sm_120 with the constants, alignments, warps and
stages of a launch, by the compiler that a launch uses; registers, stack (spills) and instructions
are read off that very binary. A check of the code's shape, not of its speed: other versions of
Triton change every number, so the budgets name theirs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None):
    print("TRITON_INTERPRET is set: unset it, this compiles", file=sys.stderr)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clinkd.kernels import prefix_decode_attention as prefix
from clinkd.kernels import rotary_attention as forward
from clinkd.kernels import rotary_attention_backward as backward
from clinkd.kernels import rotary_attention_keys as keys
from clinkd.kernels import rotary_tiles as tiles

BUDGETS = Path(__file__).parent / "budgets.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 90, 120)
# of a streaming multiprocessor: warps and bytes of shared memory (CUDA C++ Programming Guide 13.0,
# "Technical Specifications per Compute Capability"); registers are 65,536 on all
WARPS = {80: 64, 90: 64, 120: 48}
SHARED = {80: 164 << 10, 90: 228 << 10, 120: 100 << 10}
REGISTERS, REGISTERS_A_STEP = 65_536, 256


@dataclass(frozen=True)
class Case:
    """One kernel with the constants of one launch."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]  # of arguments that are no constants
    warps: int
    stages: int


@dataclass(frozen=True)
class Figures:
    """Read off one binary.

    Attributes:
        stack: bytes of a thread's stack: what was spilled, or needed by a library's slow path.
        local: loads and stores to it.
        occupancy: percent of the warps that a multiprocessor can hold.
        mma: tensor-core instructions.
        sine_cosine: special-function instructions of that kind.
    """

    registers: int
    stack: int
    local: int
    shared: int
    occupancy: int
    mma: int
    sine_cosine: int


def cases(arch: int) -> Iterator[Case]:
    """Every shipped configuration at the shapes of Qwen2-VL-2B (12 / 2 heads of 128)."""
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for rows in (16, 32, 54, 128):
            tile = prefix.tile(rows, size)
            constants = dict(PREFIX_PIECES=16, Hkv=2, G=6, D=128, PIECE=128, BLOCK_D=128)
            warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
            kernel = prefix._piece_kernel
            types = _prefix_types(kernel, dtype)
            constants |= {"UPCAST": False, **tile}
            name = f"prefix_decode_attention {dtype} rows {rows}"
            yield Case(name, kernel, constants, types, warps, stages)
    merge = dict(Hkv=2, G=6, D=128, BLOCK_P=32, BLOCK_D=128)
    types = dict(
        piece_out_ptr="*fp32", piece_lse_ptr="*fp32", out_ptr="*bf16", pieces="i32", K="i32"
    )
    yield Case("prefix_decode_attention merge", prefix._merge_kernel, merge, types, 1, 3)
    for head_dim in (64, 80, 96, 128):
        for part, kernel, blocks, own_rows in (
            ("forward", forward._forward_kernel, tiles.forward_blocks(head_dim, 2, arch), True),
            ("keys", keys.keys_kernel, tiles.keys_blocks(head_dim, 2, arch), False),
            ("queries", backward._queries_kernel, tiles.queries_blocks(head_dim, 2, arch), True),
        ):
            constants = _attention_constants(kernel, head_dim, blocks, own_rows)
            types = _attention_types(kernel, constants)
            name = f"rotary_attention {part} bf16 head_dim {head_dim}"
            yield Case(name, kernel, constants, types, blocks.warps, blocks.stages)


def _prefix_types(kernel: Any, dtype: str) -> dict[str, str]:
    own = {
        "prefix_lengths_ptr": "*i32",
        "suffix_lengths_ptr": "*i32",
        "visible_ptr": "*u8",
        "piece_out_ptr": "*fp32",
        "piece_lse_ptr": "*fp32",
        "scale": "fp32",
    }
    return {
        name: own.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }


def _attention_constants(kernel: Any, head_dim: int, blocks: Any, own_rows: bool) -> dict[str, Any]:
    first, second = tiles.pieces(head_dim)
    rows, columns = blocks.rows, blocks.columns
    constants = dict(
        G=6,
        D=head_dim,
        R=head_dim // 2,
        PAIR_STRIDE=head_dim // 2,
        D0=first,
        D1=second,
        CAUSAL=True,
        WINDOW=0,
        PACKED=False,
        SEQUENCES=1,
        PARTS=1,
        ROTATE=True,
        KEEP=True,
        PRECISION="tf32",
        UPCAST=False,
        BLOCK_M=rows if own_rows else columns,
        BLOCK_N=columns if own_rows else rows,
        starts_ptr=None,
        key_starts_ptr=None,
    )
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def _attention_types(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    own = dict.fromkeys(("lse_ptr", "delta_ptr", "positions_ptr", "hi_ptr", "lo_ptr"), "*fp32")
    own |= {"axis_ptr": "*i32", "factor": "fp32", "scale": "fp32"}
    return {
        name: own.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def compile_case(case: Case, arch: int) -> Figures:
    """Compile for an architecture and read the figures off the binary."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or ("stride" in name and "lse" not in name and "position" not in name)
    }
    constants = {n: case.constants[n] for n in names if n in case.constants}
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=case.warps, num_stages=case.stages),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = int(found[1]), int(found[2])
    shared = int(compiled.metadata.shared)
    return Figures(
        registers=registers,
        stack=stack,
        local=len(re.findall(r"\b(?:LDL|STL)", code)),
        shared=shared,
        occupancy=occupancy(arch, registers, shared, case.warps),
        mma=len(re.findall(r"\bH?G?MMA", code)),
        sine_cosine=len(re.findall(r"MUFU\.(?:SIN|COS)", code)),
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def occupancy(arch: int, registers: int, shared: int, warps: int) -> int:
    """Percent of a multiprocessor's warps, by registers and shared memory."""
    step = -(-registers * 32 // REGISTERS_A_STEP) * REGISTERS_A_STEP
    by_registers = REGISTERS // step // warps
    by_shared = SHARED[arch] // (shared + 1024)  # the system keeps 1 KB a block
    blocks = min(by_registers, by_shared, WARPS[arch] // warps)
    return 100 * blocks * warps // WARPS[arch]


def over_budget(found: Figures, budget: dict[str, int]) -> list[str]:
    """In what a binary is worse than its budget allows."""
    worse = []
    for name in ("registers", "stack", "local", "shared", "sine_cosine"):
        if getattr(found, name) > budget[name]:
            worse.append(f"{name} {getattr(found, name)}, budget {budget[name]}")
    for name in ("occupancy", "mma"):
        if getattr(found, name) < budget[name]:
            worse.append(f"{name} {getattr(found, name)}, budget at least {budget[name]}")
    return worse


def main() -> None:
    """Compile all, print a table, fail where a budget is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--arch", type=int, choices=ARCHS, action="append")
    parser.add_argument("--update", action="store_true", help="write budgets.json")
    arguments = parser.parse_args()
    book = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {"cases": {}}
    if not arguments.update and book.get("triton") != triton.__version__:
        raise SystemExit(
            f"budgets.json was made with triton {book.get('triton')}, this is {triton.__version__}"
        )
    failed = 0
    print(f"{'kernel':48} arch  regs stack local  shared  occ%   mma sincos")
    for arch in arguments.arch or ARCHS:
        for case in cases(arch):
            if arguments.only not in case.name:
                continue
            found = compile_case(case, arch)
            print(
                f"{case.name:48} {arch:4} {found.registers:5} {found.stack:5} {found.local:5} "
                f"{found.shared:7} {found.occupancy:5} {found.mma:5} {found.sine_cosine:6}",
                flush=True,
            )
            key = f"{case.name} sm_{arch}"
            if arguments.update:
                book["cases"][key] = asdict(found)
                continue
            budget = book["cases"].get(key)
            worse = over_budget(found, budget) if budget else ["no budget: run with --update"]
            for reason in worse:
                print(f"    over budget: {reason}")
            failed += bool(worse)
    if arguments.update:
        book["triton"] = triton.__version__
        BUDGETS.write_text(json.dumps(book, indent=1, sort_keys=True) + "\n")
    elif failed:
        raise SystemExit(f"{failed} binaries over budget")


if __name__ == "__main__":
    main()
