"""Other projects' formats: read as they write them, and everything back as it was."""

import json
import sys

import pytest
from PIL import Image

from clinkd.data.formats import FORMATS, Options, read_file, scan_file, write_file
from clinkd.data.formats_files import read_rows, write_rows
from clinkd.data.records import Record, Turn
from clinkd.errors import ConfigError, DataError, SetupError

Q2 = "<|box_start|>(100,200),(300,400)<|box_end|>"
STEM = "ct_00--AbdomenCT1K--Case_00558--x_0085"


def record(identity, question, answer, *, images=("a.png",), task="VG", boxes=(), **changes):
    return Record(
        identity,
        images,
        "ct",
        task,
        "patient 1",
        (Turn("human", question), Turn("gpt", answer)),
        boxes,
        changes.pop("size", (448, 224)),
        changes,
    )


RECORDS = [
    record("r1", "<image>\nWhere is the liver?", f"At {Q2}.", boxes=((100, 200, 300, 400),)),
    record(
        "r2",
        f"<image>\nWhat is in <|object_ref_start|>this<|object_ref_end|>{Q2}?",
        "Über",
        task="ROC",
        boxes=((100, 200, 300, 400),),
        source={"deep": [1, 2.5, None]},
    ),
    record("r3", "<image>\nDescribe it.", "An image.", task="MIA", images=("b/c.png",), size=None),
]


def dump(path, value):
    path.write_text(json.dumps(value), "utf-8")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["clinkd", "llava", "llava-med", "sharegpt", "swift"])
