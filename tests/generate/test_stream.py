"""Predictions are written as they finish, in order, and a run that was killed goes on."""

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor
from typer import Typer
from typer.testing import CliRunner

from clinkd.commands.ask import ask, draw_boxes
from clinkd.config import DemoModelConfig
from clinkd.data.formats_boxes import resized_size
from clinkd.data.images import load_image
from clinkd.data.prompt import encode_prompt
from clinkd.data.records import Record, Turn, write_records
from clinkd.errors import ConfigError, DataError
from clinkd.generate import BeamSearcher, answer_records, join_parts, stream
from clinkd.generate.journal import Journal
from clinkd.generate.results import Candidate, Result
from clinkd.models.demo import build_model, build_processor
from clinkd.train.checkpoint import save_model

QUESTIONS = ("Where is the liver?", "What is this?", "Describe the whole image, please.")


def make_records(root, count=11):
    generator = torch.Generator().manual_seed(0)
    records = []
    for index in range(count):
        pixels = torch.randint(0, 255, (40 + 8 * index, 60, 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / f"{index}.png")
        turns = (
            Turn("human", f"<image>\n{QUESTIONS[index % 3]}"),
            Turn("gpt", f"The liver. <|box_start|>({index},2),(30,40)<|box_end|>"),
        )
        boxes = ((index, 2, 30, 40),)
        records.append(Record(f"r{index}", (f"{index}.png",), "ct", "VG", "g", turns, boxes))
    return records


def make_processor():
    texts = [*QUESTIONS, "The liver. <|box_start|>(1,2),(30,40)<|box_end|>"] * 3
    return build_processor(texts, 400, 3136, 12544)


def make_demo(processor):
    size = DemoModelConfig(layers=2, width=64, vision_layers=1, vision_width=32, vocabulary=400)
    model = build_model(processor, size, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def demo(processor):
    return make_demo(processor)


@pytest.fixture
def data(tmp_path):
    return tmp_path, make_records(tmp_path)


class ColourScorer:
    """Stands in for CLIP: the share of a letter; NaN or an error where asked."""

    class backend:
        model = torch.nn.Linear(1, 1)

    def __init__(self, nan_on=None):
        self.nan_on = nan_on

    def parts(self, text):
        return [text]

    def score(self, image, texts):
        value = float("nan") if image.size == self.nan_on else 0.25
        return [value + 0.01 * len(text) for text in texts]


SETTINGS = dict(beams=2, samples=2, max_new_tokens=5, batch_size=2)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_same_file(demo, processor, data, world):
    root, records = data  # 11: two blocks
    answer_records(demo, processor, records, root, root / "one.jsonl", **SETTINGS)
    output = root / "parts.jsonl"
    for rank in reversed(range(world)):
        part = dict(rank=rank, world=world)
        answer_records(demo, processor, records, root, output, **SETTINGS, **part)
        assert not output.exists()
    join_parts(output, world)
    assert output.read_bytes() == (root / "one.jsonl").read_bytes()
    assert not list(root.glob(".*journal*"))


def test_lines_in_order_with_every_candidate(demo, processor, data):
    root, records = data
    seen = []
    answer_records(
        demo,
        processor,
        records,
        root,
        root / "out.jsonl",
        **SETTINGS,
        scorer=ColourScorer(),
        selection="clip",
        progress=lambda done, total, name: seen.append((done, total, name)),
    )
    rows = rows_of(root / "out.jsonl")
    assert [row["id"] for row in rows] == [record.id for record in records]
    for row, record in zip(rows, records, strict=True):
        assert row["error"] is None
        assert row["annotation"] == record.answer
        assert row["boxes"] == [list(box) for box in record.boxes]
        assert len(row["candidates"]) == 2
        assert row["response"] == row["candidates"][row["selected"]]["text"]
        cosines = [candidate["clip"] for candidate in row["candidates"]]
        assert cosines[row["selected"]] == max(cosines)
        assert row["candidates"][0]["score"] >= row["candidates"][1]["score"]
    assert seen[0] == (0, 11, "out")
    assert seen[-1] == (11, 11, "out")
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert not list(root.glob(".*"))  # the journal is gone


def test_answers_are_the_searchers(demo, processor, data):
    root, records = data
    answer_records(demo, processor, records[:3], root, root / "out.jsonl", **SETTINGS)
    with Image.open(root / "1.png") as image:
        request = {"id": "x", "image": image.convert("RGB"), "question": records[1].question}
        (alone,) = BeamSearcher(demo, processor, 2, 2, 5).generate([request])
    assert rows_of(root / "out.jsonl")[1]["response"] == alone.candidates[0].text


def test_no_more_than_a_block_is_held(demo, processor, tmp_path, monkeypatch):
    """Images and results of the questions answered before are gone, however many there are."""
    alive: list[weakref.ref] = []
    most = [0]

    def load(root, name):
        picture = load_image(root, name)
        alive[:] = [each for each in alive if each() is not None] + [weakref.ref(picture)]
        most[0] = max(most[0], len(alive))
        return picture

    monkeypatch.setattr(stream, "load_image", load)
    for count in (12, 36):
        most[0] = 0
        records = make_records(tmp_path, count)
        answer_records(demo, processor, records, tmp_path, tmp_path / f"{count}.jsonl",
                       beams=1, samples=1, max_new_tokens=1, batch_size=1)  # fmt: skip
        assert 4 <= most[0] <= 8  # the block at work, and at most the one before it
    assert len((tmp_path / "36.jsonl").read_text().splitlines()) == 36


def test_a_broken_image_fails_alone(demo, processor, data):
    root, records = data
    whole = (root / "4.png").read_bytes()
    (root / "4.png").write_bytes(whole[: len(whole) // 2])
    answer_records(demo, processor, records, root, root / "out.jsonl", **SETTINGS)
    rows = rows_of(root / "out.jsonl")
    assert "cannot be decoded" in rows[4]["error"]
    assert rows[4]["response"] == ""
    assert rows[4]["candidates"] == []
    assert all(row["error"] is None for index, row in enumerate(rows) if index != 4)


def test_a_scorer_that_yields_nan_fails_that_question(demo, processor, data):
    root, records = data
    scorer = ColourScorer(nan_on=(60, 56))  # of record 2
    answer_records(
        demo, processor, records, root, root / "out.jsonl", **SETTINGS, scorer=scorer,
        selection="clip",
    )  # fmt: skip
    rows = rows_of(root / "out.jsonl")
    assert "finite CLIP score" in rows[2]["error"]
    assert rows[2]["response"] == ""
    assert rows[2]["candidates"][0]["clip"] is None
    assert all(row["error"] is None for index, row in enumerate(rows) if index != 2)


def test_a_model_that_yields_nan_fails_with_its_reason(processor, data):
    root, records = data
    broken = make_demo(processor)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    answer_records(broken, processor, records[:2], root, root / "out.jsonl", **SETTINGS)
    assert all("not finite" in row["error"] for row in rows_of(root / "out.jsonl"))


def test_clip_needs_a_scorer(demo, processor, data):
    root, records = data
    with pytest.raises(ValueError, match="selection 'clip' needs a scorer"):
        answer_records(demo, processor, records, root, root / "o", selection="clip")


def test_questions_without_an_image_are_chosen_by_beam(demo, processor, tmp_path):
    turns = (Turn("human", "What?"), Turn("gpt", "That."))
    record = Record("t", (), "ct", "MIA", "g", turns)
    out = tmp_path / "out.jsonl"
    answer_records(
        demo, processor, [record], tmp_path, out, **SETTINGS, scorer=ColourScorer(),
        selection="clip",
    )  # fmt: skip
    (row,) = rows_of(out)
    assert (row["selection"], row["selected"], row["error"]) == ("beam", 0, None)
    assert row["image"] == []


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
        from test_stream import SETTINGS, answer_records, make_demo, make_processor
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


def test_stop_texts(demo, processor):
    request = {"id": "x", "question": "What is this?"}
    settings = dict(num_beams=1, num_samples=1, max_new_tokens=12, stop_ids=[])
    (free,) = BeamSearcher(demo, processor, **settings).generate([request])
    ids = free.candidates[0].token_ids
    texts = [processor.tokenizer.decode([token]) for token in ids]
    at = next(i for i, t in enumerate(texts) if processor.tokenizer.encode(t) == [ids[i]])
    searcher = BeamSearcher(demo, processor, **settings, stop_texts=[texts[at]])
    (stopped,) = searcher.generate([request])
    assert stopped.candidates[0].token_ids == ids[: ids.index(ids[at]) + 1]
    with pytest.raises(ValueError, match="stop_texts must be one token each"):
        BeamSearcher(demo, processor, stop_texts=["What is this?"])
    with pytest.raises(ValueError, match="stop_texts need a processor"):
        BeamSearcher(demo, None, stop_texts=["a"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_request_is_not_read(demo, processor, side):
    ids = encode_prompt(processor, ["What is this?"], [])["input_ids"][0]
    pad = torch.zeros(4, dtype=ids.dtype)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad])
    mask = torch.cat([pad, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pad])
    searcher = BeamSearcher(demo, None, 2, 2, 5)
    (plain,) = searcher.generate([{"id": "a", "input_ids": ids}])
    (other,) = searcher.generate([{"id": "b", "input_ids": padded, "attention_mask": mask}])
    assert plain.candidates == other.candidates


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, demo, processor):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, demo, processor)
    return folder


def invoke(*arguments):
    app = Typer()
    app.command()(ask)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_ask_prints_answer_and_boxes(model_folder, data, monkeypatch):
    root, _ = data
    text = "The liver. <|box_start|>(100,200),(300,400)<|box_end|>"
    monkeypatch.setattr("clinkd.generate.beam._decode", lambda *_: text)
    drawn = root / "drawn.png"
    done = invoke(
        root / "1.png", "Where is the liver?", "--model", model_folder, "--show", drawn,
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [text, "box: 100, 200, 300, 400", f"drawn: {drawn}"]
    with Image.open(drawn) as image:
        assert min(image.size) >= 256


def test_ask_lists_every_candidate(model_folder, data):
    root, _ = data
    done = invoke(
        root / "1.png", "What?", "--model", model_folder, "--all", "--beams", 2,
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert done.stdout.count("score -") == 2
    assert sum(line.startswith("* ") for line in done.stdout.splitlines()) == 1


def test_ask_refuses(model_folder, data):
    root, _ = data
    for arguments, error, message in (
        ((root / "none.png", "?", "--model", model_folder), DataError, "does not exist"),
        ((root / "1.png", "?", "--model", root), ConfigError, "cannot be loaded"),
        (
            (root / "1.png", "?", "--model", model_folder, "--show", "a.jpg"),
            ConfigError,
            "must name a .png file",
        ),
    ):
        done = invoke(*arguments)
        assert isinstance(done.exception, error)
        assert message in str(done.exception)


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (100, 50))
    drawn = draw_boxes(image, [(0, 0, 500, 1000)])
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert drawn.size == (500, 250)
    middle = drawn.width // 2
    assert drawn.getpixel((0, 100)) != (0, 0, 0)
    assert drawn.getpixel((middle - 1, 100)) != (0, 0, 0)
    assert drawn.getpixel((middle + 20, 100)) == (0, 0, 0)


def test_answers_come_back_with_boxes_as_records_have_them(tmp_path, processor, demo, monkeypatch):
    """A model that writes JSON and pixels is asked, and answers, in its own form."""
    records = make_records(tmp_path, 2)
    asked = []

    def generate(self, requests, progress=None):
        asked.extend(requests)
        width, height = resized_size(requests[0]["images"][0].size, 28, 3136, 12544)
        text = f'{{"bbox_2d": [0, 0, {width}, {height // 2}], "label": "liver"}}'
        return [Result(each["id"], [Candidate(text, [1], [-0.1], -0.1)]) for each in requests]

    theirs = copy.copy(processor)
    theirs.__class__ = Qwen2_5_VLProcessor
    monkeypatch.setattr(BeamSearcher, "generate", generate)
    question = Turn("human", "<image>\nWhat is in <|box_start|>(0,0),(500,1000)<|box_end|>?")
    record = replace(records[0], conversations=(question, records[0].conversations[1]))
    answer_records(demo, theirs, [record], tmp_path, tmp_path / "out.jsonl", beams=1, samples=1)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    name = "<|object_ref_start|>liver<|object_ref_end|>"
    assert row["response"] == f"{name}<|box_start|>(0,0),(1000,500)<|box_end|>"
    assert row["question"] == "What is in <|box_start|>(0,0),(500,1000)<|box_end|>?"
    assert asked[0]["question"].startswith('<image>\nWhat is in {"bbox_2d": [0, 0, ')
    assert asked[0]["history"] == []


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
