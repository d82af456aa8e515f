"""Records share rows: each whole, once, in rows that are nearly full, always the same."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.data.collate import AnswerDataset
from clinkd.data.lengths import require_fit
from clinkd.data.packing import pack_rows
from clinkd.data.records import Turn, read_records
from clinkd.errors import DataError
from clinkd.models.demo import build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER


@given(
    lengths=st.lists(st.integers(1, 300), max_size=3000),
    limit=st.integers(300, 900),
    seed=st.integers(0, 3),
)
def test_every_record_in_one_row_within_the_limit(lengths, limit, seed):
    rows = pack_rows(lengths, limit, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= limit for row in rows)
    assert rows == pack_rows(lengths, limit, seed)


def test_rows_are_nearly_full_and_drawn_by_the_seed():
    lengths = [40 + (37 * i) % 300 for i in range(5000)]
    rows = pack_rows(lengths, 1000, 0)
    assert sum(lengths) / (1000 * len(rows)) > 0.98
    assert rows != pack_rows(lengths, 1000, 1)
    with pytest.raises(ValueError, match="at most limit = 300, got 339"):
        pack_rows(lengths, 300, 0)


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:40]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, 600, 3136, 112 * 112)


def with_question(record, text):
    turns = (Turn("human", text), *record.conversations[1:])
    return dataclasses.replace(record, conversations=turns)


def test_lengths_are_known_without_the_images(records, processor):
    several = dataclasses.replace(
        records[0],
        images=(records[0].images[0], records[1].images[0]),
        conversations=(Turn("human", "One <image>?"), Turn("gpt", "Yes."),
                       Turn("human", "And <image>?"), Turn("gpt", "No.")),
    )  # fmt: skip
    unsized = dataclasses.replace(records[2], size=None)
    blind = dataclasses.replace(with_question(records[3], "What is it?"), images=())
    dataset = AnswerDataset([*records, several, unsized, blind], SAMPLE_FOLDER, processor, 512)
    for index in range(len(dataset)):
        assert dataset.length(dataset.records[index]) == len(dataset[index]["input_ids"])


@pytest.mark.parametrize("text", ["word " * 500, "ज़" * 400])
def test_a_record_that_does_not_fit_is_found_before_training(records, processor, text):
    long = with_question(records[7], text)
    dataset = AnswerDataset([*records[:7], long], SAMPLE_FOLDER, processor, 512)
    with pytest.raises(DataError, match=rf"record {long.id!r} has \d+ tokens, over max_length 512"):
        require_fit(dataset)
    require_fit(AnswerDataset(records, SAMPLE_FOLDER, processor, 512))


def test_most_records_are_cleared_unseen(records, processor, monkeypatch):
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 2048)
    monkeypatch.setattr(dataset, "length", None)
    require_fit(dataset)


def test_image_tokens_in_a_text_are_refused(records, processor):
    bad = with_question(records[1], "What is <|image_pad|> here?")
    dataset = AnswerDataset([records[0], bad], SAMPLE_FOLDER, processor, 512)
    match = rf"record {bad.id!r}: its text holds '<\|image_pad\|>'"
    with pytest.raises(DataError, match=match):
        require_fit(dataset)
    with pytest.raises(DataError, match=match):
        dataset[1]
