"""A small finished run, made up, with drawn images: what the report's tests look at."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

MODALITIES = ("ct", "mr", "xray", "ultrasound", "fundus", "microscopy")
TASKS = ("VG", "ROC", "RC", "MIA")
METRICS = {"VG": "Recall@0.5", "ROC": "Accuracy", "RC": "mBMR", "MIA": "SPICE"}
ORGANS = ("liver", "left kidney", "spleen", "heart", "optic disc", "nucleus")
BOX = (300, 200, 700, 600)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw(path: Path, index: int, size: tuple[int, int]) -> None:
    """A dark picture with some bright shapes, one of them inside BOX."""
    image = Image.new("RGB", size, (12 + 3 * index, 16, 22))
    pen = ImageDraw.Draw(image)
    width, height = size
    pen.ellipse((width * 0.08, height * 0.05, width * 0.93, height * 0.94), fill=(62, 60, 66))
    x1, y1, x2, y2 = (c * side / 1000 for c, side in zip(BOX, (*size, *size), strict=True))
    pen.ellipse((x1, y1, x2, y2), fill=(150 + 8 * index, 120, 110))
    for step in range(5):
        x = width * (0.2 + 0.13 * step)
        pen.ellipse((x, height * 0.72, x + 14, height * 0.72 + 14), fill=(200, 190, 180))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def box_text(box: tuple[int, int, int, int]) -> str:
    x1, y1, x2, y2 = box
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def answers(task: str, organ: str, right: bool) -> tuple[str, str, str]:
    """Question, truth, and an answer that is right or wrong."""
    near, far = (310, 210, 705, 590), (20, 640, 220, 900)
    if task == "VG":
        return f"Where is the {organ}?", box_text(BOX), box_text(near if right else far)
    if task == "ROC":
        question = f"What is inside {box_text(BOX)}?"
        return question, organ, organ if right else "urinary bladder"
    if task == "RC":
        truth = (
            f"The {organ} in the upper half of the image, large and brighter than its surroundings."
        )
        wrong = "A small dark lesion near the lower right border."
        return f"Describe {box_text(BOX)}.", truth, truth if right else wrong
    truth = f"An axial slice of the abdomen with the {organ}, the spine and the aorta."
    return "Describe this image.", truth, truth if right else "A frontal radiograph of the chest."


def prediction(index: int, task: str, modality: str, right: bool) -> dict[str, Any]:
    organ = ORGANS[index % len(ORGANS)]
    question, truth, answer = answers(task, organ, right)
    other = answers(task, organ, not right)[2]
    candidates = [
        {"text": other, "score": -0.21, "clip": 0.221},
        {"text": answer, "score": -0.34, "clip": 0.305},
        {"text": answers("RC", "spine", True)[1] if task != "VG" else box_text((100, 80, 420, 380)),
         "score": -0.88, "clip": 0.184},
    ]  # fmt: skip
    return {
        "id": f"{modality}_{task.lower()}_{index:03d}",
        "image": f"images/{modality}.png",
        "modality": modality,
        "task": task,
        "group": f"{modality}-{index}",
        "question": question,
        "annotation": truth,
        "response": answer,
        "boxes": [list(BOX)] if task != "MIA" else [],
        "selection": "clip",
        "selected": 1,
        "candidates": candidates,
        "error": None,
    }


def model(label: str, level: float) -> dict[str, Any]:
    """Scores around `level`, a little different for each task and modality."""
    tasks = {}
    for offset, task in enumerate(TASKS):
        score = level + 3.1 * offset
        parts = {
            name: {"score": min(100.0, max(0.0, score + 4 * (i % 3) - 4)), "n": 12 + 9 * i}
            for i, name in enumerate(MODALITIES)
        }
        tasks[task] = {
            "metric": METRICS[task],
            "score": score,
            "n": 207,
            "ci95": [max(0.0, score - 3.4), score + 3.9],
            "modalities": parts,
            "extras": {"mean_iou": 0.413, "parse_rate": 0.987} if task == "VG" else {"bleu4": 0.31},
        }
    return {"label": label, "tasks": tasks, "average": level + 4.65}


def metrics() -> dict[str, Any]:
    baselines = {"mean_box": model("Mean box", 37.7), "most_frequent": model("Most frequent", 30.0)}
    baselines["mean_box"]["tasks"] = {"VG": baselines["mean_box"]["tasks"]["VG"]}
    baselines["mean_box"]["average"] = None
    return {
        "protocol": "clinkd",
        "settings": {"meteor": "meteor_py", "differences": ["One rule differs from another."]},
        "selection": {task: {"first_beam": 40.0, "chosen": 42.5, "oracle": 61.0} for task in TASKS},
        "models": {
            "base": model("Base (random start)", 1.5),
            "teacher": model("Teacher (11.1 % of the records)", 34.2),
            "distilled": model("Distilled student", 52.0),
            "corrected": model("Corrected student", 55.1),
            "sasg": model("Corrected + CLIP selection", 55.9),
        },
        "baselines": baselines,
        "verdicts": [
            "The final model beats its own base on every task.",
            "On VG it does not beat the mean box of the same structure.",
        ],
    }


def training_log() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, steps in (("clip", 30), ("teacher", 12), ("distill", 60), ("correct-1", 25)):
        for step in range(1, steps + 1):
            ce = 0.4 + 6.2 * math.exp(-3 * step / steps) + 0.07 * math.sin(2.7 * step)
            row = {"stage": stage, "step": 10 * step, "epoch": 2 * step / steps, "loss": ce}
            if stage == "distill":
                kd = 0.3 + 3.1 * math.exp(-4 * step / steps)
                row |= {"ce": ce, "kd": kd, "loss": (ce + 0.5 * kd) / 1.5}
            rows.append(row)
    return rows


def corrections(round_: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(30 - 8 * round_):
        organ = ORGANS[index % len(ORGANS)]
        status = ("accepted", "accepted", "truth", "kept", "skipped")[index % 5]
        rows.append(
            {
                "id": f"ct_rc_{round_}{index:03d}",
                "task": TASKS[index % 4],
                "question": f"Describe {box_text(BOX)}.",
                "image": f"images/{MODALITIES[index % 6]}.png",
                "before": f"The {organ} on the right, small and dark.",
                "truth": f"The {organ} on the left, large and bright.",
                "after": f"The {organ} on the left, large and dark."
                if status == "accepted"
                else "",
                "similarity": 0.61,
                "iou": 0.12 if index % 4 == 0 else None,
                "reason": "side and size disagree with the truth",
                "status": status,
                "why": "all facts agree" if status == "accepted" else "the side is still wrong",
            }
        )
    return rows


def book() -> dict[str, Any]:
    took = {"prepare": 41.2, "teacher": 33.0, "pseudo-label": 12.4, "distill": 190.3,
            "correct": 121.8, "generate": 44.0, "evaluate": 6.7}  # fmt: skip
    stages = {
        name: {
            "status": "done",
            "fingerprint": "ab12",
            "started": "2026-01-02T03:04:05+00:00",
            "seconds": seconds,
            "peak_mib": 900 + int(seconds * 3),
            "summary": f"what {name} did",
        }
        for name, seconds in took.items()
    }
    return {
        "clinkd": "1.0.0",
        "versions": {"python": "3.11.9", "torch": "2.14.1", "transformers": "5.23.0"},
        "machine": {"system": "Linux x86_64", "cores": 2, "memory_gib": 8},
        "seed": 7,
        "data": "sample",
        "stages": stages,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[], Path]:
    """Writes the run below a temporary folder and returns its folder; images lie in `data`."""

    def make() -> Path:
        root, run = tmp_path / "data", tmp_path / "run"
        sizes = ((256, 256), (320, 240), (200, 300), (400, 260), (300, 300), (256, 192))
        for index, (modality, size) in enumerate(zip(MODALITIES, sizes, strict=True)):
            draw(root / "images" / f"{modality}.png", index, size)
        rows = [
            prediction(index, task, modality, right=(index + index // 6 + turn) % 2 == 0)
            for turn, task in enumerate(TASKS)
            for index, modality in enumerate(MODALITIES * 3)
        ]
        config = {
            "output": "run",
            "seed": 7,
            "data": {"train": str(root / "train.jsonl"), "root": str(root)},
            "model": {"student": "demo", "positions": {"preset": "paper", "pos_scale": [2.0, 2.0]}},
            "distill": {"kd_weight": 0.5, "epochs": 2, "learning_rate": 2e-5, "deepspeed": None},
            "generate": {"num_beams": 3, "selection": "clip"},
        }
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        write(run / "run.json", book())
        write(run / "metrics.json", metrics())
        write_lines(run / "metrics.jsonl", training_log())
        write_lines(run / "predictions.jsonl", rows)
        for round_ in (1, 2):
            path = run / "correction" / f"round-{round_}" / "corrections.jsonl"
            write_lines(path, corrections(round_))
        return run

    return make


@pytest.fixture
def run(make_run: Callable[[], Path]) -> Path:
    return make_run()
