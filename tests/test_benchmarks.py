"""The benchmarks of the ops run, and check their contenders, before anybody waits for them."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kd_throughput, rope_throughput

NAMES = sorted(path.stem for path in Path(kd_throughput.__file__).parent.glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Rows that a benchmark prints, by op and name; the compiler is left out."""
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def start(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--seconds", "0"])
        module.main()
        lines = capsys.readouterr().out.splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        assert all(row["ms"] > 0 for row in rows)
        return {(row["op"], row["name"]) for row in rows}

    return start


def test_losses(run, monkeypatch):
    monkeypatch.setattr(kd_throughput, "VOCABULARY", 300)
    found = run(kd_throughput, "--rows", "12", "--student", "8", "--teacher", "8")
    assert ("logits", "clinkd in place") in found
    for op in ("logits", "hidden", "tenth"):
        assert {(op, name) for name in ("clinkd", "eager", "torch.compile")} <= found


def test_rotary(run):
    found = run(rope_throughput, "--lengths", "24")
    assert {("rotary", name) for name in ("clinkd", "clinkd in place", "copy")} <= found
    assert {("rotary_attention", name) for name in ("clinkd", "SDPA without rotary")} <= found


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")
