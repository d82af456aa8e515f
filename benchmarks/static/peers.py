"""What others ship for the same purposes: their Triton kernels, compiled as ours are.

Only what is installed (the extra `bench`), without a GPU too; with their launchers' constants and
warps, at the shapes of Qwen2-VL-2B. Nothing of theirs is run.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.static.cases import Case, cases
from benchmarks.static.compiling import Figures, compile_cuda, compile_triton
from benchmarks.static.traffic import DIM, HEADS, KV_HEADS, VOCABULARY

Build = Callable[[int], Case]  # from an architecture
# by purpose, how the names of our kernels begin
OURS = {
    "rotary": ("rotary_kernel bf16 ×8",),
    "attention, forward": ("rotary_attention forward bf16 head_dim 128",),
    "distillation loss": ("kd_statistics_kernel bf16 ×8 kind 1", "kd_gradient_kernel bf16 ×8"),
}


def _liger_mrope(_: int) -> Case:
    module = importlib.import_module("liger_kernel.ops.qwen2vl_mrope")
    power = 1 << (HEADS - 1).bit_length()
    constants = dict(bs=1, n_qh=HEADS, n_kh=KV_HEADS, hd=DIM, pad_n_qh=power, pad_n_kh=KV_HEADS,
                     pad_hd=DIM, mrope_section_t=16, mrope_section_h=24, BLOCK_SIZE=power,
                     BACKWARD_PASS=False)  # fmt: skip
    kinds = dict.fromkeys(("q_ptr", "k_ptr", "cos", "sin"), "*bf16")
    return _case("Liger M-RoPE", module._triton_qwen2vl_mrope, constants, kinds)


def _flash_rotary(_: int) -> Case:
    module = _beside("flash_attn", "ops/triton/rotary.py")
    constants = dict(CU_SEQLENS=None, SEQLEN_OFFSETS=0, ROTARY_DIM=DIM, BLOCK_H=2, BLOCK_M=8,
                     stride_out_headdim=1, stride_x_headdim=1)  # fmt: skip
    off = ("IS_SEQLEN_OFFSETS_TENSOR", "IS_VARLEN", "INTERLEAVED", "CONJUGATE")
    kinds = dict.fromkeys(("OUT", "X", "COS", "SIN"), "*bf16")
    return _case("flash-attn Triton rotary", module.rotary_kernel,
                 constants | dict.fromkeys(off, False), kinds)  # fmt: skip


def _fla_attention(arch: int) -> Case:
    module = importlib.import_module("fla.ops.attn.parallel")
    hopper = arch == 90  # its launcher asks for the shared memory that an sm_90 has
    constants = dict(g_cumsum=None, sink_bias=None, cu_seqlens=None, chunk_indices=None, W=None,
                     B=1, H=KV_HEADS, HQ=HEADS, G=HEADS // KV_HEADS, K=DIM, V=DIM, BT=128,
                     BS=64 if hopper else 32, BK=DIM, BV=DIM if arch < 120 else 64)  # fmt: skip
    off = ("USE_G", "USE_SINK_BIAS", "USE_WINDOW", "IS_VARLEN")
    kinds = dict.fromkeys("qkvo", "*bf16") | {"lse": "*fp32", "scale": "fp32"}
    warps = 8 if hopper else 4 if arch < 120 else 2
    return _case("fla attention, no rotation", module.parallel_attn_fwd_kernel,
                 constants | dict.fromkeys(off, False), kinds, warps)  # fmt: skip


def _liger_jsd(_: int) -> Case:
    module = importlib.import_module("liger_kernel.ops.backends._triton.jsd")
    block = module._JSD_TRITON_BLOCK_SIZE
    constants = dict(beta=0.5, ignore_index=-100, BLOCK_SIZE=block, HAS_LABEL=True)
    kinds = dict.fromkeys(("X_ptr", "Y_ptr", "loss_ptr", "dX_ptr"), "*fp32")
    kernel = module._jsd_kernel
    return _case(
        "Liger JSD (of fused linear JSD)", kernel, constants, kinds | {"label_ptr": "*i64"}
    )


def _fla_kl(_: int) -> Case:
    module = importlib.import_module("fla.modules.fused_kl_div.ops")
    block = min(module.MAX_FUSED_SIZE, 1 << (VOCABULARY - 1).bit_length())
    constants = dict(s_loss=1, reduction="batchmean", N=8192, V=VOCABULARY, BV=block)
    kinds = dict.fromkeys(("logits", "target_logits"), "*bf16") | {"loss": "*fp32"}
    warps = module.STATIC_WARPS
    return _case("fla fused KL", module.kl_div_kernel, constants, kinds, warps)


# by purpose, the package that has a kernel, and its case
PEERS: dict[str, tuple[tuple[str, Build], ...]] = {
    "rotary": (("liger_kernel", _liger_mrope), ("flash_attn", _flash_rotary)),
    "attention, forward": (("fla", _fla_attention),),
    "distillation loss": (("liger_kernel", _liger_jsd), ("fla", _fla_kl)),
}


def _case(
    name: str, kernel: Any, constants: dict[str, Any], kinds: dict[str, str], warps: int = 4
) -> Case:
    """Other arguments are integers: strides multiples of 16, as they are at these shapes."""
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "values"):
        kernel = kernel.fn  # below its heuristics
    types = {
        n: kinds.get(n) or ("i32:16" if "stride" in n or n.startswith("s_") else "i32")
        for n in kernel.arg_names
        if n not in constants
    }
    return Case(name, kernel, constants, types, warps, 3)


def _beside(package: str, path: str) -> Any:
    """A file of a package that cannot be imported where its CUDA extension is not built."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / path
    found = importlib.util.spec_from_file_location(file.stem + "_of_" + package, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _ours(purpose: str, arch: int, with_cuda: bool) -> Iterator[tuple[str, Figures]]:
    for case in cases(arch):
        if case.name in OURS[purpose]:
            yield case.name, compile_triton(case, arch)
    source = {"rotary": "rotary.cu", "distillation loss": "kd_loss.cu"}.get(purpose)
    if source and with_cuda:
        for name, figures in compile_cuda(source, arch).items():
            if name.startswith(OURS[purpose]):
                yield name, figures


def report(archs: tuple[int, ...], with_cuda: bool, columns: dict[str, str]) -> list[str]:
    """Print ours and theirs side by side; where ours spill and none of theirs do."""
    wrong = []
    for purpose, others in PEERS.items():
        print(f"\n{purpose:46} arch " + " ".join(f"{head:>8}" for head in columns.values()))
        for arch in archs:
            ours = list(_ours(purpose, arch, with_cuda))
            theirs = []
            for package, build in others:
                if importlib.util.find_spec(package) is None:
                    print(f"  {package}: not installed")
                    continue
                case = build(arch)
                theirs.append((case.name, compile_triton(case, arch)))
            for name, figures in ours + theirs:
                numbers = " ".join(f"{getattr(figures, column):8}" for column in columns)
                print(f"{name:46} {arch:4} {numbers}", flush=True)
            least = min((figures.stack for _, figures in theirs), default=None)
            wrong += [
                f"{name} sm_{arch}: stack {figures.stack}, a peer {least}"
                for name, figures in ours
                if least is not None and figures.stack > least
            ]
    return wrong
