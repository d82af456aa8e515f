"""From a run's configuration to the first batch of its first two training stages.

    python -m benchmarks.start_training [--records 270000] [--images 60000]

Writes a data set of so many records about small pictures into a temporary folder, then does in a
fresh process what `clinkd run` does before the teacher's and the student's first step: hashing,
reading and checking the data, drawing the teacher's share, writing the run's files, checking that
all records fit, encoding a batch. Left out is what does not grow with the data: importing torch and
transformers, loading models. Prints seconds by part, and host memory before and at its peak: all,
and without the pages of libraries' files, which processes share and the system can take back.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a file
MODALITIES = ("ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound")
TASKS = ("VG", "ROC", "RC", "MIA")


def write_data(folder: Path, records: int, images: int) -> None:
    """Records of Med-GRIT's kind: train.jsonl, test.jsonl and their pictures."""
    (folder / "images").mkdir()
    Image.new("L", (512, 384)).save(folder / "images" / "0.png")
    whole = (folder / "images" / "0.png").read_bytes()
    names = []
    for number in range(images):
        names.append(f"images/{number}.png")
        (folder / names[-1]).write_bytes(whole)
    for split, places in (("train", range(records)), ("test", range(records, records + 100))):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for n in places:
                file.write(json.dumps(_record(n, names, split == "test")) + "\n")


def _record(n: int, names: list[str], held_out: bool) -> dict[str, object]:
    x, y = n % 700, n * 7 % 700
    box = f"<|box_start|>({x},{y}),({x + 200},{y + 250})<|box_end|>"
    answer = f"The <|object_ref_start|>liver<|object_ref_end|>{box} is {n % 9} cm wide and smooth."
    image = n % (len(names) - 1) + 1
    return {
        "id": f"{MODALITIES[n % 8]}_{n:06d}",
        "image": names[0] if held_out else names[image],
        "modality": MODALITIES[n % 8],
        "task": TASKS[n // 8 % 4],
        "group": "test" if held_out else f"case-{image // 10}",
        "conversations": [
            {"from": "human", "value": f"Where in this picture is finding number {n}, please?"},
            {"from": "gpt", "value": answer},
        ],
        "boxes": [[x, y, x + 200, y + 250]],
        "size": [512, 384],
    }


def resident_mib(key: str) -> int:
    """VmRSS, VmHWM or RssFile; not ru_maxrss, which a child inherits."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024 if found else 0


def start(folder: Path) -> None:
    """The work itself."""
    from transformers import logging

    from clinkd.config import DemoModelConfig, check
    from clinkd.data.collate import AnswerDataset, collate
    from clinkd.data.files import sha256_file
    from clinkd.data.lengths import require_fit
    from clinkd.data.records import read_records
    from clinkd.models.demo import build_model, build_processor
    from clinkd.pipeline import stages
    from clinkd.pipeline.folder import RunFolder
    from clinkd.pipeline.steps import stage_records
    from clinkd.train.checkpoint import save_model
    from clinkd.train.sampler import BucketSampler

    logging.disable_progress_bar()
    size = DemoModelConfig(layers=1, width=32, vision_layers=1, vision_width=32, vocabulary=500)
    some = read_records(folder / "test.jsonl")
    processor = build_processor(
        [turn.value for record in some for turn in record.conversations], 500, 3136, 200_704
    )
    save_model(folder / "model", build_model(processor, size, 0), processor)
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    config = check(
        {
            "output": str(folder / "run"),
            "data": {**data, "root": str(folder)},
            "model": {"student": str(folder / "model")},
            "generate": {"selection": "beam", "scorer": "none"},
        }
    )
    before, begin = resident_mib("VmRSS"), time.perf_counter()

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        at = time.perf_counter()
        yield
        print(f"{name:34}{time.perf_counter() - at:7.2f} s", flush=True)

    with RunFolder.open(config) as run:
        with timed("hash of the files"):
            for path in data.values():
                sha256_file(path)
        with timed("prepare: read, check, draw, write"):
            stages.prepare(run, lambda *_: None)
        for stage in ("teacher", "distill"):
            with timed(f"{stage}: read"):
                records = stage_records(run, stage)
            with timed(f"{stage}: all records fit"):
                dataset = AnswerDataset(records, folder, processor, 2048)
                require_fit(dataset)
            with timed(f"{stage}: order, first batch"):
                lengths = [len(r.question) + len(r.answer) for r in records]
                places = iter(BucketSampler(lengths, 4, 0))
                collate([dataset[next(places)] for _ in range(4)], 0)
            print(f"{'':34}{time.perf_counter() - begin:7.2f} s since the start")
    # no peak of the private part is kept; the files' part only grows
    peak, libraries = resident_mib("VmHWM"), resident_mib("RssFile")
    print(f"memory: {before} MiB before, at most {peak} MiB, {peak - libraries} of them private")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--records", type=int, default=270_000, help="to prepare")
    parser.add_argument("--images", type=int, default=60_000, help="they are of")
    parser.add_argument("--only-start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_start:
        start(args.only_start)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.records, args.images)
        command = [sys.executable, __file__, "--only-start", folder]
        raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
