"""What conversions must not lose: ids, boxes in another form, small boxes."""

import json

import pytest
from typer.testing import CliRunner

from clinkd.commands.data import app
from clinkd.data.boxes import format_boxes, parse_boxes, to_box
from clinkd.data.formats import Options, read_file, scan_file, write_file
from clinkd.data.records import Record, Turn, read_records
from clinkd.errors import DataError

Q2 = "<|box_start|>(100,200),(300,400)<|box_end|>"
STEM = "ct_00--Set--V--z_1"


def turns(*texts):
    return tuple(Turn(("human", "gpt")[n % 2], text) for n, text in enumerate(texts))


def record(identity, image=f"{STEM}.png", **changes):
    fields = {"task": "MIA", "conversations": turns("<image>\nWhat is it?", "A slice.")} | changes
    return Record(identity, (image,), "ct", group="ct_00--Set--V", **fields)


def dump(path, value):
    path.write_text(json.dumps(value), "utf-8")
    return path


# BiRD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_bird_keeps_our_ids(tmp_path, suffix):
    records = [
        record(f"{STEM}~2"),
        record(f"{STEM}~3"),
        record("case7-q1", "x.png"),
        record(STEM),
        record("two turns", conversations=turns("<image>\nWhat?", "A.", f"And {Q2}?", "B."),
               task="ROC", boxes=((100, 200, 300, 400),)),
    ]  # fmt: skip
    path = tmp_path / f"b.{suffix}"
    write_file(path, records, "bird")
    assert read_file(path, "bird") == records
    rows = json.loads(path.read_text()) if suffix == "json" else []
    assert {(row["id"], row["clinkd_id"]) for row in rows[:3]} <= {
        (STEM, f"{STEM}~2"), (STEM, f"{STEM}~3"), ("x", "case7-q1")
    }  # fmt: skip


def test_birds_own_rows_are_numbered_as_before(tmp_path):
    row = {"id": STEM, "conversations": [["q", "a"], ["r", "b"]]}
    found = read_file(dump(tmp_path / "b.json", [row, row]), "bird")
    assert [r.id for r in found] == [STEM, f"{STEM}~2", f"{STEM}~3", f"{STEM}~4"]
    assert all("clinkd_id" not in r.extra for r in found)


def test_a_wrong_own_id_of_bird(tmp_path):
    row = {"id": STEM, "clinkd_id": ["x"], "conversations": [["q", "a"]]}
    ((_, fault),) = scan_file(dump(tmp_path / "b.json", [row]), "bird")
    assert "'id' must be a non-empty string" in str(fault)


# ids that are numbers -------------------------------------------------------------------------


def test_zero_is_an_id(tmp_path):
    talk = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": n, "image": "x.png", "conversations": talk} for n in (0, 1)]
    rows += [{"image": "x.png", "conversations": talk}, {"id": "", "conversations": talk}]
    found = [f for _, f in scan_file(dump(tmp_path / "l.json", rows), "llava")]
    assert [getattr(f, "id", f) for f in found[:3]] == ["0", "1", "l-2"]


def test_an_evaluation_row_without_id(tmp_path):
    row = {"image": "x.png", "text": "q\n<image>", "gpt4_answer": "a"}
    rows = [row, row, row | {"question_id": 0}]
    found = read_file(dump(tmp_path / "e.json", rows), "llava-med")
    assert [r.id for r in found] == ["e-0", "e-1", "0"]


# our own rows with boxes in another form --------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ("box", "<box>(100,200),(300,400)</box>"),
        ("qwen3", '{"bbox_2d": [100, 200, 300, 400]}'),
        ("qwen2.5", '{"bbox_2d": [100, 200, 300, 400]}'),
        ("qwen2", Q2),
        (None, Q2),
    ],
)
def test_boxes_of_our_own_rows(tmp_path, boxes, text):
    written = record("a", task="VG", conversations=turns("<image>\nWhere?", f"At {text}."),
                     boxes=((100, 200, 300, 400),), size=(1000, 1000))  # fmt: skip
    source, out = dump(tmp_path / "a.json", [written.to_json()]), tmp_path / "out.jsonl"
    arguments = ["convert", str(source), str(out), "--pixels", "original"]
    arguments += ["--from-boxes", boxes] if boxes else []
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (found,) = read_records(out)
    assert found.answer == f"At {Q2}."
    assert found.boxes == written.boxes


def test_texts_of_our_own_rows_that_cannot_be_read(tmp_path):
    row = record("a", conversations=turns("q", "<box>(9,9),(1,1)</box>")).to_json()
    other = record("b", conversations=turns("q", '{"bbox_2d": [1, 1, 2, 2]}')).to_json()
    plain = record("c").to_json()
    for boxes, message in (("box", "a: a box that is reversed"), ("qwen2.5", "--root FOLDER")):
        path = dump(tmp_path / "a.json", [row if boxes == "box" else other, plain])
        first, second = (f for _, f in scan_file(path, "clinkd", Options(boxes=boxes)))
        assert isinstance(first, DataError)
        assert message in str(first)
        assert second.id == "c"  # no box, so no size is asked for


def test_a_task_for_our_own_rows(tmp_path):
    row = record("a").to_json()
    del row["task"]
    path = dump(tmp_path / "a.json", [row, record("b").to_json()])
    assert [r.task for r in read_file(path, "clinkd", Options(task="RC"))] == ["RC", "MIA"]
    with pytest.raises(DataError, match="unknown task None"):
        read_file(path, "clinkd")


# small boxes in pixels ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "size", "pixels"),
    [
        ((100, 100, 102, 104), (200, 200), [20, 20, 21, 21]),
        ((500, 500, 501, 502), (448, 448), [224, 224, 225, 225]),
        ((998, 999, 1000, 1000), (200, 200), [199, 199, 200, 200]),
        ((0, 0, 1, 1000), (100, 100), [0, 0, 1, 100]),
        ((0, 0, 1000, 1000), (1, 1), [0, 0, 1, 1]),
        ((100, 200, 300, 400), (448, 224), [45, 45, 134, 90]),
    ],
)
def test_small_boxes_keep_a_pixel(box, size, pixels):
    text = format_boxes([box], "qwen2.5", size)
    assert json.loads(text) == {"bbox_2d": pixels}
    (back,) = parse_boxes(text, "qwen2.5", size)
    tolerance = [0.5 + 1000 / side for side in size * 2]
    assert all(abs(a - b) <= t for a, b, t in zip(to_box(back), box, tolerance, strict=True))


def test_a_small_box_goes_there_and_back(tmp_path):
    small = "<|box_start|>(100,100),(102,104)<|box_end|>"
    records = [record("a", task="VG", conversations=turns("<image>\nWhere?", f"At {small}."),
                      boxes=((100, 100, 102, 104),), size=(200, 200))]  # fmt: skip
    for pixels in ("original", "resized"):
        options = Options(boxes="qwen2.5", pixels=pixels)
        write_file(tmp_path / "a.json", records, "sharegpt", options)
        (back,) = read_file(tmp_path / "a.json", "sharegpt", options)
        assert back.boxes == records[0].boxes
