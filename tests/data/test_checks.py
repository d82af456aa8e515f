"""Every planted fault is found, once, at its line; sound data has none."""

import json
import os

import pytest
from PIL import Image

from clinkd.data.checks import check_dataset, check_text, require_sound
from clinkd.data.records import read_records, record_from_json
from clinkd.errors import DataError

BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"


def row(identity, **changes):
    out = {
        "id": identity,
        "image": f"{identity}.png",
        "modality": "ct",
        "task": "VG",
        "group": f"group of {identity}",
        "conversations": [
            {"from": "human", "value": "Where is it?"},
            {"from": "gpt", "value": f"At {BOX}."},
        ],
        "boxes": [[100, 200, 300, 400]],
        "size": [16, 12],
    }
    return out | changes


def answer(text):
    return [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": text}]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, name in enumerate("abcdefgh"):
        image = Image.new("RGB", (16, 12), (index * 20, 0, 0))
        image.putpixel((3, 3), (0, 255, index))
        image.save(folder / f"{name}.png")
    return folder


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


@pytest.mark.parametrize("images", ["exists", "header", "decode"])
def test_sound_data(tmp_path, root, images):
    train = write(tmp_path / "train.jsonl", row("a"), row("b"))
    test = write(tmp_path / "test.jsonl", row("c"))
    assert check_dataset(train, test, root, images=images) == []
    assert check_dataset(train, None, root, images=images) == []
    require_sound(read_records(train), read_records(test), root)


ONE_RECORD = [
    (row("a", image="none.png"), "--root, or data.root of a config, says where images lie"),
    (row("a", image="../train.jsonl"), "lies outside the data root"),
    (row("a", image="/etc/passwd"), "lies outside the data root"),
    (row("a", image="link.png"), "lies outside the data root"),
    (row("a", image="cut.png"), "image 'cut.png' cannot be decoded (truncated?)"),
    (row("a", image="text.png"), "has no readable header"),
    (row("a", image="long.png", size=[402, 2]), "over 200 times as long"),
    (row("a", size=[12, 16]), "'size' is [12, 16], but image 'a.png' has [16, 12] pixels"),
    (row("a", task="vg"), "unknown task 'vg'"),
    (row("a", boxes=[[100, 200, 300, 1400]]), "lies outside the image"),
    (row("a", boxes=[[300, 200, 100, 400]]), "is reversed or empty"),
    (row("a", boxes=[[100, 200, 300, 401]]), "but the text holds [[100, 200, 300, 400]]"),
    (row("a", boxes=[]), "'boxes' is [], but the text holds"),
    (
        row("a", conversations=answer(BOX + BOX.replace("400", "500"))),
        "but the text holds [[100, 200, 300, 400], [100, 200, 300, 500]]",
    ),
    (
        row("a", conversations=answer(BOX.replace("300", "30"))),
        "the text holds a box that is reversed or empty: (100, 200, 30, 400)",
    ),
    (
        row("a", conversations=answer(BOX.replace("300", "3000"))),
        "the text holds a box outside the image (0…1000)",
    ),
    (row("a", conversations=answer("On the left.")), "answer of a VG record must hold a box"),
    (
        row("a", conversations=answer("<box>(100,200),(300,400)</box>")),
        "where records have <|box_start|>(x1,y1),(x2,y2)<|box_end|>: clinkd data convert IN OUT "
        "--from-boxes box",
    ),
    (
        row("a", conversations=answer('{"bbox_2d": [100, 200, 300, 400]}')),
        "--from-boxes qwen2.5, or qwen3",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), ONE_RECORD, ids=range(len(ONE_RECORD)))
def test_one_fault_at_its_line(tmp_path, root, wrong, message):
    (root / "link.png").symlink_to(tmp_path / "train.jsonl")
    whole = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) - 20])
    (root / "text.png").write_text("hello")
    Image.new("L", (402, 2)).save(root / "long.png")
    train = write(tmp_path / "train.jsonl", row("b"), wrong, row("c"))
    faults = check_dataset(train, None, root)
    assert [fault.place for fault in faults] == [f"{train}:2"]
    assert message in faults[0].message
    assert str(faults[0]) == f"{train}:2: {faults[0].message}"


