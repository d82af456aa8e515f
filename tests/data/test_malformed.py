"""Whatever a file holds: records, or a DataError at its place, never another error."""

import copy
import io
import json
import random
import resource

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clinkd.data import formats_files
from clinkd.data.formats import FORMATS, Options, read_file, scan_file, write_file
from clinkd.data.images import image_size, load_image
from clinkd.data.records import Record, Turn
from clinkd.data.select import held_out_places
from clinkd.errors import DataError

RECORD = Record(
    "a", ("a.png",), "ct", "VG", "p1",
    (Turn("human", "Where is the liver?"), Turn("gpt", "<|box_start|>(1,2),(3,4)<|box_end|>")),
    ((1, 2, 3, 4),), (64, 48),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def rows_of(tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    write_file(path, [RECORD], name)
    return [json.loads(line) for line in path.read_text().splitlines()]


def places_in(value, path=()):
    """Every place of a JSON value that something else could stand in."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from places_in(inner, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.parametrize("name", sorted(FORMATS))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_anything_anywhere(tmp_path, name, data):
    (row,) = rows_of(tmp_path, name)
    row.setdefault("objects", {"ref": ["x"], "bbox": [[0, 0, 1, 1]], "image_id": [0]})
    row.setdefault("domain", {"mri": True})
    row.setdefault("size", [64, 48])
    row.setdefault("images", ["a.png"])
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.sampled_from([p for p in places_in(row) if p]))
        put(row, at, data.draw(JSON))
    boxes = data.draw(st.sampled_from([None, "box", "qwen2.5", "qwen3"]))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    for place, found in scan_file(path, name, Options(boxes=boxes, root=tmp_path)):
        assert place == f"{path}[0]"
        assert isinstance(found, (Record, DataError))
        if isinstance(found, Record):
            write_file(tmp_path / "again.jsonl", [found], "clinkd")


WRONG = {
    "a role that is a list": ("llava", ("conversations", 0, "from"), ["human"]),
    "a size of words": ("llava", ("size",), "abc"),
    "a size of nothing": ("llava", ("size",), [0, 0]),
    "images that are a number": ("sharegpt", ("images",), 7),
    "names that are a number": ("swift", ("objects",), {"ref": 5, "bbox": [[0, 0, 1, 1]]}),
    "boxes that are a number": ("swift", ("objects",), {"ref": [], "bbox": 5}),
    "image numbers that are text": ("swift", ("objects",), {"bbox": [[0, 0, 1, 1]], "image_id": 3}),
}


@pytest.mark.parametrize(("name", "at", "value"), WRONG.values(), ids=WRONG)
def test_wrong_types_have_a_place(tmp_path, name, at, value):
    (row,) = rows_of(tmp_path, name)
    if at[0] == "size":
        row["conversations"][1]["value"] = '{"bbox_2d": [1, 2, 3, 4]}'
    wrong = copy.deepcopy(row)
    put(wrong, at, value)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(wrong) + "\n")
    options = Options(boxes="qwen2.5" if at[0] == "size" else None, root=tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        read_file(path, name, options)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("NaN", "not usable JSON"), ("-Infinity", "not usable JSON"), ('"\\ud800"', "UTF-8")],
)
def test_what_json_lines_cannot_hold(tmp_path, text, reason):
    good = json.dumps(RECORD.to_json())
    path = tmp_path / "rows.json"
    path.write_text(f'[{good}, {good[:-1]}, "extra": [{text}]}}]')
    with pytest.raises(DataError, match=rf"rows\.json\[1\]: .*{reason}"):
        read_file(path, "clinkd")


def parquet(path, **columns):
    row = {key: value for key, value in RECORD.to_json().items() if key != "boxes"}
    table = pyarrow.table({key: [value] for key, value in row.items()} | columns)
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"extra": ["{"]}, "column 'extra' must hold a JSON object"),
        ({"extra": ["[1]"]}, "column 'extra' must hold a JSON object"),
        ({"extra": pyarrow.array([1])}, "column 'extra' must hold a JSON object"),
        ({"made": pyarrow.array([0], pyarrow.timestamp("ns"))}, "no JSON"),
        ({"made": pyarrow.array([1 << 60], pyarrow.timestamp("ms"))}, "cannot be read"),
        ({"picture": [b"\x00\x01"]}, "no JSON"),
        ({"score": [float("nan")]}, "not usable JSON"),
        ({"note": pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())}, "not valid UTF-8"),
    ],
)
def test_parquet_columns_that_are_none_of_ours(tmp_path, columns, reason):
    path = tmp_path / "rows.parquet"
    parquet(path, **columns)
    with pytest.raises(DataError, match=rf"rows\.parquet\[0\]: .*{reason}"):
        read_file(path, "clinkd")


def test_a_small_parquet_file_that_unpacks_to_gigabytes(tmp_path):
    """One text of a megabyte in 1,000 rows is a gigabyte: a few rows are unpacked at a time."""
    path = tmp_path / "rows.parquet"
    numbers = pyarrow.array([0] * 1000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array(["x" * (1 << 20)]))
    pyarrow.parquet.write_table(pyarrow.table({"id": column}), path, store_schema=False)
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = sum(isinstance(found, DataError) for _, found in scan_file(path, "clinkd"))
    assert found == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KiB


@pytest.mark.parametrize(
    ("name", "limit"), [("_MOST_BYTES", 100), ("_MOST_COLUMN_BYTES", 10), ("MAX_LINE_BYTES", 0)]
)
def test_parquet_over_the_limits(tmp_path, monkeypatch, name, limit):
    path = tmp_path / "rows.parquet"
    parquet(path)
    assert read_file(path, "clinkd") != []
    monkeypatch.setattr(formats_files, name, limit)
    with pytest.raises(DataError, match=r"rows\.parquet.* over 0"):
        read_file(path, "clinkd")


KINDS = {
    "PNG": {}, "JPEG": {"exif": True}, "WEBP": {"exif": True}, "JPEG2000": {}, "TIFF": {},
    "GIF": {}, "BMP": {},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_flipped_anywhere(tmp_path, kind):
    """An image or a DataError: with 400 damages of a kind."""
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    options = {}
    if KINDS[kind].get("exif"):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E], exif[0x011A] = 6, "scanner", (72, 1)
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    whole, path, draw = buffer.getvalue(), tmp_path / "image", random.Random(0)
    seen = set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            near = draw.choice([len(data), min(200, len(data))])  # heads matter most
            data[draw.randrange(near)] = draw.choice([0, 1, 127, 255, draw.randrange(256)])
        path.write_bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
        for read in (load_image, image_size):
            try:
                read(tmp_path, "image")
                seen.add("read")
            except DataError:
                seen.add("refused")
    assert seen == {"read", "refused"}


def test_held_out_groups_that_share_an_image_stay_together():
    def record(number, group, image):
        turns = (Turn("human", "What?"), Turn("gpt", "This."))
        return Record(str(number), (image,), "ct", "ROC", group, turns)

    records = [record(i, f"g{i}", f"shared{i // 3}.png") for i in range(30)]
    for seed in range(5):
        held = set(held_out_places(records, 0.3, seed))
        assert len(held) == 9
        files = {records[i].images[0] for i in held}
        assert all((i in held) == (records[i].images[0] in files) for i in range(30))
