"""Records of several turns: what is asked is what was learned, with all that stands before it."""

from dataclasses import replace

import pytest
import torch

from clinkd.data.collate import AnswerDataset
from clinkd.data.images import load_image
from clinkd.data.lengths import require_fit
from clinkd.data.records import Record, Turn, read_records, scan_lines
from clinkd.errors import DataError
from clinkd.generate import stream
from clinkd.generate.inputs import encode_request
from clinkd.models.demo import build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER

TWO = (
    Turn("human", "Which modality is this?"),
    Turn("gpt", "A CT scan."),
    Turn("human", "Is a femur broken?"),
    Turn("gpt", "No, none is."),
)
# as of models that think: what was thought of earlier answers is left out
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def sample():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:2]


@pytest.fixture(scope="module")
def processor(sample):
    texts = [turn.value for record in sample for turn in record.conversations]
    return build_processor([*texts, *(turn.value for turn in TWO)], 500, 3136, 56 * 56)


def marked(*texts):
    roles = ("human", "gpt") * len(texts)
    return tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))


@pytest.mark.parametrize(
    ("turns", "images", "extra"),
    [
        (TWO, 1, {}),
        (TWO, 2, {"system": "You are a radiologist."}),
        (marked("Where is the liver?<image>", "There."), 1, {}),
        (marked("Is <image> older than <image>?", "No."), 2, {}),
        (marked("See <image>.", "Yes.", "And <image>?", "No."), 2, {}),
        (marked("What does CT mean?", "Tomography."), 0, {"system": "Be brief."}),
    ],
)
def test_the_prompt_is_the_one_that_was_learned(sample, processor, turns, images, extra):
    names = tuple(record.images[0] for record in sample)[:images]
    record = replace(
        sample[0], images=names, conversations=turns, size=None, extra=sample[0].extra | extra
    )
    item = AnswerDataset([record], SAMPLE_FOLDER, processor, 512)[0]
    pictures = [load_image(SAMPLE_FOLDER, name) for name in names]
    request = stream._request("0", record, pictures, processor)

    class Model:  # what `encode_request` asks it
        device = "cpu"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clinkd.generate.inputs._check", lambda *_: None)
        asked = encode_request(request, Model, processor, 1)["input_ids"][0]
    answer = processor.tokenizer(f"{turns[-1].value}<|im_end|>\n").input_ids
    assert torch.equal(item["input_ids"], torch.cat([asked, torch.tensor(answer)]))
    text = processor.tokenizer.decode(asked)
    assert all(turn.value.split("<image>")[0].strip() in text for turn in turns[:-1])
    assert extra.get("system", "") in text


def test_the_question_is_that_of_the_answer(sample):
    record = replace(sample[0], conversations=TWO)
    assert (record.question, record.answer) == ("Is a femur broken?", "No, none is.")
    again = record.answered("One is.")
    assert [turn.value for turn in again.conversations] == [*(t.value for t in TWO[:3]), "One is."]


def test_a_template_that_writes_turns_anew(sample, processor):
    forgetful = replace_template(processor)
    one = replace(sample[0], conversations=TWO[:2])
    require_fit(AnswerDataset([one], SAMPLE_FOLDER, forgetful, 512))
    two = replace(sample[0], id="two", conversations=TWO)
    dataset = AnswerDataset([one, two], SAMPLE_FOLDER, forgetful, 512)
    for call in (lambda: require_fit(dataset), lambda: dataset[1]):
        with pytest.raises(DataError, match=r"record 'two': .*make one record of each question"):
            call()


def replace_template(processor):
    other = build_processor([turn.value for turn in TWO], 300, 3136, 56 * 56)
    other.chat_template = other.tokenizer.chat_template = FORGETFUL
    return other


def test_image_tokens_before_the_first_turn(sample, processor):
    record = replace(sample[0], extra={"system": "See <|image_pad|>."})
    with pytest.raises(DataError, match=r"its text holds '<\|image_pad\|>'"):
        require_fit(AnswerDataset([record], SAMPLE_FOLDER, processor, 512))


@pytest.mark.parametrize("tail", [b'{"b": 2}\n', b" x}\n", b"}\n"])
def test_two_objects_on_a_line(tmp_path, tail):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": 1}' + tail + b'{"a": 3}')
    (_, first), (_, second), (_, third) = scan_lines(tmp_path / "a.jsonl")
    assert (first, third) == ({"a": 1}, {"a": 3})
    assert isinstance(second, DataError)
    assert ": Extra data" in str(second)


def test_no_system_is_none():
    for value in (None, 5, " "):
        assert Record("a", (), "ct", "ROC", "g", TWO, extra={"system": value}).system is None
