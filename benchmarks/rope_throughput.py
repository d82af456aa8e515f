"""Speed of `rotary` and `rotary_attention` beside what people use now, on whatever machine.

    python -m benchmarks.rope_throughput [--lengths 256,1024] [--output folder]

Every result is checked before it is timed. Contenders run in turn, round after round, and the
median of the rounds counts, so that a busy machine slows all of them alike. Prints one JSON object
a line, then a table; with `--output` also writes rope_throughput.jsonl and rope_throughput.png.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clinkd.ops import rotary, rotary_attention
from clinkd.ops.reference.rotary import angles
from clinkd.ops.reference.rotary import rotary as reference_rotary
from clinkd.rotary import RotarySpec

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a file
from benchmarks.common import (
    Clock,
    Step,
    arguments,
    machine,
    peak_mib,
    save,
    time_in_turn,
    wall_clock,
)

SHAPES = {"Qwen2-VL-2B": (12, 2, 128), "Qwen2-VL-7B": (28, 4, 128)}  # query heads, key heads, D


def bytes_moved(tokens: int, heads: int, head_dim: int, element_size: int) -> int:
    """Least traffic of a rotation: the tensor in and out."""
    return 2 * tokens * heads * head_dim * element_size


def attention_flops(length: int, heads: int, head_dim: int, backward: bool) -> float:
    """Causal: 2 products forward and 5 backward, 2 operations each, over half of the square."""
    return (4 + 10 * backward) * heads * head_dim * length**2 / 2


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' models do it: [B, H, S, D] with tables [B, S, D]."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    found: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin)
    return found


def eager_tables(positions: Tensor, spec: RotarySpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = angles(positions, spec, torch.float32)
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([sin, sin], -1).to(dtype)


def time_all(contenders: dict[str, Step], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each.

    On CUDA each is captured into a graph whose replay is timed by events: what the device does,
    without what Python takes to launch it.
    """
    for step in contenders.values():  # compile, fill caches
        step()
        step()
    clocks = {
        name: graph_clock(step) if device.type == "cuda" else wall_clock(step, device)
        for name, step in contenders.items()
    }
    return time_in_turn(clocks, seconds, least=5, most=200)


def graph_clock(step: Step) -> Clock:
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    # larger than any second-level cache: written before each replay, so that none finds its input
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock() -> float:
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return clock


