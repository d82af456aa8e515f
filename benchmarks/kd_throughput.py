"""Time and memory of the distillation loss beside what people use now, on whatever machine.

    python -m benchmarks.kd_throughput [--rows 512,4096] [--temperature 2] [--clusters]
        [--output folder]

Forward and backward, V = 151,936. Every result is checked before it is timed; contenders run in
turn and the median counts. `kd_loss` takes logits, once more with the gradient in their place;
`linear_kd_loss` hidden states, with all rows labelled and with every tenth. With `--clusters`, on
sm_90, ours is there once more, reading the logits once (CLINKD_KD_CLUSTER=1). Prints one JSON
object a line, then a table; with `--output` also writes kd_throughput.jsonl and kd_throughput.png.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clinkd.ops import kd_loss, linear_kd_loss
from clinkd.ops._kd_at_once import SWITCH, why_no_clusters

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a file
from benchmarks.common import Step, arguments, machine, peak_mib, save, time_in_turn, wall_clock

VOCABULARY = 151_936


def eager(z: Tensor, t: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """As trainers write it: softmax of both in float32, `kl_div`, cross-entropy."""
    z, t = z.float(), t.float()
    counts = labels != -100
    ce = F.cross_entropy(z, labels, ignore_index=-100)
    rows = F.kl_div(
        F.log_softmax(z / temperature, dim=-1),
        F.log_softmax(t / temperature, dim=-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    kd = temperature**2 * (rows * counts).sum() / counts.sum()
    return (ce + 0.5 * kd) / 1.5


def check(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """A wrong result is not timed: relative error of the loss and of each gradient, as norms."""
    allowed = 1e-4 if found[-1].dtype == torch.float32 else 3e-2
    for a, e in zip(found, expected, strict=True):
        error = ((a.float() - e.float()).norm() / e.float().norm()).item()
        if not error <= allowed:
            raise SystemExit(f"{name}: off by {error:.3g}, allowed {allowed:.3g}; not timed")


def with_gradient(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Step:
    def step() -> tuple[Tensor, ...]:
        loss = forward()
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return step


def in_clusters(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same in one read of the logits."""

    def switched() -> Tensor:
        os.environ[SWITCH] = "1"
        try:
            return forward()
        finally:
            del os.environ[SWITCH]

    return switched


class Given(torch.autograd.Function):
    """Logits in memory of their own, of a graph as a model's are, without the time to make them."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, memory: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def of_logits(
    rows: int, temperature: float, dtype: torch.dtype, device: torch.device, clusters: bool
) -> tuple[dict[str, Step], dict[str, Step]]:
    """Contenders of `kd_loss`, and what must run before some of them, not timed."""
    z = torch.randn(rows, VOCABULARY, device=device).to(dtype).requires_grad_()
    t = torch.randn(rows, VOCABULARY, device=device).to(dtype)
    labels = torch.randint(0, VOCABULARY, (rows,), device=device)
    compiled = torch.compile(eager)
    forwards: dict[str, Callable[[], Tensor]] = {
        "clinkd": lambda: kd_loss(z, t, labels, temperature=temperature).loss,
        "eager": lambda: eager(z, t, labels, temperature),
        "torch.compile": lambda: compiled(z, t, labels, temperature),
    }
    if clusters:
        forwards["clinkd in clusters"] = in_clusters(forwards["clinkd"])
    steps = {name: with_gradient(forward, [z]) for name, forward in forwards.items()}
    written = z.detach().clone()

    def in_place() -> Tensor:
        logits = Given.apply(z, written)
        return kd_loss(logits, t, labels, temperature=temperature, inplace=True).loss

    steps["clinkd in place"] = with_gradient(in_place, [z])
    return steps, {"clinkd in place": lambda: written.copy_(z.detach())}


def of_hidden(
    rows: int,
    every: int,
    sizes: tuple[int, int],
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
    clusters: bool,
) -> dict[str, Step]:
    """Contenders of `linear_kd_loss`; one row in `every` is labelled."""
    hidden, teacher = (torch.randn(rows, C, device=device).to(dtype) for C in sizes)
    weight, head = ((torch.randn(VOCABULARY, C, device=device) * 0.03).to(dtype) for C in sizes)
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows,), device=device)
    labels[torch.arange(rows, device=device) % every != 0] = -100

    def plain(loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: loss(hidden @ weight.T, teacher @ head.T, labels, temperature)

    def ours(**more: Any) -> Callable[[], Tensor]:
        options = {"temperature": temperature, **more}
        return lambda: linear_kd_loss(hidden, weight, teacher, head, labels, **options).loss

    forwards = {
        "clinkd": ours(),
        "eager": plain(eager),
        "torch.compile": plain(torch.compile(eager)),
    }
    if device.type == "cuda":
        forwards["clinkd workspace=0"] = ours(workspace=0)
    if clusters:
        forwards["clinkd in clusters"] = in_clusters(forwards["clinkd"])
    leaves = [hidden, weight]
    return {name: with_gradient(forward, leaves) for name, forward in forwards.items()}


def liger_step(
    rows: int,
    sizes: tuple[int, int],
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Step:
    """Liger's chunked distillation loss (JSD of beta 0, its forward KL), CE beside it."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, teacher = (torch.randn(rows, C, device=device).to(dtype) for C in sizes)
    weight, head = ((torch.randn(VOCABULARY, C, device=device) * 0.03).to(dtype) for C in sizes)
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows,), device=device)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=2 / 3, weight_soft_loss=1 / 3, beta=0.0, temperature=temperature
    )

    def forward() -> Tensor:
        found = loss(hidden, weight, teacher, head, labels)
        return found[0] if isinstance(found, tuple) else found

    return with_gradient(forward, [hidden, weight])


