"""One image file under two names, through links: it never stands in both splits unseen."""

import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clinkd.commands.data import app
from clinkd.data.checks import IMAGE_CHECKS, check_dataset, require_sound
from clinkd.data.clusters import clusters_of, image_file
from clinkd.data.images import image_size, load_image, resolve_image
from clinkd.data.records import Record, Turn, read_records, write_records
from clinkd.data.split import leaks, split
from clinkd.errors import DataError


@pytest.fixture
def root(tmp_path):
    """Twenty pictures in `img`, where `latest` and a link in another folder lead too."""
    folder = tmp_path / "images"
    (folder / "img").mkdir(parents=True)
    (folder / "latest").symlink_to("img")
    (folder / "one").mkdir()
    for n in range(20):
        Image.fromarray(np.full((8, 8), n, dtype=np.uint8)).save(folder / f"img/{n}.png")
    (folder / "one" / "x.png").symlink_to("../img/7.png")
    return folder


def record(identity, image):
    talk = (Turn("human", "q"), Turn("gpt", "a"))
    return Record(identity, (image,), "ct", "MIA", identity, talk)


TWICE = [record(f"{d}-{n}", f"{d}/{n}.png") for n in range(20) for d in ("img", "latest")]


def files(records, root):
    return {os.path.realpath(root / name) for r in records for name in r.images}


def test_split_keeps_one_file_together(root):
    parts = split(TWICE, {"test": 0.25, "valid": 0.2}, 0, root)
    assert [len(files(part, root)) for part in parts.values()] == [5, 4, 11]
    assert not files(parts["train"], root) & files(parts["test"], root)
    assert leaks(parts["train"], parts["test"], root) == []
    by_name = split(TWICE, {"test": 0.25}, 0)
    assert files(by_name["train"], root) & files(by_name["test"], root)


def test_clusters_and_files(root):
    assert image_file("one/x.png", root) == image_file("latest/7.png", root)
    assert image_file("one/x.png", root) == str(root / "img" / "7.png")
    assert image_file("none/./x.png", root) == image_file("none/x.png") == "none/x.png"
    some = [record("a", "one/x.png"), record("b", "img/8.png"), record("c", "img/7.png")]
    assert clusters_of(some, root) == [[0, 2], [1]]
    assert clusters_of(some) == [[0], [1], [2]]


@pytest.mark.parametrize("how", IMAGE_CHECKS)
@pytest.mark.parametrize("name", ["latest/7.png", "one/x.png"])
def test_every_check_finds_the_leak(root, name, how):
    train, test = [record("a", "img/7.png")], [record("b", name), record("c", "img/8.png")]
    (fault,) = check_dataset(train, test, root, images=how)
    assert fault.place == "b"
    message = f"its image {name!r} is the training split's 'img/7.png' under another name"
    assert message in fault.message
    with pytest.raises(DataError, match="under another name"):
        require_sound(train, test, root)


def test_the_commands(root, tmp_path):
    all_, parts = tmp_path / "all.jsonl", tmp_path / "parts"
    write_records(all_, TWICE)
    arguments = ["split", str(all_), str(parts), "--test", "0.25", "--root", str(root)]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (0, "")
    train, test = (read_records(parts / f"{part}.jsonl") for part in ("train", "test"))
    assert not files(train, root) & files(test, root)
    moved = [record("moved", "latest/3.png")]
    (kept,) = (r for r in (*train, *test) if r.id == "img-3")
    write_records(tmp_path / "a.jsonl", [kept])
    write_records(tmp_path / "b.jsonl", moved)
    arguments = ["check", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    done = CliRunner().invoke(app, [*arguments, "--root", str(root)])
    assert done.exit_code == 3
    assert "under another name" in done.stderr


def test_split_says_what_it_did_not_find(root, tmp_path):
    write_records(tmp_path / "all.jsonl", TWICE)
    done = CliRunner().invoke(app, ["split", str(tmp_path / "all.jsonl"), str(tmp_path / "parts")])
    assert done.exit_code == 0
    assert f"40 of 40 images are not under {tmp_path}, 'img/0.png' for one" in done.stderr
    assert "--root FOLDER" in done.stderr


@pytest.mark.parametrize("name", ["img/../img/7.png", "../images/img/7.png", "one/..", ".."])
def test_a_name_that_goes_up_is_refused(root, name):
    for reader in (load_image, image_size, resolve_image):
        with pytest.raises(DataError, match=r"goes up with '\.\.': what lies outside") as caught:
            reader(root, name)
        assert f"write the path from {root} down" in str(caught.value)


def test_dots_in_a_name_are_no_way_up(root):
    for name in ("img/a..b.png", "img/...png", "img/..png"):
        Image.new("RGB", (3, 2)).save(root / name, "PNG")
        assert image_size(root, name) == (3, 2)
