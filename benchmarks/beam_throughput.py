"""Answers per second of BeamSearcher and of transformers' generate: same model, same prompts.

    python -m benchmarks.beam_throughput --prompt 600 --new 64

The model has random weights and no stop token, so that both sides make the same number of tokens;
that the tokens are the same is checked before anything is timed. Runs are interleaved and medians
printed, as one JSON object a line. Beside the wall clock stands the CPU time of the process, which
other work on the machine disturbs less.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from clinkd.generate import BeamSearcher
from clinkd.generate.cache import PrefixCache

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a file
from benchmarks.common import machine, parser_of

IMAGE, VOCABULARY, MERGED = 10, 4096, 16  # image token; 16 × 16 merged patches: 256 tokens


def build_model(layers: int, width: int) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL of random weights, key-value heads a quarter of the query heads."""
    heads = width // 64
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [8, 12, 12],
            },
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        ),
        vision_config=dict(depth=4, embed_dim=128, num_heads=4, hidden_size=width, mlp_ratio=4),
        image_token_id=IMAGE,
        video_token_id=11,
        vision_start_token_id=12,
        vision_end_token_id=13,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)  # distributions with a clear order
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make_requests(batch: int, prompt: int) -> list[dict[str, Any]]:
    """Prompts of `prompt` tokens down to 3/4 of it, each with one image."""
    generator = torch.Generator().manual_seed(0)
    requests = []
    for index in range(batch):
        length = prompt - index * prompt // (4 * batch)
        text = torch.randint(20, VOCABULARY, (length - MERGED**2,), generator=generator).tolist()
        requests.append(
            {
                "id": str(index),
                "input_ids": [*text[:10], *[IMAGE] * MERGED**2, *text[10:]],
                "pixel_values": torch.randn(4 * MERGED**2, 1176, generator=generator),
                "image_grid_thw": torch.tensor([[1, 2 * MERGED, 2 * MERGED]]),
            }
        )
    return requests


def by_transformers(
    model: Qwen2VLForConditionalGeneration, requests: list[dict[str, Any]], beams: int, new: int
) -> list[list[list[int]]]:
    """One left-padded batch through generate: tokens of every answer of every request."""
    longest = max(len(r["input_ids"]) for r in requests)
    ids = torch.tensor([[0] * (longest - len(r["input_ids"])) + r["input_ids"] for r in requests])
    inputs = {
        "input_ids": ids,
        "attention_mask": (
            torch.arange(longest)
            >= longest - torch.tensor([len(r["input_ids"]) for r in requests])[:, None]
        ).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([r["pixel_values"] for r in requests]),
        "image_grid_thw": torch.cat([r["image_grid_thw"] for r in requests]),
    }
    out = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=new,
        do_sample=False,
    )  # fmt: skip
    return out[:, longest:].reshape(len(requests), beams, -1).tolist()


def cache_bytes(model: Any, sequences: int, tokens: int) -> int:
    """Keys and values of so many sequences of so many tokens."""
    text = model.config.get_text_config()
    dim = text.hidden_size // text.num_attention_heads
    element = next(model.parameters()).element_size()
    return (
        2 * text.num_hidden_layers * text.num_key_value_heads * dim * element * sequences * tokens
    )


def step_bytes(model: Any, batch: int, prompt: int, beams: int, step: int) -> dict[str, int]:
    """Bytes that a decode step must read: weights once, prompts once, suffixes; and what it reads.

    By arithmetic from the attention's arguments, not counted. `read` adds what the searcher reads
    besides: the mask of visible places, once a layer and key-value head. Both take all prompts to
    be as long as the longest.
    """
    text = model.config.get_text_config()
    weights = sum(
        p.nbytes
        for n, p in model.named_parameters()
        if "visual" not in n and "embed_tokens" not in n
    )
    least = weights + cache_bytes(model, batch, prompt) + cache_bytes(model, batch, step * beams)
    mask = batch * beams * step * beams * text.num_hidden_layers * text.num_key_value_heads
    return {"least": least, "read": least + mask}


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()  # answers are on the host: no device is still at work
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompt", type=int, default=600, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--beams", type=int, default=3, help="beams of a question")
    parser.add_argument("--batch", type=int, default=8, help="questions at a time")
    parser.add_argument("--layers", type=int, default=8, help="of the model")
    parser.add_argument("--width", type=int, default=512, help="hidden size")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cuda or cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.layers, args.width).to(args.device)
    device = torch.device(args.device)
    requests = make_requests(args.batch, args.prompt)
    searcher = BeamSearcher(
        model, None, args.beams, args.beams, args.new, batch_size=args.batch, stop_ids=()
    )

    peak: list[PrefixCache] = []
    original = PrefixCache.__init__

    def remember(self: PrefixCache, *arguments: Any) -> None:
        original(self, *arguments)
        peak.append(self)

    PrefixCache.__init__ = remember  # type: ignore[method-assign]
    ours = searcher.generate(requests)  # also warms up
    PrefixCache.__init__ = original  # type: ignore[method-assign]
    theirs = by_transformers(model, requests, args.beams, args.new)
    if [[c.token_ids for c in r.candidates] for r in ours] != theirs:
        raise SystemExit("the answers differ from transformers'; not timed")

    sides: dict[str, Callable[[], Any]] = {
        "clinkd": lambda: searcher.generate(requests),
        "transformers": lambda: by_transformers(model, requests, args.beams, args.new),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, run in sides.items():
            times[name].append(timed(run))
    settings = {
        **machine(device, dtype="float32"),
        "transformers": transformers.__version__,
        **{k: v for k, v in vars(args).items() if k not in ("threads", "repeats", "device")},
    }
    median = {
        name: [statistics.median(t[i] for t in runs) for i in (0, 1)]
        for name, runs in times.items()
    }
    for name, (wall, cpu) in median.items():
        print(
            json.dumps(
                {
                    "impl": name,
                    "answers_per_s": round(args.batch / wall, 3),
                    "wall_s": round(wall, 3),
                    "cpu_s": round(cpu, 3),
                    **settings,
                }
            )
        )
    bytes_of = step_bytes(model, args.batch, args.prompt, args.beams, args.new)
    print(
        json.dumps(
            {
                "speedup_wall": round(median["transformers"][0] / median["clinkd"][0], 3),
                "speedup_cpu": round(median["transformers"][1] / median["clinkd"][1], 3),
                "prefix_cache_ratio": round(
                    peak[0].prefix_bytes / cache_bytes(model, args.batch * args.beams, args.prompt),
                    4,
                ),
                "whole_cache_ratio": round(
                    peak[0].nbytes
                    / cache_bytes(model, args.batch * args.beams, args.prompt + args.new),
                    4,
                ),
                "step_bytes_over_least": round(bytes_of["read"] / bytes_of["least"], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
