"""Records as training batches: what is learnt, what is padded, the prompt of answering."""

import pytest
import torch

from clinkd.config import DemoModelConfig
from clinkd.data.collate import IGNORE_INDEX, AnswerDataset, collate
from clinkd.data.images import load_image
from clinkd.data.prompt import chat_messages, encode_prompt
from clinkd.data.records import Turn, read_records
from clinkd.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER


@pytest.fixture(scope="module")
def records():
    return read_records(SAMPLE_FOLDER / "train.jsonl")[:12]


@pytest.fixture(scope="module")
def processor(records):
    texts = [turn.value for record in records for turn in record.conversations]
    return build_processor(texts, 600, 3136, 112 * 112)


def test_labels_are_the_answer_and_its_end(records, processor):
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 512)
    for record, item in zip(records, dataset, strict=False):
        learnt = item["labels"][item["labels"] != IGNORE_INDEX]
        assert processor.tokenizer.decode(learnt) == f"{record.answer}<|im_end|>\n"
        assert (item["mm_token_type_ids"] == (item["input_ids"] == processor.image_token_id)).all()
        patches = int(item["image_grid_thw"].prod()) // 4
        assert int(item["mm_token_type_ids"].sum()) == patches


def test_the_prompt_is_the_one_of_answering(records, processor):
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 512)
    for index, record in enumerate(records[:4]):
        image = load_image(SAMPLE_FOLDER, record.images[0])
        prompt = encode_prompt(processor, [record.question], [image])
        ids = prompt["input_ids"][0]
        assert torch.equal(dataset[index]["input_ids"][: len(ids)], ids)
        assert torch.equal(dataset[index]["pixel_values"], prompt["pixel_values"])


def test_several_turns_learn_every_answer(records, processor):
    from dataclasses import replace

    record = replace(
        records[0],
        conversations=(*records[0].conversations, Turn("human", "Sure?"), Turn("gpt", "Yes.")),
    )
    item = AnswerDataset([record], SAMPLE_FOLDER, processor, 512)[0]
    learnt = processor.tokenizer.decode(item["labels"][item["labels"] != IGNORE_INDEX])
    assert learnt == f"{records[0].answer}<|im_end|>\nYes.<|im_end|>\n"


def test_padding_is_on_the_right_and_counts_for_nothing(records, processor):
    dataset = AnswerDataset(records, SAMPLE_FOLDER, processor, 512)
    items = [dataset[i] for i in range(5)]
    batch = collate(items, processor.tokenizer.pad_token_id)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].sum() == length
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert len(batch["pixel_values"]) == sum(len(item["pixel_values"]) for item in items)


def test_where_images_stand():
    assert chat_messages(["What?"], 2)[0]["content"][:2] == [{"type": "image"}] * 2
    content = chat_messages(["Is <image> like <image>?"], 2)[0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text", "image", "text"]
    with pytest.raises(ValueError, match="have 1 <image> marks for 2 images"):
        chat_messages(["<image> what?"], 2)


def test_tokenizer_round_trip_and_determinism(records):
    texts = [turn.value for record in records for turn in record.conversations]
    one, two = train_tokenizer(texts, 500), train_tokenizer(texts, 500)
    assert one.get_vocab() == two.get_vocab()
    assert len(one) <= 500
    for text in ("<|box_start|>(12,345),(6,7)<|box_end|>", "Müller: 3,5 µm – x?"):
        ids = one(text).input_ids
        assert one.decode(ids, skip_special_tokens=False) == text
    for token in SPECIAL_TOKENS:
        assert len(one(token).input_ids) == 1
    assert one.eos_token == "<|im_end|>"


def test_the_same_seed_the_same_weights(processor):
    size = DemoModelConfig(layers=1, width=64, vision_layers=1, vision_width=32)
    state = torch.get_rng_state()
    a, b, c = (build_model(processor, size, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    assert torch.equal(torch.get_rng_state(), state)
