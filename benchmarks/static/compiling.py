"""Compiles kernels as a launch and the build would, and reads the figures off the binaries."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.static import sass
from benchmarks.static.cases import SIZES, Case, cases
from benchmarks.static.limits import occupancy
from benchmarks.static.traffic import VOCABULARY

ROOT = Path(__file__).parent.parent.parent
NVCC_FLAGS = ("-O3", "-std=c++17", "-Icsrc")  # as setup.py; a test compares
CUDA_SOURCES = (
    "rotary.cu",
    "rotary_append.cu",
    "kd_loss.cu",
    "kd_loss_cluster.cu",
    "kd_scale.cu",
    "topk_kd.cu",
)
ONE_ARCH = {"kd_loss_cluster.cu": 90}  # its kernels are empty for others


@dataclass(frozen=True)
class Figures:
    """Read off one binary.

    Attributes:
        stack: bytes of a thread's stack: what was spilled, or needed by a library's slow path.
        local: loads and stores to it.
        occupancy: percent of the warps that a multiprocessor can hold.
        mma: tensor-core instructions.
        sine_cosine: special-function instructions of that kind.
        special: special-function instructions of all kinds.
        loop: instructions of the main loop; 0: no loop. The next are of it too.
        loop_mma, loop_exp2, loop_other: tensor-core; exponentials; other special functions.
        loops_sine_cosine: sines and cosines in any loop.
        loops_serial: loops in which tensor-core products wait for one another, see `sass`.
    """

    registers: int
    stack: int
    local: int
    shared: int
    occupancy: int
    mma: int
    sine_cosine: int
    special: int
    loop: int
    loop_mma: int
    loop_exp2: int
    loop_other: int
    loops_sine_cosine: int
    loops_serial: int


def compile_triton(case: Case, arch: int) -> Figures:
    """Compile for an architecture and read the figures off the binary."""
    names = case.kernel.arg_names
    types = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*") or types[name].endswith(":16")
    }
    compiled = triton.compile(
        ASTSource(
            case.kernel,
            {name: kind.removesuffix(":16") for name, kind in types.items()},
            {n: case.constants[n] for n in names if n in case.constants},
            aligned,
        ),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=case.warps, num_stages=case.stages),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        [usage], [code] = (f(Path(file.name)).values() for f in (sass.usage, sass.code))
    return _figures(usage, code, int(compiled.metadata.shared), arch, case.warps)


def compile_one(job: tuple[str, int, str]) -> dict[str, tuple[Figures, bool]]:
    """Figures of one Triton case, or of every kernel of one CUDA source, by name.

    With each goes whether it is an attention kernel, whose loops may hold no sine or cosine.
    """
    kind, arch, name = job
    if kind == "cuda":
        return {found: (figures, False) for found, figures in compile_cuda(name, arch).items()}
    case = next(case for case in cases(arch, every=True) if case.name == name)
    return {name: (compile_triton(case, arch), case.attention)}


def nvcc_version() -> str | None:
    """Of the nvcc on the PATH, such as "13.0"."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else None


def compile_cuda(source: str, arch: int) -> dict[str, Figures]:
    """Every kernel of a file in csrc/, by a readable name."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "out.cubin"
        command = [
            "nvcc",
            *NVCC_FLAGS,
            f"-arch=sm_{arch}",
            "-cubin",
            f"csrc/{source}",
            "-o",
            binary,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"nvcc: csrc/{source}: {done.stderr}")
        usage, code = sass.usage(binary), sass.code(binary)
    found = {}
    for name, of in usage.items():
        shared = of["SHARED"] + dynamic_shared(cuda_name(name))
        found[cuda_name(name)] = _figures(of, code[name], shared, arch, _threads(source) // 32)
    return found


def dynamic_shared(name: str) -> int:
    """Bytes that a launch adds to a kernel's shared memory; rows of Qwen2-VL's vocabulary."""
    if not name.startswith("kd_cluster_kernel"):
        return 0
    packs = -(-VOCABULARY * SIZES[name.split()[1]] // 16)  # kd_cluster_bytes of csrc/kd_loss.h
    return 2 * 16 * -(-packs // 8)


def cuda_name(symbol: str) -> str:
    """`rotary_kernel bf16 ×8 neighbours 1` for what the compiler mangled.

    Only what our templates are made of: a type, then a width, then a number or a bool.
    """
    pattern = r"_ZN6clinkd\d+([a-z]\w*?)I(f|\d+__half|\d+__nv_bfloat16)((?:L[bi]\d+E)*)E"
    found = re.match(pattern, symbol)
    if not found:
        return symbol
    dtype = "fp32" if found[2] == "f" else "fp16" if found[2].endswith("half") else "bf16"
    (_, width), *others = re.findall(r"L([bi])(\d+)E", found[3]) or [("i", "1")]
    labels = {"b": "neighbours", "i": "kind" if found[1].startswith("kd_") else "power"}
    return " ".join([found[1], dtype, f"×{width}", *(f"{labels[k]} {v}" for k, v in others)])


def _threads(source: str) -> int:
    """Of a block, read off the header, where a launch takes it from."""
    headers = {"rotary": "rotary_kernel", "kd_": "kd_loss_sums", "topk_kd": "topk_kd_kernel"}
    (header,) = (name for start, name in headers.items() if source.startswith(start))
    text = (ROOT / "csrc" / f"{header}.cuh").read_text()
    found = re.search(r"constexpr int k\w*Threads = (\d+);", text)
    assert found is not None, source
    return int(found[1])


def _figures(usage: dict[str, int], code: list[Any], shared: int, arch: int, warps: int) -> Figures:
    whole, main, loops = sass.mix(code), sass.main_loop(code), sass.loops(code)
    loop = main or sass.Mix(0, 0, {})
    exp2 = loop.special.get("EX2", 0)
    return Figures(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=sum(i.opcode.startswith(("LDL", "STL")) for i in code),
        shared=shared,
        occupancy=occupancy(arch, usage["REG"], shared, warps),
        mma=whole.mma,
        sine_cosine=whole.sine_cosine,
        special=sum(whole.special.values()),
        loop=loop.instructions,
        loop_mma=loop.mma,
        loop_exp2=exp2,
        loop_other=sum(loop.special.values()) - exp2,
        loops_sine_cosine=sum(sass.mix(each).sine_cosine for each in loops),
        loops_serial=sum(map(sass.is_serial, loops)),
    )
