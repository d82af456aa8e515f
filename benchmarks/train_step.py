"""A distillation step beside what people write now: eager loss over all logits, stock attention.

    python -m benchmarks.train_step [--tokens 2048] [--layers 2] [--output folder]

A student and a teacher of Qwen2-VL-2B's shape, cut to a few layers: forward, loss and backward of
one row of text tokens; the optimiser's step, the same for both, is left out. With all tokens
labelled, and with every tenth. The losses are compared before anything is timed; contenders run in
turn and the median counts. Prints one JSON object a line, then a table; with `--output` also writes
train_step.jsonl and train_step.png.
"""

import copy
import json
import sys
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

    # the same weights under clinkd's positions (`mrope`: transformers' own) and loss
    ours, told = (
        models.apply(copy.deepcopy(m), PositionConfig("mrope")) for m in (student, teacher)
    )
    ask = LiveTeacher(told, VOCABULARY)

    def fused() -> Tensor:
        inputs = {**batch, "labels": labels}
        said = ask(inputs)
        with answer_forward(ours, VOCABULARY):
            return ours(**inputs, teacher=said, kd=SETTINGS).loss

    def step(model: Any, forward: Any) -> Step:
        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            loss = forward()
            loss.backward()
            return loss.detach()

        return run

    return {"clinkd": step(ours, fused), "plain": step(student, plain)}


def main() -> None:
    parser = arguments(__doc__, seconds=60.0)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    where = machine(device, dtype=args.dtype, tokens=args.tokens, layers=args.layers)
    student, teacher = (build(args.layers, seed).to(device, dtype) for seed in (0, 1))
    results: list[dict[str, Any]] = []
    for name, every in (("all labelled", 1), ("every tenth", 10)):
        contenders = steps(args, every, student, teacher)
        found, expected = (contenders[who]().float() for who in ("clinkd", "plain"))
        if not torch.isclose(found, expected, rtol=1e-4 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"{name}: loss {found} and {expected} differ; not timed")
        clocks = {who: wall_clock(step, device) for who, step in contenders.items()}
        times = time_in_turn(clocks, args.seconds, least=3, most=20)
        for who, ms in times.items():
            row = {"op": name, "labelled": 1 / every, "name": who, "ms": round(ms, 1)}
            row["x_clinkd"] = round(ms / times["clinkd"], 2)
            row["peak_mib"] = peak_mib(contenders[who], device)
            results.append({**row, **where})
            print(json.dumps(results[-1]), flush=True)
    print(f"\n{'labelled':14}{'who':10}{'ms':>11}{'x clinkd':>10}{'peak MiB':>11}")
    for r in results:
        print(
            f"{r['op']:14}{r['name']:10}{r['ms']:11.0f}{r['x_clinkd']:10.2f}{r['peak_mib']:11.0f}"
        )
    if args.output:
        save(results, args.output, "train_step", "labelled", "share of labelled tokens")


if __name__ == "__main__":
    main()
