"""Answers per second of BeamSearcher and of vLLM's beam search, on a GPU where vLLM is installed.

    python -m benchmarks.beam_vllm MODEL --batch 8 --new 64

MODEL is a folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint. Both sides answer
the same questions about the shipped images, in bfloat16, with no stop token, so that they make the
same number of tokens; lines say how many best answers are the same (bfloat16 rounds differently in
the two). Runs are interleaved and medians printed, one JSON object a line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder or hub name of a checkpoint")
    parser.add_argument("--batch", type=int, default=8, help="questions at a time")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--beams", type=int, default=3, help="beams of a question")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--memory", type=float, default=0.4, help="share of the GPU for vLLM")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.beam_vllm needs a GPU: vLLM's beam search is not for this CPU")
    if find_spec("vllm") is None:
        raise SystemExit("benchmarks.beam_vllm needs vLLM: pip install vllm")
    from transformers import AutoProcessor
    from vllm import LLM
    from vllm.sampling_params import BeamSearchParams

    from clinkd import models
    from clinkd.data.images import load_image
    from clinkd.data.prompt import chat_messages
    from clinkd.data.records import read_records
    from clinkd.generate import BeamSearcher
    from clinkd.pipeline.paths import SAMPLE_FOLDER

    processor = AutoProcessor.from_pretrained(args.model)
    model = models.load(args.model, dtype=torch.bfloat16).cuda()
    if (positions := models.positions_of(model.config)) and positions.preset != "mrope":
        raise SystemExit(f"vLLM cannot run a model with {positions.preset} positions: give another")
    searcher = BeamSearcher(
        model, processor, args.beams, args.beams, args.new, batch_size=args.batch, stop_ids=()
    )
    engine = LLM(model=args.model, dtype="bfloat16", gpu_memory_utilization=args.memory)
    params = BeamSearchParams(beam_width=args.beams, max_tokens=args.new, ignore_eos=True)

    records = [r for r in read_records(SAMPLE_FOLDER / "test.jsonl") if len(r.images) == 1]
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for record in records[: args.batch]:
        image = load_image(SAMPLE_FOLDER, record.images[0])
        ours.append({"id": record.id, "image": image, "question": record.question})
        prompt = processor.apply_chat_template(
            chat_messages([record.question], 1), tokenize=False, add_generation_prompt=True
        )
        theirs.append({"prompt": prompt, "multi_modal_data": {"image": image}})

    sides: dict[str, Callable[[], list[Any]]] = {
        "clinkd": lambda: searcher.generate(ours),
        "vllm": lambda: engine.beam_search(theirs, params),
    }
    best = [result.candidates[0].token_ids for result in sides["clinkd"]()]
    peer = [output.sequences[0].tokens[-args.new :] for output in sides["vllm"]()]
    same = sum(a == list(b) for a, b in zip(best, peer, strict=True))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, run in sides.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    settings = vars(args) | {
        "device": torch.cuda.get_device_name(),
        "same_best": f"{same}/{len(best)}",
    }
    for name, seconds in times.items():
        rate = round(args.batch / statistics.median(seconds), 3)
        print(json.dumps({"impl": name, "answers_per_s": rate, **settings}))


if __name__ == "__main__":
    main()
