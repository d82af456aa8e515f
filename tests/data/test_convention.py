"""Boxes on their way to a model and back: each family's own form, in pixels of what it sees."""

import copy
from dataclasses import replace

import pytest
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor

from clinkd.data import formats
from clinkd.data.checks import check_text
from clinkd.data.collate import IGNORE_INDEX, AnswerDataset
from clinkd.data.convention import convention_of, from_model, to_model
from clinkd.data.lengths import require_fit
from clinkd.data.records import Turn, read_records
from clinkd.errors import DataError
from clinkd.models.demo import build_processor
from clinkd.pipeline.paths import SAMPLE_FOLDER

BOX = "<|box_start|>(250,250),(500,500)<|box_end|>"
OURS = f"The <|object_ref_start|>liver<|object_ref_end|>{BOX}."


@pytest.fixture(scope="module")
def plain():
    return build_processor([OURS, "Where? {bbox_2d}"], 400, 28 * 28, 448 * 448)


@pytest.fixture
def of_family(plain):
    """The processor as one of another family."""

    def change(kind):
        other = copy.copy(plain)
        other.__class__ = kind
        return other

    return change


def test_families(plain, of_family):
    assert convention_of(plain) == "qwen2"
    assert convention_of(of_family(Qwen2_5_VLProcessor)) == "qwen2.5"
    assert convention_of(of_family(Qwen3VLProcessor)) == "qwen3"


def test_there_and_back(plain, of_family):
    assert to_model(OURS, plain, []) == from_model(OURS, plain, []) == OURS
    pixels, thousandths = of_family(Qwen2_5_VLProcessor), of_family(Qwen3VLProcessor)
    theirs = 'The {"bbox_2d": [112, 112, 224, 224], "label": "liver"}.'
    assert to_model(OURS, pixels, [(448, 448)]) == theirs
    assert to_model(OURS, pixels, [(896, 896)]) == theirs  # which it sees as 448 × 448
    assert from_model(theirs, pixels, [(896, 896)]) == OURS
    wide = to_model(OURS, thousandths, [])
    assert wide == 'The {"bbox_2d": [250, 250, 500, 500], "label": "liver"}.'
    assert from_model(wide, thousandths, []) == OURS
    assert from_model(f"```json\n[{theirs[4:-1]}]\n```", pixels, [(448, 448)]) == OURS[4:-1]


@pytest.mark.parametrize(
    ("box", "found"),
    [
        ("[112, 112, 460, 224]", "(250,250),(1027,500)"),  # past the edge
        ("[224, 112, 112, 224]", "(500,250),(250,500)"),  # reversed
        ("[112, 112, 112, 224]", "(250,250),(250,500)"),  # empty
    ],
)
def test_a_box_that_is_none_stays_one(of_family, box, found):
    answer = f'{{"bbox_2d": {box}, "label": "a\\x"}}'
    again = from_model(answer, of_family(Qwen2_5_VLProcessor), [(448, 448)])
    assert again == f"<|box_start|>{found}<|box_end|>"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('{"bbox_2d": [0, 0, 224, 224], "label": "T2 {axial}"}', "T2 {axial}"),
        ('See {"bbox_2d": [0, 0, 224, 224], "label": "a {b"} there.', "a {b"),
        ('[{"bbox_2d": [0, 0, 224, 224], "label": "\\ud83d"}]', ""),
        ('See {"bbox_2d": [0, 0, 224, 224], "label": "\\ud83d"}', ""),
    ],
)
def test_labels_of_every_kind(of_family, answer, found):
    again = from_model(answer, of_family(Qwen2_5_VLProcessor), [(448, 448)])
    again.encode()
    assert "<|box_start|>(0,0),(500,500)<|box_end|>" in again
    assert found in again
    assert ("object_ref" in again) == bool(found)


@pytest.mark.parametrize("number", ["9" * 400, "NaN", "Infinity", "1e400"])
def test_numbers_that_are_no_places(of_family, number):
    answer = f'[{{"bbox_2d": [{number}, 2, 30, 40]}}]'
    for kind in (Qwen2_5_VLProcessor, Qwen3VLProcessor):
        assert from_model(answer, of_family(kind), [(448, 448)]) == answer


def test_marks_without_bars(of_family):
    text = "At <box_start>(0,0),(500,500)<box_end>."
    pixels = of_family(Qwen2_5_VLProcessor)
    assert to_model(text, pixels, [(448, 448)]) == 'At {"bbox_2d": [0, 0, 224, 224]}.'


def test_pixels_of_which_image(of_family):
    pixels = of_family(Qwen2_5_VLProcessor)
    sizes = [(448, 448), (448, 224)]
    with pytest.raises(ValueError, match="boxes in pixels of 2 sizes"):
        to_model(OURS, pixels, sizes)
    answer = '{"bbox_2d": [1, 2, 3, 4]}'
    assert from_model(f"At {answer}.", pixels, sizes) == "At."
    assert to_model("No box.", pixels, sizes) == "No box."
    name = "Where is the <|object_ref_start|>liver<|object_ref_end|>?"
    assert to_model(name, pixels, sizes) == to_model(name, pixels, []) == "Where is the liver?"
    assert to_model(OURS, pixels, sizes[:1] * 2) == to_model(OURS, pixels, sizes[:1])


def test_what_is_learned(of_family):
    pixels = of_family(Qwen2_5_VLProcessor)
    record = read_records(SAMPLE_FOLDER / "train.jsonl")[0]
    record = replace(record, conversations=(Turn("human", "Where?"), Turn("gpt", BOX)), size=None)
    dataset = AnswerDataset([record], SAMPLE_FOLDER, pixels, 512)
    item = dataset[0]
    answer = pixels.tokenizer.decode(item["labels"][item["labels"] != IGNORE_INDEX])
    height, width = (14 * int(side) for side in item["image_grid_thw"][0, 1:])
    corners = [round(side / 4 * step) for step in (1, 2) for side in (width, height)]
    assert answer == f'{{"bbox_2d": {corners}}}<|im_end|>\n'
    two = replace(record, id="two", images=(*record.images, "img/none.png"))
    with pytest.raises(DataError):
        require_fit(AnswerDataset([two], SAMPLE_FOLDER, pixels, 512))


def test_through_pixels_and_back_boxes_are_exact(tmp_path):
    """There and back through pixels `data check` still finds nothing."""
    records = [r for r in read_records(SAMPLE_FOLDER / "train.jsonl") if r.boxes][:20]
    options = formats.Options(root=SAMPLE_FOLDER, boxes="qwen2.5")
    formats.write_file(tmp_path / "there.jsonl", records, "sharegpt", options)
    again = formats.read_file(tmp_path / "there.jsonl", "sharegpt", options)
    assert [check_text(record) for record in again] == [None] * 20
    for one, other in zip(records, again, strict=True):
        assert (one.boxes, one.question, one.answer) == (other.boxes, other.question, other.answer)
