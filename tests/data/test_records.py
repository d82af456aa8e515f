"""Records: every wrong line is named, and what is right comes back as it was."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.records import (
    MAX_LINE_BYTES,
    TASKS,
    Record,
    Turn,
    read_records,
    record_from_json,
    scan_records,
    write_records,
)
from clinkd.errors import DataError

settings.register_profile("clinkd-data", deadline=None)
settings.load_profile("clinkd-data")


def row(identity="ct_1", **changes):
    out = {
        "id": identity,
        "image": "a.png",
        "modality": "ct",
        "task": "VG",
        "group": "p1",
        "conversations": [
            {"from": "human", "value": "<image>\nWhere is the liver?"},
            {"from": "gpt", "value": "At <|box_start|>(1,2),(3,4)<|box_end|>."},
        ],
        "boxes": [[1, 2, 3, 4]],
        "size": [64, 48],
    }
    out |= changes
    return {key: value for key, value in out.items() if value is not ...}


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda s: s.strip() and "<image>" not in s
)
sides = st.tuples(st.integers(0, 999), st.integers(1, 1000)).map(
    lambda p: (p[0], max(p[0] + 1, p[1]))
)
boxes = st.tuples(sides, sides).map(lambda p: (p[0][0], p[1][0], p[0][1], p[1][1]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
known = {"id", "image", "images", "modality", "task", "group", "conversations", "boxes", "size"}
records = st.builds(
    Record,
    id=text,
    images=st.lists(text, max_size=3).map(tuple),
    modality=text,
    task=st.sampled_from(TASKS),
    group=text,
    conversations=st.lists(st.tuples(text, text), min_size=1, max_size=3).map(
        lambda pairs: tuple(t for q, a in pairs for t in (Turn("human", q), Turn("gpt", a)))
    ),
    boxes=st.lists(boxes, max_size=3).map(tuple),
    size=st.none() | st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
    extra=st.dictionaries(text.filter(lambda key: key not in known), json_values, max_size=3),
)


@given(records)
def test_to_json_and_back(record):
    line = json.dumps(record.to_json(), ensure_ascii=False)
    assert record_from_json(json.loads(line)) == record


@settings(max_examples=30)
@given(found=st.lists(records, max_size=4, unique_by=lambda r: r.id))
def test_write_and_read(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "r.jsonl"
    write_records(path, found)
    assert read_records(path) == found


def test_defaults_of_modality_and_group():
    record = record_from_json(row("mr_7", modality=..., group=..., boxes=..., size=...))
    assert (record.modality, record.group, record.boxes, record.size) == ("mr", "mr_7", (), None)
    assert record_from_json(row(group=12)).group == "12"


FAULTS = [
    ([1], "a record must be a JSON object, got list"),
    (row(7), "'id' must be a non-empty string, got 7"),
    (row(" "), "'id' must be a non-empty string"),
    (row(task="VQA"), "ct_1: unknown task 'VQA'; expected one of VG, ROC, RC, MIA"),
    (row(task=...), "unknown task None"),
    (row(task=["VG"]), "unknown task ['VG']"),
    (row(images=["b.png"]), "has both 'image' and 'images'"),
    (row(image=5), "'image' must be a path and 'images' a list of paths, got [5]"),
    (row(image=..., images="b.png"), "'images' a list of paths, got 'b.png'"),
    (row(modality=["ct"]), "'modality' must be a string, got ['ct']"),
    (row(group=1.5), "'group' must be a string, got 1.5"),
    (row(conversations=[]), "'conversations' must be pairs of human and gpt turns"),
    (row(conversations="hello"), "'conversations' must be pairs"),
    (row(conversations=[{"from": "human", "value": "a"}] * 2), "turn 2 of 'conversations' must be"),
    (row(conversations=[["a", "b"], ["c", "d"]]), "turn 1 of 'conversations' must be from 'human'"),
    (
        row(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]),
        "turn 2 of 'conversations' has no text",
    ),
    (row(image=..., images=["a", "b"]), "1 <image> marks for 2 images"),
    (row(boxes={"x": 1}), "'boxes' must be a list, got dict"),
    (row(boxes=[[1, 2, 3]]), "four whole numbers 0…1000, got [1, 2, 3]"),
    (row(boxes=[[1, 2, 3, 4.0]]), "four whole numbers"),
    (row(boxes=[[1, 2, 3, True]]), "four whole numbers"),
    (row(boxes=[[1, 2, 3, 1001]]), "box [1, 2, 3, 1001] lies outside the image"),
    (row(boxes=[[-1, 2, 3, 4]]), "lies outside the image"),
    (row(boxes=[[3, 2, 1, 4]]), "box [3, 2, 1, 4] is reversed or empty; write [x1, y1, x2, y2]"),
    (row(boxes=[[3, 2, 3, 4]]), "reversed or empty"),
    (row(size=[0, 5]), "'size' must be [width, height] in pixels, got [0, 5]"),
    (row(size="64x48"), "'size' must be [width, height]"),
]


@pytest.mark.parametrize(("wrong", "message"), FAULTS, ids=range(len(FAULTS)))
def test_each_fault_has_file_and_line(tmp_path, wrong, message):
    path = write_lines(tmp_path / "r.jsonl", row("ct_0"), wrong)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


RAW = [
    (b'{"id": "x", "ta', "not valid JSON at column"),
    (b'{"id": "x", "ta', "the file ends within this line (cut in half?)"),
    (b'{"id": "\xff"}', "not valid UTF-8 text"),
    (b'{"id": "\\ud800"}', "not valid UTF-8 text: surrogates not allowed"),
    (b'{"id": NaN}', "NaN is no number"),
    (b'{"id": -Infinity}', "-Infinity is no number"),
    (b"9" * 5000, "not usable JSON"),
    (b"[" * 100_000, "not usable JSON"),
    (b"\x00\x01", "not valid JSON"),
]


@pytest.mark.parametrize(("raw", "message"), RAW, ids=range(len(RAW)))
def test_each_broken_line(tmp_path, raw, message):
    path = write_lines(tmp_path / "r.jsonl", row())
    path.write_bytes(path.read_bytes() + b"\n" + raw)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)


def test_scan_goes_on_after_faults(tmp_path):
    path = tmp_path / "r.jsonl"
    write_lines(path, row("a"), row("b", task="?"), row("a"), row("c"))
    path.write_text(path.read_text() + '{"id": ')
    found = list(scan_records(path))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    assert [type(r).__name__ for _, r in found] == [
        "Record", "DataError", "DataError", "Record", "DataError"
    ]  # fmt: skip
    assert "duplicate id 'a', first seen on line 1" in str(found[2][1])


def test_byte_order_mark_and_blank_lines_are_no_fault(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", row())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n")
    assert [r.id for r in read_records(path)] == ["ct_1"]


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read: No such file"):
        read_records(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_records(tmp_path)


def test_a_file_without_newlines_is_refused_early(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'"' + b"a" * (MAX_LINE_BYTES + 10))
    with pytest.raises(DataError, match=r"r\.jsonl:1: the line has over 4194304 bytes"):
        read_records(path)


SCALE = """
import re, sys
from clinkd.data.records import read_records
records = read_records(sys.argv[1])
# not ru_maxrss, which a child inherits from the process that started it
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(len(records), peak // 1024)
"""


@pytest.mark.slow
def test_270_000_records_leave_room_in_a_gigabyte(tmp_path):
    path = tmp_path / "big.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for n in range(270_000):
            name = f"ct_00--AbdomenCT1K--Case_{n // 30:05d}--x_{n:06d}"
            big = row(name, image=f"{name}.png", group=f"Case_{n // 30:05d}")
            file.write(json.dumps(big) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", SCALE, str(path)], capture_output=True, text=True, check=True
    )
    count, mib = done.stdout.split()
    assert int(count) == 270_000
    assert int(mib) < 500  # so that torch and the model's own needs find room in 1 GB
