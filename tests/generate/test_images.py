"""The next block's images are read while one is answered."""

import time

import pytest

from clinkd.data.records import Record, Turn
from clinkd.errors import DataError, SetupError
from clinkd.generate import images

TURNS = (Turn("human", "What?"), Turn("gpt", "That."))


@pytest.fixture
def read(monkeypatch):
    names = []

    def load(root, name):
        names.append(name)
        if name == "damaged":
            raise DataError("damaged")
        if name == "dicom":
            raise SetupError("no package")
        time.sleep(0.01)
        return f"{root}/{name}"

    monkeypatch.setattr(images, "load_image", load)
    return names


def parts(*names):
    return [[Record(n, tuple(n.split()), "ct", "ROC", n, TURNS) for n in part] for part in names]


def wait_for(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_part_ahead_and_no_more(read):
    given = parts(["a", "b c"], ["damaged", "d", ""], ["e"], ["f"])
    blocks = images.with_images(given, "root")
    part, found = next(blocks)
    assert part is given[0]
    assert found == [["root/a"], ["root/b", "root/c"]]
    wait_for(lambda: read == ["a", "b", "c", "damaged", "d"])
    time.sleep(0.1)
    assert "e" not in read
    _, (error, one, none) = next(blocks)
    assert str(error) == "damaged"
    assert (one, none) == (["root/d"], [])
    assert [found for _, found in blocks] == [[["root/e"]], [["root/f"]]]
    assert list(images.with_images([], "root")) == []


def test_what_stops_a_run_comes_with_its_part(read):
    blocks = images.with_images(parts(["a"], ["dicom"]), "root")
    next(blocks)
    wait_for(lambda: "dicom" in read)
    with pytest.raises(SetupError, match="no package"):
        next(blocks)


def test_a_stop_does_not_wait_for_a_whole_part(read):
    blocks = images.with_images(parts(["a"], [str(n) for n in range(1000)]), "root")
    next(blocks)
    blocks.close()
    assert len(read) < 100