def check(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """A wrong result is not timed."""
    allowed = (1e-4 if dtype == torch.float32 else 4e-2) * max(1.0, expected.abs().max().item())
    error = (found.double() - expected.double()).abs().max().item()
    if not error <= allowed:
        raise SystemExit(f"{name}: off by {error:.3g}, allowed {allowed:.3g}; not timed")


def bench_rotary(
    length: int, shape: str, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Queries and keys of one layer, forward."""
    Hq, Hkv, D = SHAPES[shape]
    heads = Hq + Hkv
    spec = RotarySpec.mrope(D)
    x = torch.randn(1, length, heads, D, device=device).to(dtype)
    positions = torch.arange(length, device=device).float().expand(3, 1, -1).contiguous()
    heads_first = x.transpose(1, 2)
    cos, sin = eager_tables(positions, spec, dtype)
    turned = x.clone()  # what memory held could be numbers that take long

    def eager() -> Tensor:
        return eager_rotary(heads_first[:, :Hq], heads_first[:, Hq:], cos, sin)[0]

    compiled = torch.compile(eager_rotary)
    contenders: dict[str, Step] = {
        "clinkd": lambda: rotary(x, positions, spec),
        "clinkd in place": lambda: rotary(turned, positions, spec, inplace=True),
        "transformers eager": eager,
        "torch.compile": lambda: compiled(heads_first[:, :Hq], heads_first[:, Hq:], cos, sin)[0],
        "copy": lambda: x.clone(),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        contenders["Liger"] = lambda: liger_rotary_pos_emb(
            heads_first[:, :Hq].clone(), heads_first[:, Hq:].clone(), cos, sin
        )
    expected = reference_rotary(x.double(), positions, spec)
    check("clinkd", contenders["clinkd"](), expected, dtype)
    for name in ("transformers eager", "torch.compile"):
        check(name, contenders[name]().transpose(1, 2), expected[:, :, :Hq], dtype)
    times = time_all(contenders, device, seconds)
    moved = bytes_moved(length, heads, D, x.element_size())
    return [
        {
            "op": "rotary",
            "name": name,
            "ms": round(ms, 4),
            "gb_per_s": round(moved / ms / 1e6, 2),
            "share_of_copy": round(times["copy"] / ms, 3),
            "tokens_per_s": round(length / ms * 1e3),
            "peak_mib": peak_mib(contenders[name], device),
        }
        for name, ms in times.items()
    ]


def with_backend(forward: Callable[[], Tensor], backend: SDPBackend) -> Callable[[], Tensor]:
    """A forward in which torch's attention must take this backend."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return forward()

    return run


def bench_attention(
    length: int, shape: str, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """One layer's attention, forward and backward."""
    Hq, Hkv, D = SHAPES[shape]
    spec = RotarySpec.mrope(D)
    positions = torch.arange(length, device=device).float().expand(3, 1, -1).contiguous()
    cos, sin = eager_tables(positions, spec, dtype)
    leaves = [
        torch.randn(1, length, h, D, device=device).to(dtype).requires_grad_()
        for h in (Hq, Hkv, Hkv)
    ]
    q, k, v = leaves
    grad = torch.randn_like(q)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=Hq != Hkv)

    def eager() -> Tensor:
        a, b = eager_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return sdpa(a, b, v.transpose(1, 2)).transpose(1, 2)

    def separate() -> Tensor:
        a, b = rotary(q, positions, spec), rotary(k, positions, spec)
        return sdpa(a.transpose(1, 2), b.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    forwards: dict[str, Callable[[], Tensor]] = {
        "clinkd": lambda: rotary_attention(q, k, v, positions, spec),  # type: ignore[dict-item, return-value]
        "rotary + SDPA": separate,
        "eager rotary + SDPA": eager,
        "torch.compile of it": torch.compile(eager),
        "SDPA without rotary": lambda: sdpa(*(t.transpose(1, 2) for t in leaves)).transpose(1, 2),
    }
    still = RotarySpec.rope(D, rotary_dim=2)  # one pair: what turning all of them costs
    forwards["clinkd, one pair turned"] = lambda: rotary_attention(q, k, v, positions, still)  # type: ignore[assignment, return-value]
    if device.type == "cuda":  # which of torch's kernels SDPA takes depends on the card
        for name, backend in (
            ("FlashAttention-2", SDPBackend.FLASH_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            forwards[f"rotary + {name}"] = with_backend(separate, backend)
    expected = eager().detach()
    for name, forward in forwards.items():
        if name not in ("SDPA without rotary", "clinkd, one pair turned"):
            check(name, forward().detach(), expected, dtype)

    def both(forward: Callable[[], Tensor]) -> Step:
        return lambda: torch.autograd.grad(forward(), leaves, grad)

    contenders = {name: both(forward) for name, forward in forwards.items()}
    times = time_all(contenders, device, seconds)
    flops = attention_flops(length, Hq, D, backward=True)
    return [
        {
            "op": "rotary_attention",
            "name": name,
            "ms": round(ms, 4),
            "tflop_per_s": round(flops / ms / 1e9, 4),
            "share_without_rotary": round(times["SDPA without rotary"] / ms, 3),
            "tokens_per_s": round(length / ms * 1e3),
            "peak_mib": peak_mib(contenders[name], device),
        }
        for name, ms in times.items()
    ]


def main() -> None:
    parser = arguments(__doc__, seconds=4.0)
    cuda = torch.cuda.is_available()
    default = "512,1024,2048,4096,8192,16384,32768" if cuda else "256,512,1024,2048"
    parser.add_argument("--lengths", default=default, help="tokens, separated by commas")
    parser.add_argument(
        "--shape", default="Qwen2-VL-2B", choices=SHAPES, help="heads of this model"
    )
    parser.add_argument("--ops", default="rotary,attention", help="separated by commas")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    where = machine(device, dtype=args.dtype, shape=args.shape)
    benches = {"rotary": bench_rotary, "attention": bench_attention}
    rows = []
    for op in args.ops.split(","):
        for length in map(int, args.lengths.split(",")):
            for row in benches[op](length, args.shape, dtype, device, args.seconds):
                rows.append({"length": length, **row, **where})
                print(json.dumps(rows[-1]))
    sys.stdout.flush()
    print(f"\n{'op':18}{'tokens':>7}  {'who':22}{'ms':>10}{'x clinkd':>10}")
    for row in rows:
        ours = next(
            r["ms"]
            for r in rows
            if (r["op"], r["length"], r["name"]) == (row["op"], row["length"], "clinkd")
        )
        print(
            f"{row['op']:18}{row['length']:>7}  {row['name']:22}{row['ms']:>10.3f}"
            f"{row['ms'] / ours:>10.2f}"
        )
    if args.output:
        save(rows, args.output, "rope_throughput", "length", "tokens")


if __name__ == "__main__":
    main()
