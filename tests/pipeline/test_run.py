"""A whole run in small: complete, skipped when done, the same bytes after being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clinkd.config import load
from clinkd.errors import DataError, SetupError
from clinkd.pipeline import stages
from clinkd.pipeline.folder import RunFolder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
CONFIG = """\
data: {train_limit: 24, test_limit: 8, teacher_fraction: 0.3}
model:
  positions: {preset: paper}
  max_pixels: 3136
  demo: {layers: 1, width: 64, vision_layers: 1, vision_width: 32, vocabulary: 500}
teacher: {epochs: 3, learning_rate: 5.0e-3, save_steps: 2, log_steps: 1}
distill: {epochs: 3, learning_rate: 5.0e-3, save_steps: 3, log_steps: 1, pseudo_labels: both}
correct: {epochs: 1, learning_rate: 1.0e-3, save_steps: 3, log_steps: 1, similarity: token_f1}
generate: {max_new_tokens: 12, batch_size: 4, scorer_steps: 2}
evaluate: {bootstrap: 20, meteor: python}
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def start(config, output, *extra):
    command = [sys.executable, "-m", "clinkd", "run", str(config), f"output={output}", *extra]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=pipe, stderr=pipe)


def finish(config, output, *extra):
    process = start(config, output, *extra)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = finish(config, folder)
    assert code == 0, err
    return folder, out


def test_the_run_folder_is_complete(whole):
    folder, out = whole
    for name in (
        "config.yaml", "run.json", "data/train.jsonl", "data/test.jsonl", "data/teacher.jsonl",
        "teacher/model.safetensors", "pseudo/labels.jsonl", "student/base/config.json",
        "student/distilled/config.json", "correction/round-1/data.jsonl",
        "correction/round-2/corrections.jsonl", "student/round-2/model.safetensors",
        "predictions.jsonl", "predictions/base.jsonl", "predictions/teacher.jsonl",
        "predictions/distilled.jsonl", "metrics.json", "metrics.jsonl", "report.html",
    ):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert not [p for p in folder.rglob("*") if p.suffix == ".tmp" or "checkpoint" in p.name]
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert len(stages) == 8
    assert all(s["status"] == "done" and s["peak_mib"] > 0 for s in stages.values())
    assert out.count("✓") == 8
    assert "report:" in out


def test_predictions_hold_every_candidate_and_no_time(whole):
    rows = [json.loads(line) for line in (whole[0] / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert len(row["candidates"]) == 3
        assert row["response"] == row["candidates"][row["selected"]]["text"]
        assert all(c["clip"] is not None for c in row["candidates"])
        assert not {"time", "seconds", "date"} & set(row)


def test_a_second_run_does_nothing(config, whole):
    before = (whole[0] / "predictions.jsonl").stat().st_mtime_ns
    code, out, _ = finish(config, whole[0])
    assert code == 0
    assert out.count("unchanged") == 8
    assert (whole[0] / "predictions.jsonl").stat().st_mtime_ns == before


def test_a_changed_setting_redoes_what_it_concerns(config, whole):
    code, _, err = finish(config, whole[0], "generate.length_penalty=2")
    assert code == 2
    assert "different: generate.length_penalty" in err
    code, out, err = finish(config, whole[0], "evaluate.protocol=strict")
    assert code == 0, err
    assert out.count("unchanged") == 6
    assert json.loads((whole[0] / "metrics.json").read_text())["protocol"] == "strict"


def test_killed_again_and_again_gives_the_same_bytes(config, whole, tmp_path):
    folder = tmp_path / "run"
    for delay in (8, 12, 16):
        process = start(config, folder)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, err = finish(config, folder)
    assert code == 0, err
    assert not [p for p in folder.rglob(".*") if p.name not in (".lock",)]
    for name in ("predictions.jsonl", "predictions/base.jsonl", "predictions/distilled.jsonl"):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name


def test_sigterm_saves_and_exits_with_75(config, tmp_path):
    folder = tmp_path / "run"
    process = start(config, folder, "teacher.epochs=400")
    log = folder / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and '"teacher"' not in (log.read_text() if log.exists() else ""):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert list((folder / "teacher" / "checkpoints").glob("checkpoint-*"))


def test_a_stage_before_its_time_names_the_one_to_run(config, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "clinkd", "distill", str(config), f"output={tmp_path / 'r'}"],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "stage 'prepare' is not done" in process.stderr
    assert "Traceback" not in process.stderr


def prepare(config, run, *overrides):
    with RunFolder.open(load(config, [f"output={run}", *overrides])) as folder:
        stages.prepare(folder, lambda *_: None)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_a_record_too_long_for_a_later_stage_is_named_before_any_training(config, tmp_path):
    with pytest.raises(DataError, match=r"record '\S+' has \d+ tokens, over max_length 20"):
        prepare(config, tmp_path / "run", "correct.max_length=20")


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_a_model_is_named(config, tmp_path):
    with pytest.raises(SetupError, match=rf"{tmp_path}: no processor can be read \("):
        prepare(config, tmp_path / "run", f"model.student={tmp_path}")