def test_there_and_back(tmp_path, name, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"out.{suffix}"
    write_file(path, RECORDS, name)
    assert read_file(path, name) == RECORDS


@pytest.mark.parametrize("boxes", ["qwen2", "box", "qwen3"])
@pytest.mark.parametrize("name", ["llava", "sharegpt"])
def test_there_and_back_in_other_boxes(tmp_path, name, boxes):
    path = tmp_path / "out.json"
    write_file(path, RECORDS, name, Options(boxes=boxes))
    assert ("<|box_start|>" in path.read_text()) == (boxes == "qwen2")
    assert read_file(path, name, Options(boxes=boxes)) == RECORDS


def test_bird_there_and_back(tmp_path):
    path = tmp_path / "bird.json"
    whole = [
        Record(f"{i}", (f"{i}.png",), *r_[0:3], *r_[3:])
        for i, r_ in (
            (r.images[0][:-4] if r.id == "r1" else f"s_{r.id}", (r.modality, r.task, r.group,
             r.conversations, r.boxes, r.size, r.extra))
            for r in RECORDS
        )
    ]  # fmt: skip
    write_file(path, whole, "bird")
    text = json.loads(path.read_text())[0]
    assert text["conversations"] == [
        ["Picture 1: <img>a.png</img>\nWhere is the liver?", "At <box>(100,200),(300,400)</box>."]
    ]
    assert read_file(path, "bird") == whole


def test_bird_as_it_is_published(tmp_path):
    pairs = [
        ["Picture 1: <img>x/y.png</img>\nWhere is the <ref>liver</ref>?",
         "The liver is located at the <box>(1,2),(30,40)</box><box>(50,60),(70,80)</box>."],
        ["What is at <box>(1,2),(30,40)</box>?", "Liver"],
        ["Describe <box>(1,2),(30,40)</box>.", "It shows a large and quite homogeneous organ."],
        ["What do you see?", "An abdomen."],
    ]  # fmt: skip
    path = dump(tmp_path / "b.json", [{"id": STEM, "conversations": pairs}] * 2)
    found = read_file(path, "bird")
    assert [r.id for r in found[:5]] == [STEM, *(f"{STEM}~{n}" for n in (2, 3, 4, 5))]
    assert [r.task for r in found[:4]] == ["VG", "ROC", "RC", "MIA"]
    first = found[0]
    assert first.images == (f"{STEM}.png",)
    assert (first.modality, first.group) == ("ct", "ct_00--AbdomenCT1K--Case_00558")
    assert first.boxes == ((1, 2, 30, 40), (50, 60, 70, 80))
    assert first.question == "Where is the <|object_ref_start|>liver<|object_ref_end|>?"
    assert "<|box_start|>(50,60),(70,80)<|box_end|>" in first.answer
    assert {r.task for r in read_file(path, "bird", Options(task="RC"))} == {"RC"}


def test_bird_cannot_hold_two_images(tmp_path):
    with pytest.raises(DataError, match="r: BiRD rows have one image each"):
        write_file(tmp_path / "b.json", [record("r", "q", "a", images=("a.png", "b.png"))], "bird")
    assert not (tmp_path / "b.json").exists()


def test_llava_med(tmp_path):
    domain = {"chest_xray": False, "mri": False, "ct_scan": True, "histology": False}
    rows = [
        {"id": "1", "image": "1.jpg", "domain": domain, "conversatons": [
            {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A lung."}]},
        {"question_id": 2, "image": "2.jpg", "text": "Why?\n<image>", "gpt4_answer": "So.",
         "domain": domain, "type": "detail", "fig_caption": "c"},
    ]  # fmt: skip
    found = read_file(dump(tmp_path / "l.json", rows), "llava-med")
    assert [(r.id, r.images, r.modality, r.task) for r in found] == [
        ("1", ("1.jpg",), "ct", "MIA"),
        ("2", ("2.jpg",), "ct", "MIA"),
    ]
    assert found[1].answer == "So."
    assert found[1].extra["fig_caption"] == "c"


def test_sharegpt_of_llama_factory(tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": "<image>Hi"},
                      {"role": "assistant", "content": "Yes"}], "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
    ]  # fmt: skip
    first, second = read_file(dump(tmp_path / "s.json", rows), "sharegpt")
    assert (first.id, second.id) == ("s-0", "s-1")
    assert first.extra["system"] == "Be brief."
    assert second.images == ()
    write_file(tmp_path / "again.json", [first], "sharegpt")
    (again,) = json.loads((tmp_path / "again.json").read_text())
    assert again["messages"] == rows[0]["messages"]
    assert again["images"] == ["a.png"]


def swift(**objects):
    text = "Where is <ref-object>? At <bbox>."
    return {
        "messages": [
            {"role": "user", "content": "<image>Find it"},
            {"role": "assistant", "content": text},
        ],
        "images": ["a.png"],
        "objects": {"ref": ["liver"], "bbox": [[112, 28, 224, 56]]} | objects,
    }  # fmt: skip


def test_swift_pixels_and_fractions(tmp_path):
    Image.new("RGB", (448, 224)).save(tmp_path / "a.png")
    rows = [swift(), swift(bbox_type="norm1", bbox=[[0.25, 0.125, 0.5, 0.25]])]
    found = read_file(dump(tmp_path / "s.json", rows), "swift", Options(root=tmp_path))
    for one in found:
        assert one.boxes == ((250, 125, 500, 250),)
        assert one.answer == (
            "Where is <|object_ref_start|>liver<|object_ref_end|>? "
            "At <|box_start|>(250,125),(500,250)<|box_end|>."
        )
    write_file(tmp_path / "again.json", found, "swift")
    again = json.loads((tmp_path / "again.json").read_text())[1]
    assert again["messages"] == rows[1]["messages"]
    assert again["objects"] == rows[1]["objects"]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({}, "say where the images lie with --root FOLDER"),
        ({"bbox_type": "norm1000"}, "'bbox_type' must be 'real' or 'norm1', got 'norm1000'"),
        ({"bbox_type": "norm1"}, "a box outside the image"),
        ({"bbox_type": "norm1", "bbox": [[0.5, 0.5]]}, "[x1, y1, x2, y2], got [0.5, 0.5]"),
        ({"bbox_type": "norm1", "bbox": []}, "more <bbox> marks than 'objects' has entries"),
        ({"bbox_type": "norm1", "bbox": [[0, 0, 1, 1]] * 2}, "more entries than the text"),
        ({"bbox_type": "norm1", "bbox": [[0, 0, 1, 1]], "ref": []}, "more <ref-object> marks"),
        ({"image_id": [3]}, "'image_id' 3 names none of 1 images"),
        ({"image_id": [0, 0]}, "'image_id' has 2 entries for 1 boxes"),
    ],
)  # fmt: skip
def test_wrong_swift_objects(tmp_path, objects, message):
    path = dump(tmp_path / "s.json", [swift(**objects)])
    with pytest.raises(DataError) as caught:
        read_file(path, "swift")
    assert str(caught.value).startswith(f"{path}[0]: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "expected"), [("original", [45, 45, 134, 90]), ("resized", [45, 45, 134, 90])]
)
def test_absolute_pixels(tmp_path, pixels, expected):
    options = Options(boxes="qwen2.5", pixels=pixels)
    write_file(tmp_path / "p.json", RECORDS[:1], "sharegpt", options)
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert row["messages"][1]["content"] == f'At {{"bbox_2d": {expected}}}.'
    row.pop("boxes")
    (back,) = read_file(dump(tmp_path / "p.json", [row]), "sharegpt", options)
    assert all(abs(a - b) <= 2 for a, b in zip(back.boxes[0], (100, 200, 300, 400), strict=True))


def test_resized_pixels_follow_the_models_limits(tmp_path):
    Image.new("RGB", (2000, 1000)).save(tmp_path / "a.png")
    unsized = [record("r", "<image>\nq", f"At {Q2}.", size=None, boxes=((100, 200, 300, 400),))]
    options = Options(boxes="qwen2.5", root=tmp_path, max_pixels=56 * 28)
    write_file(tmp_path / "p.json", unsized, "llava", options)  # the model sees 56 × 28
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert row["conversations"][1]["value"] == 'At {"bbox_2d": [6, 6, 17, 11]}.'
    with pytest.raises(DataError, match="--root FOLDER"):
        write_file(tmp_path / "p.json", unsized, "llava", Options(boxes="qwen2.5"))


BROKEN = [
    ("bird", {"id": "", "conversations": []}, "'id' must be the image's name without '.png'"),
    ("bird", {"id": "a", "conversations": {}}, "a list of [question, answer] pairs"),
    ("bird", {"id": "a", "conversations": [["q"]]}, "pair 1 of 'conversations' is no [question"),
    ("bird", {"id": "a", "conversations": [["q", "<box>(5,5),(1,1)</box>"]]}, "reversed or empty"),
    ("llava", {"id": "a", "conversations": "x"}, "must be a list of objects"),
    ("llava", {"id": "a", "conversations": [{"from": "tool", "value": "x"}]}, "the role 'tool'"),
    ("llava", {"id": "a"}, "must be a list of objects"),
    ("sharegpt", {"messages": []}, "'conversations' must be pairs"),
    ("sharegpt", {"messages": [{"role": "user", "content": [1]}] * 2, "images": []}, "turn 1 of"),
    ("sharegpt", {"messages": [], "images": [{"bytes": "x"}]}, "is given as bytes; save it"),
    ("swift", {"messages": [], "objects": 5}, "'objects' must be an object"),
    ("swift", 5, "a record must be a JSON object, got int"),
    ("clinkd", {"id": "a"}, "unknown task None"),
    ("clinkd", {"id": "a", "task": "VG"}, "'conversations' must be pairs"),
]


@pytest.mark.parametrize(("name", "row", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_rows(tmp_path, name, row, message):
    path = dump(tmp_path / "b.json", [row])
    ((place, fault),) = scan_file(path, name)
    assert place == f"{path}[0]"
    assert isinstance(fault, DataError)
    assert message in str(fault)


def test_duplicate_ids_and_going_on(tmp_path):
    write_file(tmp_path / "d.jsonl", [*RECORDS[:1], *RECORDS], "llava")
    found = list(scan_file(tmp_path / "d.jsonl", "llava"))
    assert [isinstance(f, Record) for _, f in found] == [True, False, True, True]
    assert str(found[1][1]).startswith("duplicate id 'r1', first seen at ")


def test_broken_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1},\n{"id"')
    with pytest.raises(DataError, match=r"a\.json:2: not valid JSON \(cut in half\?\)"):
        list(read_rows(path))
    path.write_text("{}")
    with pytest.raises(DataError, match="must hold a JSON list of records, not a dict"):
        list(read_rows(path))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(read_rows(tmp_path / "no.json"))
    with pytest.raises(ConfigError, match=r"must end with one of \.jsonl, \.json, \.parquet"):
        list(read_rows(tmp_path / "no.csv"))
    path.write_text("[]")
    assert list(read_rows(path)) == []
    write_rows(path, [])
    assert json.loads(path.read_text()) == []


def test_broken_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    write_rows(path, [{"id": "x"}])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(read_rows(path))
    with pytest.raises(DataError, match="does not fit a Parquet table"):
        write_file(path, [record("a", "q", "a")], "bird")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SetupError, match=r"pip install 'clinkd\[parquet\]'"):
        write_rows(tmp_path / "a.parquet", [])


def test_wrong_options(tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'coco'; expected one of clinkd, bird"):
        read_file(tmp_path / "a.json", "coco")
    with pytest.raises(ConfigError, match="pixels must be"):
        Options(pixels="some")
    with pytest.raises(ConfigError, match="task must be one of"):
        Options(task="vqa")
    for name in ("swift", "clinkd"):
        with pytest.raises(ConfigError):
            write_file(tmp_path / "a.json", [], name, Options(boxes="qwen3"))
    assert set(FORMATS) == {"clinkd", "bird", "llava", "llava-med", "sharegpt", "swift"}