def main() -> None:
    parser = arguments(__doc__, seconds=6.0)
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--rows", default="512,2048,8192" if cuda else "256,1024", help="separated by commas"
    )
    parser.add_argument("--temperature", type=float, default=2.0, help="of the softmax")
    parser.add_argument("--student", type=int, default=1536, help="hidden size of the student")
    parser.add_argument(
        "--teacher", type=int, default=3584 if cuda else 1536, help="hidden size of the teacher"
    )
    parser.add_argument(
        "--ops",
        default="logits,hidden,tenth",
        help="kd_loss; linear_kd_loss of all rows, of a tenth",
    )
    parser.add_argument("--clusters", action="store_true", help="clusters of sm_90 too")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.clusters:
        os.environ[SWITCH] = "1"
        if reason := why_no_clusters(device):
            raise SystemExit(f"--clusters: {reason}")
    os.environ.pop(SWITCH, None)  # on for that contender alone
    where = machine(device, dtype=args.dtype, temperature=args.temperature)
    sizes = (args.student, args.teacher)
    results: list[dict[str, Any]] = []
    if unknown := set(args.ops.split(",")) - {"logits", "hidden", "tenth"}:
        parser.error(f"--ops: {', '.join(sorted(unknown))} is none of logits, hidden, tenth")
    for op in args.ops.split(","):
        for rows in map(int, args.rows.split(",")):
            torch.manual_seed(0)
            before: dict[str, Step] = {}
            if op == "logits":
                steps, before = of_logits(rows, args.temperature, dtype, device, args.clusters)
            else:
                every = 10 if op == "tenth" else 1
                steps = of_hidden(
                    rows, every, sizes, args.temperature, dtype, device, args.clusters
                )
            expected = steps["eager"]()
            for name, step in steps.items():
                check(name, step(), expected)
            del expected
            if op == "hidden" and cuda and importlib.util.find_spec("liger_kernel"):
                steps["Liger"] = liger_step(rows, sizes, args.temperature, dtype, device)
                steps["Liger"]()
            clocks = {n: wall_clock(step, device, before.get(n)) for n, step in steps.items()}
            times = time_in_turn(clocks, args.seconds, least=3, most=50)
            for name, ms in times.items():
                row = {"op": op, "rows": rows, "name": name, "ms": round(ms, 3)}
                row["x_clinkd"] = round(ms / times["clinkd"], 2)
                before.get(name, lambda: None)()
                row["peak_mib"] = peak_mib(steps[name], device)
                results.append({**row, **where})
                print(json.dumps(results[-1]), flush=True)
            del steps
    print(f"\n{'op':10}{'rows':>7}  {'who':22}{'ms':>11}{'x clinkd':>10}{'peak MiB':>11}")
    for r in results:
        print(
            f"{r['op']:10}{r['rows']:>7}  {r['name']:22}{r['ms']:>11.2f}{r['x_clinkd']:>10.2f}"
            f"{r['peak_mib']:>11.0f}"
        )
    sys.stdout.flush()
    if args.output:
        save(results, args.output, "kd_throughput", "rows", "rows")


if __name__ == "__main__":
    main()
