"""Where a name ends and its slice begins: files that only their content tells to be DICOM."""

import numpy as np
import pytest
from dicom_files import grey, write_dicom
from PIL import Image

from clinkd.data import images
from clinkd.data.checks import check_dataset
from clinkd.data.images import image_size, load_image, resolve_image, split_name
from clinkd.data.records import Record, Turn
from clinkd.data.split import leaks, split
from clinkd.errors import DataError

pytest.importorskip("pydicom")

CINE = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
NAMES = ["IM0001", "IM1.ima", "1.2.840.10008", "a#b", "sub/IM0001"]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    return folder


def record(identity, image):
    talk = (Turn("human", "q"), Turn("gpt", "a"))
    return Record(identity, (image,), "ct", "MIA", identity, talk)


@pytest.mark.parametrize("name", NAMES)
def test_frames_and_windows(root, name):
    write_dicom(root / name, CINE)
    for frame in range(3):
        assert image_size(root, f"{name}#{frame}") == load_image(root, f"{name}#{frame}").size
    shown = grey(load_image(root, f"{name}#frame=1,window=5.5:3"))
    assert shown.tolist() == [[0, 85], [170, 255]]
    with pytest.raises(DataError, match=r"say which: '#0' … '#2'"):
        load_image(root, name)
    with pytest.raises(DataError, match="frame must be 0…2, got 3"):
        load_image(root, f"{name}#3")


def test_a_link_to_a_dicom_file(root):
    write_dicom(root / "IM0001", CINE)
    (root / "link").symlink_to("IM0001")
    assert load_image(root, "link#2").size == (2, 2)


@pytest.mark.parametrize("name", ["a#1.png", "IM0001#1.png", "IM0001#1.JPG", "a.dcm#1.png", "x#1"])
def test_pictures_may_have_the_sign_in_their_name(root, name):
    write_dicom(root / "IM0001", CINE)
    (root / "x").write_bytes(b"no DICOM file")
    Image.new("RGB", (7, 5)).save(root / name, "PNG")
    assert split_name(name, root) == (name, "")
    assert load_image(root, name).size == image_size(root, name) == (7, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none#1", "image 'none#1' does not exist"),
        ("sub#1", "image 'sub#1' does not exist"),
        ("../IM0001#1", "goes up with '..'"),
        ("link#1", "does not exist"),
        ("/etc/passwd#1", "is an absolute path"),
        ("IM\0#1", "is no path"),
    ],
)
def test_nothing_outside_the_root_is_looked_into(root, name, message, monkeypatch):
    write_dicom(root.parent / "IM0001", CINE)
    (root / "link").symlink_to(root.parent / "IM0001")
    monkeypatch.setattr(images, "is_medical", None)  # which would open it
    with pytest.raises(DataError) as caught:
        load_image(root, name)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "IM0001", "scan.dcm#1", "v.nii.gz#axis=2", "a#1.png"])
def test_no_other_name_is_looked_up(name, monkeypatch):
    monkeypatch.setattr(images, "_resolve", None)
    assert split_name(name, "/data") == split_name(name)


def test_frames_of_one_file_are_one_file(root):
    for n in range(4):
        write_dicom(root / f"IM{n}", CINE)
    records = [record(f"r{n}-{k}", f"IM{n}#{k}") for n in range(4) for k in range(3)]
    parts = split(records, {"test": 0.25}, 0, root)
    assert {len({r.images[0][:3] for r in part}) for part in parts.values()} == {1, 3}
    assert leaks(parts["train"], parts["test"], root) == []
    (fault,) = check_dataset([record("a", "IM0#0")], [record("b", "IM0#1")], root)
    assert "its image 'IM0#1' is the training split's 'IM0#0'" in fault.message
    assert resolve_image(root, "IM0#0") == resolve_image(root, "IM0#1") == str(root / "IM0")
