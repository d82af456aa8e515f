"""Predictions are written as they finish, in order, with every candidate."""

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch
from conftest_generate import (
    SETTINGS,
    ColourScorer,
    make_demo,
    make_records,
    rows_of,
)
from PIL import Image
from transformers import Qwen2_5_VLProcessor

from clinkd.data.formats_boxes import resized_size
from clinkd.data.images import load_image
from clinkd.data.prompt import encode_prompt
from clinkd.data.records import Record, Turn
from clinkd.generate import BeamSearcher, answer_records, images, join_parts
from clinkd.generate.results import Candidate, Result


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

    monkeypatch.setattr(images, "load_image", load)
    for count in (12, 36):
        most[0] = 0
        records = make_records(tmp_path, count)
        answer_records(demo, processor, records, tmp_path, tmp_path / f"{count}.jsonl",
                       beams=1, samples=1, max_new_tokens=1, batch_size=1)  # fmt: skip
        assert 4 <= most[0] <= 12  # the block at work, those before and after it at most
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


@pytest.mark.parametrize("history", ["hi", ["Which?"], [1, 2], {"a": "b"}])
def test_a_history_that_is_none_is_refused(demo, processor, history):
    request = {"id": "a", "question": "Sure?", "history": history}
    (result,) = BeamSearcher(demo, processor, 1, 1, 2).generate([request])
    assert "history must be a list of texts" in result.error
