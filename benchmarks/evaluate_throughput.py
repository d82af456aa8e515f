"""Time and memory of scoring 30,000 predictions under every metric that needs no Java.

    python benchmarks/evaluate_throughput.py [--rows 30000]

The rows are the sample's records, repeated; one word in five of the answer is exchanged, so that
texts differ. BLEU, ROUGE-L and METEOR-py run on MIA, scene-graph F1 on RC, CIDEr on both.
"""

import argparse
import json
import random
import resource
import time
from importlib.resources import files
from pathlib import Path

from clinkd.data.boxes import format_boxes
from clinkd.data.records import TASKS, read_records
from clinkd.evaluate.protocols import protocol
from clinkd.evaluate.score import score_model
from clinkd.evaluate.text import score


def rows(count: int) -> list[dict]:
    """Rows of the four tasks in equal number."""
    chance = random.Random(0)
    records = read_records(Path(str(files("clinkd"))) / "data" / "sample" / "train.jsonl")
    by_task = {task: [r for r in records if r.task == task] for task in TASKS}
    words = sorted({word for record in records for word in record.answer.split()})
    out = []
    for i in range(count):
        record = by_task[TASKS[i % 4]][(i // 4) % len(by_task[TASKS[i % 4]])]
        said = [chance.choice(words) if chance.random() < 0.2 else w for w in record.answer.split()]
        shifted = [[c + chance.randint(-60, 60) for c in box] for box in record.boxes]
        answer = format_boxes(shifted) if record.task == "VG" else " ".join(said)
        out.append(
            {
                "id": str(i),
                "task": record.task,
                "modality": record.modality,
                "group": record.group,
                "annotation": record.answer,
                "response": answer,
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=30_000, help="answers to evaluate")
    predictions = rows(parser.parse_args().rows)
    start, start_cpu = time.perf_counter(), time.process_time()
    for name in ("clinkd", "strict"):
        before = time.perf_counter()
        score_model(predictions, protocol(name), label="x", meteor="meteor_py", bootstrap=1000)
        print(f"{name}: {time.perf_counter() - before:.1f} s")
        if name == "clinkd":
            before = time.perf_counter()
            texts = [row for row in predictions if row["task"] in ("RC", "MIA")]
            score([r["response"] for r in texts], [[r["annotation"]] for r in texts], ["cider"])
            print(f"CIDEr: {time.perf_counter() - before:.1f} s")
            once, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": round(once, 1), "cpu_seconds": round(cpu, 1), "mib": round(peak_mib)}
    print(json.dumps({"rows": len(predictions), **found}))


if __name__ == "__main__":
    main()
