"""A run that was killed goes on, with the same bytes."""

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest_generate import (
    SETTINGS,
    make_demo,
    make_records,
)

from clinkd.data.records import write_records
from clinkd.generate import answer_records
from clinkd.generate.journal import Journal
from clinkd.models import apply
from clinkd.rotary import PositionConfig


class Killed(Exception):
    pass


@pytest.mark.parametrize("tail", [b"", b'{"id": "r8", "tru', b"\xff\xfe{"])
def test_an_interrupted_run_gives_the_same_bytes(demo, processor, data, tail):
    root, records = data
    answer_records(demo, processor, records, root, root / "whole.jsonl", **SETTINGS)

    asked = []

    def stop(done, total, name):
        if done >= 9:
            raise Killed
        asked.append(done)

    with pytest.raises(Killed):
        answer_records(
            demo, processor, records, root, root / "cut.jsonl", **SETTINGS, progress=stop
        )
    assert not (root / "cut.jsonl").exists()
    with open(root / ".cut.jsonl.journal", "ab") as file:
        file.write(tail)
    again = []
    answer_records(
        demo, processor, records, root, root / "cut.jsonl", **SETTINGS,
        progress=lambda done, *_: again.append(done),
    )  # fmt: skip
    assert min(again) == 8  # the first block of 4 × 2 was not asked again
    assert (root / "cut.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes()


def test_a_journal_of_another_model_is_not_taken_up(demo, processor, data):
    root, records = data

    def stop(done, *_):
        if done >= 9:
            raise Killed

    other = make_demo(processor)
    with torch.no_grad():
        other.lm_head.weight.add_(0.5 * torch.randn_like(other.lm_head.weight))
    with pytest.raises(Killed):
        answer_records(other, processor, records, root, root / "a.jsonl", **SETTINGS, progress=stop)
    answer_records(demo, processor, records, root, root / "a.jsonl", **SETTINGS)
    answer_records(demo, processor, records, root, root / "b.jsonl", **SETTINGS)
    assert (root / "a.jsonl").read_bytes() == (root / "b.jsonl").read_bytes()


def other_positions(processor):
    return apply(make_demo(processor), PositionConfig("gap2")), processor


def other_images(processor):
    other = copy.deepcopy(processor)
    other.image_processor.size = {"shortest_edge": 784, "longest_edge": 3136}
    return make_demo(processor), other


def other_template(processor):
    other = copy.deepcopy(processor)
    other.chat_template = other.chat_template.replace("assistant", "helper")
    return make_demo(processor), other


@pytest.mark.parametrize("change", [other_positions, other_images, other_template])
def test_a_journal_of_other_inputs_is_not_taken_up(demo, processor, data, change):
    """The weights are the same, and what they are shown is not."""
    root, records = data

    def stop(done, *_):
        if done >= 9:
            raise Killed

    with pytest.raises(Killed):
        answer_records(
            *change(processor), records, root, root / "a.jsonl", **SETTINGS, progress=stop
        )
    answered = []
    answer_records(
        demo, processor, records, root, root / "a.jsonl", **SETTINGS,
        progress=lambda done, *_: answered.append(done),
    )  # fmt: skip
    assert answered[0] == 0


@pytest.mark.slow
def test_kill_nine_in_mid_run_loses_only_what_was_in_flight(data):
    root, records = data
    write_records(root / "records.jsonl", records)
    program = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        torch.set_num_threads(1)
        from conftest_generate import SETTINGS, make_demo, make_processor
        from clinkd.generate import answer_records
        from clinkd.data.records import read_records
        processor = make_processor()
        records = read_records({str(root / "records.jsonl")!r})
        answer_records(make_demo(processor), processor, records, {str(root)!r}, sys.argv[1],
            **SETTINGS, progress=lambda *_: time.sleep(0.15))
        """
    )

    def start(name):
        return subprocess.Popen([sys.executable, "-c", program, str(root / name)])

    assert start("whole.jsonl").wait(timeout=120) == 0
    victim = start("cut.jsonl")
    journal = root / ".cut.jsonl.journal"
    for _ in range(600):
        if journal.exists() and journal.read_bytes().count(b"\n") > 8:
            break
        time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert journal.exists()
    assert not (root / "cut.jsonl").exists()
    assert start("cut.jsonl").wait(timeout=120) == 0
    assert (root / "cut.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes()


def test_journal_keeps_whole_blocks_only(tmp_path):
    lines = [json.dumps({"id": name}) + "\n" for name in "abcde"]
    for written, kept in ((0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 5)):
        journal = Journal(tmp_path / "x", "head\n", "abcde", block=2)
        journal.append("".join(lines[:written]))
        assert Journal(tmp_path / "x", "head\n", "abcde", block=2).done == kept
        assert Journal(tmp_path / "x", "head\n", "abXde", block=2).done == min(kept, 2)
        assert Journal(tmp_path / "x", "other\n", "abcde", block=2).done == 0


def test_a_journal_does_not_outlive_an_edit_of_its_questions(
    tmp_path, processor, demo, monkeypatch
):
    records = make_records(tmp_path, 6)
    real, blocks = Journal.append, []

    def stop_after_one(self, lines):
        real(self, lines)
        blocks.append(lines)
        raise KeyboardInterrupt

    def answer(records):
        output = tmp_path / "out.jsonl"
        arguments = {"beams": 1, "samples": 1, "batch_size": 1, "max_new_tokens": 2}
        answer_records(demo, processor, records, tmp_path, output, **arguments)
        return [json.loads(line)["annotation"] for line in output.read_text().splitlines()]

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            answer(records)
    assert len(blocks) == 1
    edited = [record.answered("Other.") for record in records]
    assert answer(edited) == ["Other."] * 6
