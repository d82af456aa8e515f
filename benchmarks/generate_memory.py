"""Resident memory of answering, by the number of questions: it must not grow with them.

    python -m benchmarks.generate_memory --questions 100 1000 4000

Each number runs in a process of its own: a small random model answers questions about the shipped
images, predictions are written as they finish. Prints one JSON object a line.
"""

import argparse
import json
import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil


def measure(count: int, out: "multiprocessing.Queue[dict[str, float]]") -> None:
    """Answer `count` questions; resident MiB before, and the most seen while answering."""
    import torch

    from clinkd.config import DemoModelConfig
    from clinkd.data.records import read_records
    from clinkd.generate import answer_records
    from clinkd.models.demo import build_model, build_processor
    from clinkd.pipeline.paths import SAMPLE_FOLDER

    torch.set_num_threads(1)
    sample = read_records(SAMPLE_FOLDER / "train.jsonl")
    texts = [turn.value for record in sample for turn in record.conversations]
    processor = build_processor(texts, 500, 3136, 3136)
    size = DemoModelConfig(layers=1, width=32, vision_layers=1, vision_width=32, vocabulary=500)
    model = build_model(processor, size, seed=0)
    records = [replace(sample[i % len(sample)], id=str(i)) for i in range(count)]
    process = psutil.Process()
    seen: list[int] = []

    def watch(*_: object) -> None:
        seen.append(process.memory_info().rss)

    with tempfile.TemporaryDirectory() as folder:
        answer_records(model, processor, records, SAMPLE_FOLDER, Path(folder) / "answers.jsonl",
                       beams=3, samples=3, max_new_tokens=4, progress=watch)  # fmt: skip
    warm = len(seen) // 10  # the allocator's first blocks
    out.put({"first": max(seen[: warm + 1]) / 2**20, "most": max(seen) / 2**20})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--questions", type=int, nargs="+", default=[100, 1000, 4000], help="to answer, run by run"
    )
    context = multiprocessing.get_context("spawn")
    for count in parser.parse_args().questions:
        out = context.Queue()
        process = context.Process(target=measure, args=(count, out))
        process.start()
        found = out.get()
        process.join()
        row = {"questions": count, "first_tenth_mib": round(found["first"], 1)}
        print(json.dumps(row | {"most_mib": round(found["most"], 1)}), flush=True)


if __name__ == "__main__":
    main()
