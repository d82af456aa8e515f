"""A distillation step beside what people write now: eager loss over all logits, stock attention.

    python -m benchmarks.train_step [--tokens 2048] [--layers 2] [--output folder]

A student and a teacher of Qwen2-VL-2B's shape, cut to a few layers: forward, loss and backward of
one row of text tokens; the optimiser's step, the same for both, is left out. With all tokens
labelled, and with every tenth. The losses are compared before anything is timed, memory is counted
in that first step; contenders run in turn and the median counts. Prints one JSON object a line,
then a table; with `--output` also writes train_step.jsonl and train_step.png.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from clinkd import models
from clinkd.config import DistillConfig
from clinkd.rotary import PositionConfig
from clinkd.train.loss import answer_forward
from clinkd.train.teachers import LiveTeacher

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a file
from benchmarks.common import Step, arguments, machine, peak_mib, save, time_in_turn, wall_clock
from benchmarks.kd_throughput import eager

VOCABULARY = 151_936
SETTINGS = DistillConfig(temperature=2.0)


def build(layers: int, seed: int) -> Any:
    """Qwen2-VL-2B's language model with fewer layers; its vision tower is as small as can be."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 1, "hidden_size": 1536}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


@contextmanager
def positions(*found: Any) -> Iterator[None]:
    """Both contenders share weights; while open they have our ops (`mrope`: the same positions)."""
    for model in found:
        models.apply(model, PositionConfig("mrope"))
    yield
    for model in found:
        models.restore(model)


def steps(args: Any, every: int, student: Any, teacher: Any) -> dict[str, Step]:
    """A step of each contender; gives the loss."""
    device = torch.device(args.device)
    ids = torch.randint(0, VOCABULARY, (1, args.tokens), device=device)
    labels = ids.clone()
    labels[:, torch.arange(args.tokens, device=device) % every != 0] = -100
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.zeros_like(ids, dtype=torch.int32),
    }

    def plain() -> Tensor:
        with torch.no_grad():
            t = teacher(**batch, use_cache=False).logits[0, :-1]
        z = student(**batch, use_cache=False).logits[0, :-1]
        return eager(z, t, labels[0, 1:], SETTINGS.temperature)

    ask = LiveTeacher(teacher, VOCABULARY)

    def fused() -> Tensor:
        inputs = {**batch, "labels": labels}
        with positions(student, teacher), answer_forward(student, VOCABULARY):
            return student(**inputs, teacher=ask(inputs), kd=SETTINGS).loss

    def step(forward: Any) -> Step:
        def run() -> Tensor:
            student.zero_grad(set_to_none=True)
            loss = forward()
            loss.backward()
            return loss.detach()

        return run

    return {"clinkd": step(fused), "plain": step(plain)}


def main() -> None:
    parser = arguments(__doc__, seconds=60.0)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--layers", type=int, default=2, help="of each model")
    parser.add_argument(
        "--every", type=int, nargs="+", default=[1, 10], help="label every such token"
    )
    parser.add_argument("--rounds", type=int, default=3, help="least rounds of timing")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    where = machine(device, dtype=args.dtype, tokens=args.tokens, layers=args.layers)
    student, teacher = (build(args.layers, seed).to(device, dtype) for seed in (0, 1))
    results: list[dict[str, Any]] = []
    for every in args.every:
        contenders = steps(args, every, student, teacher)
        losses: dict[str, Tensor] = {}
        for step in contenders.values():  # what a first step alone takes
            step()
        peaks = {}
        for who, step in contenders.items():
            student.zero_grad(set_to_none=True)  # else the step frees the last one's gradients
            peaks[who] = peak_mib(keep(step, losses, who), device)
        found, expected = (losses[who].float() for who in ("clinkd", "plain"))
        if not torch.isclose(found, expected, rtol=1e-4 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"1 of {every}: loss {found} and {expected} differ; not timed")
        clocks = {who: wall_clock(step, device) for who, step in contenders.items()}
        times = time_in_turn(clocks, args.seconds, least=args.rounds, most=20)
        for who, ms in times.items():
            row = {"op": "train step", "labelled": 1 / every, "name": who, "ms": round(ms, 1)}
            row["x_clinkd"] = round(ms / times["clinkd"], 2)
            row["peak_mib"] = peaks[who]
            results.append({**row, **where})
            print(json.dumps(results[-1]), flush=True)
    print(f"\n{'labelled':>9}  {'who':10}{'ms':>11}{'x clinkd':>10}{'peak MiB':>11}")
    for r in results:
        print(
            f"{r['labelled']:9.0%}  {r['name']:10}{r['ms']:11.0f}{r['x_clinkd']:10.2f}"
            f"{r['peak_mib']:11.0f}"
        )
    if args.output:
        save(results, args.output, "train_step", "labelled", "share of labelled tokens")


def keep(step: Step, losses: dict[str, Tensor], who: str) -> Step:
    """The step, whose loss is kept."""

    def run() -> None:
        losses[who] = step()

    return run


if __name__ == "__main__":
    main()
