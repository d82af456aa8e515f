"""Two training processes against one: DDP, and DeepSpeed's three ways to cut the model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
CONFIG = """\
data: {train_limit: 40, test_limit: 4, teacher_fraction: 0.5}
model:
  positions: {preset: paper}
  max_pixels: 3136
  demo: {layers: 1, width: 64, vision_layers: 1, vision_width: 32, vocabulary: 500}
teacher: {epochs: 4, learning_rate: 2.0e-3, save_steps: 7, log_steps: 1, batch_size: 2}
distill:
  {epochs: 1, learning_rate: 2.0e-3, log_steps: 1, batch_size: 2, temperature: 2.0,
   teacher_cache: hidden}
generate: {max_new_tokens: 4, scorer_steps: 1}
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def start(config, run, *arguments):
    command = [sys.executable, "-m", "clinkd", "run", str(config), f"output={run}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def two(strategy):
    return ("--update", "parallel.processes=2", f"parallel.strategy={strategy}")


def losses(run, stage):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["ce"], row.get("kd", 0.0)) for row in rows if row["stage"] == stage]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process that collects the gradients of two micro-batches."""
    folder = tmp_path_factory.mktemp("processes")
    config = folder / "small.yaml"
    config.write_text(CONFIG)
    both = ("teacher.gradient_accumulation=2", "distill.gradient_accumulation=2")
    code, _, err = finish(start(config, folder / "one", *both, "--to", "prepare"))
    assert code == 0, err
    shutil.copytree(folder / "one", folder / "prepared")
    code, _, err = finish(start(config, folder / "one", *both, "--to", "distill"))
    assert code == 0, err
    assert len(losses(folder / "one", "teacher")) == 20
    return config, folder


def compare(run, other, stage, model):
    for a, b in zip(losses(run, stage), losses(other, stage), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    a, b = (load_file(folder / model / "model.safetensors") for folder in (run, other))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        # 20 steps of Adam at 2e-3: a weight whose gradient is rounding alone may go either way
        assert (tensor - b[name]).abs().mean() < 1e-5, name


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_twenty_steps_are_those_of_one_process(one, strategy):
    config, folder = one
    run = folder / strategy
    shutil.copytree(folder / "prepared", run)
    last = "distill" if strategy in ("ddp", "zero3") else "teacher"
    code, _, err = finish(start(config, run, *two(strategy), "--to", last))
    assert code == 0, err
    compare(run, folder / "one", "teacher", "teacher")
    assert not (run / "teacher" / "checkpoints").exists()
    if last == "distill":
        compare(run, folder / "one", "distill", "student/distilled")
    assert list((run / "tensorboard").rglob("events.*"))


def test_a_signal_stops_both_and_they_go_on(one, tmp_path):
    config, folder = one
    run = tmp_path / "run"
    shutil.copytree(folder / "prepared", run)
    arguments = (*two("zero2"), "--to", "teacher")
    process = start(config, run, *arguments)
    log = run / "metrics.jsonl"
    while not log.exists() or len(losses(run, "teacher")) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 75, err
    assert "all saved" in err
    stopped = len(losses(run, "teacher"))
    assert stopped < 20
    code, _, err = finish(start(config, run, *arguments))
    assert code == 0, err
    compare(run, folder / "one", "teacher", "teacher")


def test_a_process_that_fails_stops_the_others_with_its_reason(one, tmp_path):
    config, folder = one
    run = tmp_path / "run"
    shutil.copytree(folder / "prepared", run)
    arguments = (*two("ddp"), "teacher.max_length=20", "--to", "teacher")
    code, _, err = finish(start(config, run, *arguments))
    assert code == 3
    assert "over max_length 20: raise max_length" in err