def test_many_faults_one_for_each_record(tmp_path, root):
    wrong = row("d", image="none.png", boxes=[], size=[1, 1])
    train = write(tmp_path / "train.jsonl", row("a"), row("a"), wrong, row("e", task=None))
    train.write_text(train.read_text() + '{"id": "f", "ima')
    places = [fault.place for fault in check_dataset(train, None, root)]
    assert places == [f"{train}:{n}" for n in (2, 3, 4, 5)]


def test_bytes_behind_a_whole_png_are_no_fault(tmp_path, root):
    (root / "a.png").write_bytes((root / "a.png").read_bytes() + b"more")
    assert check_dataset(write(tmp_path / "t.jsonl", row("a")), None, root) == []


def test_damage_behind_the_header_needs_decoding(tmp_path, root):
    data = bytearray((root / "a.png").read_bytes())
    data[-20] ^= 0xFF
    (root / "a.png").write_bytes(data)
    train = write(tmp_path / "t.jsonl", row("a"))
    assert check_dataset(train, None, root, images="header") == []
    (fault,) = check_dataset(train, None, root, images="decode")
    assert "cannot be decoded" in fault.message


def test_leaks(tmp_path, root):
    train = write(tmp_path / "train.jsonl", row("a"), row("b", image="none.png"), row("c"))
    test = write(
        tmp_path / "test.jsonl",
        row("a", image="d.png"),
        row("e", group="group of b"),
        row("f", image="c.png"),
        row("g"),
    )
    faults = check_dataset(train, test, root)
    assert [fault.place for fault in faults] == [f"{train}:2", *(f"{test}:{n}" for n in (1, 2, 3))]
    for fault, what in zip(
        faults[1:], ("id 'a'", "group 'group of b'", "image 'c.png'"), strict=True
    ):
        assert f"its {what} stands in the training split too" in fault.message


def test_the_same_picture_under_another_name(tmp_path, root):
    os.link(root / "a.png", root / "x.png")
    train = write(tmp_path / "train.jsonl", row("a"))
    test = write(tmp_path / "test.jsonl", row("x"))
    assert check_dataset(train, test, root) == []
    (fault,) = check_dataset(train, test, root, images="decode")
    assert "image 'x.png' is the training split's 'a.png' under another name" in fault.message


def test_require_sound_counts_and_shows_some(root):
    wrong = [record_from_json(row(f"n{n}")) for n in range(8)]
    with pytest.raises(DataError) as caught:
        require_sound(wrong, [record_from_json(row("a"))], root)
    message = str(caught.value)
    assert message.startswith("8 records cannot be used: n0: image 'n0.png' does not exist")
    assert "… and 3 more" in message


def test_a_file_without_records(tmp_path, root):
    (fault,) = check_dataset(write(tmp_path / "empty.jsonl"), None, root)
    assert str(fault).endswith("empty.jsonl: holds no record")


@pytest.mark.parametrize("split", ["training", "test"])
def test_a_split_without_records(root, split):
    some = [record_from_json(row("a"))]
    with pytest.raises(DataError, match=f"the {split} split holds no record"):
        require_sound(*(([], some) if split == "training" else (some, [])), root)


def test_unknown_way_of_checking(root):
    with pytest.raises(ValueError, match="images must be one of exists, header, decode, got 'all'"):
        check_dataset([], [], root, images="all")


def test_boxes_without_marks_count_too():
    talk = [
        {"from": "human", "value": "What is at (100,200),(300,400)?"},
        {"from": "gpt", "value": "Liver"},
    ]
    assert check_text(record_from_json(row("a", task="ROC", conversations=talk))) is None
    other = record_from_json(row("a", task="ROC", conversations=talk, boxes=[[1, 2, 3, 4]]))
    assert "but the text holds [[100, 200, 300, 400]]" in (check_text(other) or "")
