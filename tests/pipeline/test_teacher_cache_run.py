"""A run that asks its teacher once: the same student, and `clinkd cache check`."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
CONFIG = """\
data: {train_limit: 12, test_limit: 4, teacher_fraction: 0.3}
model:
  positions: {preset: paper}
  max_pixels: 3136
  demo: {layers: 1, width: 64, vision_layers: 1, vision_width: 32, vocabulary: 500}
teacher: {epochs: 3, learning_rate: 5.0e-3, save_steps: 20}
distill: {epochs: 2, learning_rate: 5.0e-3, save_steps: 20, temperature: 2.0}
generate: {max_new_tokens: 4, scorer_steps: 1}
"""


def clinkd(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "clinkd", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_cache_in_bfloat16(tmp_path):
    config, run = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    losses = []
    for kind in ("none", "hidden"):
        done = clinkd("run", config, f"output={run}", f"distill.teacher_cache={kind}",
                      "model.dtype=bfloat16", "--to", "distill", "--update")  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["kd"] for row in rows if "kd" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_cached_teacher_makes_the_same_student(tmp_path):
    config, run = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    weights = {}
    for kind in ("none", "hidden", "top-k"):
        done = clinkd("run", config, f"output={run}", f"distill.teacher_cache={kind}", "--to",
                      "distill", "--update")  # fmt: skip
        assert done.returncode == 0, done.stderr
        weights[kind] = load_file(run / "student" / "distilled" / "model.safetensors")
    for name, tensor in weights["none"].items():
        assert (tensor - weights["hidden"][name]).abs().max() < 1e-4, name
    assert {p.name for p in (run / "teacher-cache").iterdir()} == {"hidden", "top-64-at-2"}

    checked = clinkd("cache", "check", run, "--records", 6, "--json")
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert found["kind"] == "top-k"
    assert found["missing"] == 0
    assert found["tokens"] > 6
    assert 0 < found["mass_least"] <= found["mass"] <= 1 + 1e-3
    assert found["kd_error_max"] >= found["kd_error_mean"] > 0
    assert 0 < found["kd_cached"] < found["kd_exact"]  # buckets cannot tell more than tokens
    assert 0 < found["gradient_error"] < 1

    shard = run / "teacher-cache" / "top-64-at-2" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    damaged = clinkd("cache", "check", run)
    assert damaged.returncode == 3
    assert "its checksum is wrong" in damaged.stderr
