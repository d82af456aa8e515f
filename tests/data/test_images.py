"""Images: inside the root, whole, upright, and as eyes see them."""

import os

import numpy as np
import pytest
from PIL import Image

from clinkd.data import images
from clinkd.data.images import image_size, load_image, resolve_image
from clinkd.data.png import plain_size
from clinkd.errors import DataError


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.open(folder / "a.png").save(tmp_path / "outside.png")
    return folder


def test_load_and_size(root):
    image = load_image(root, "a.png")
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert image_size(root, "./a.png") == (64, 48)


@pytest.mark.parametrize("name", ["../outside.png", "sub/../../outside.png", "link.png", "ring/a"])
def test_names_that_leave_the_root(root, name):
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "ring").symlink_to(root / "ring")
    for reader in (load_image, image_size):
        with pytest.raises(DataError, match=r"lies outside the data root|cannot be reached"):
            reader(root, name)


def test_absolute_names_are_refused_even_inside(root):
    with pytest.raises(DataError, match="lies outside the data root"):
        resolve_image(root, str(root / "a.png"))
    with pytest.raises(DataError, match="lies outside the data root"):
        resolve_image(root, "/nowhere/b.png")


def test_links_within_the_root_are_fine(root):
    (root / "sub" / "b.png").symlink_to(root / "a.png")
    assert load_image(root, "sub/b.png").size == (64, 48)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.png", "image 'b.png' does not exist under"),
        ("a.png/b.png", "cannot be reached"),
        ("sub", "is not a file"),
        (".", "is not a file"),
        ("a" * 5000, "cannot be reached"),
        ("a\0.png", "is no path"),
    ],
)
def test_names_that_lead_nowhere(root, name, message):
    with pytest.raises(DataError) as caught:
        load_image(root, name)
    assert message in str(caught.value)


def test_pipes_are_not_opened(root):
    os.mkfifo(root / "pipe.png")
    with pytest.raises(DataError, match="is not a file"):
        load_image(root, "pipe.png")


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.98])
def test_truncated(root, kind, share):
    path = root / f"b.{kind}"
    Image.open(root / "a.png").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"image 'b\.{kind}' cannot be decoded \(truncated\?\)"):
        load_image(root, path.name)


def test_flipped_bits_in_a_png(root):
    data = bytearray((root / "a.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (root / "a.png").write_bytes(data)
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(root, "a.png")


def test_files_that_are_no_pictures(root):
    (root / "b.png").write_text("hello")
    (root / "c.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("b.png", "c.png"):
        with pytest.raises(DataError, match="cannot be decoded"):
            load_image(root, name)
        with pytest.raises(DataError, match="no readable header"):
            image_size(root, name)


def test_too_many_pixels(root, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    for reader in (load_image, image_size):
        with pytest.raises(DataError, match="has 64 × 48 pixels, over 3071"):
            reader(root, "a.png")


def test_decompression_bomb(root):
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    assert (root / "bomb.png").stat().st_size < 1 << 20
    with pytest.raises(DataError, match="bomb"):
        load_image(root, "bomb.png")


def test_exif_turns_the_picture(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.open(root / "a.png").save(root / "b.jpg", exif=exif)
    assert load_image(root, "b.jpg").size == image_size(root, "b.jpg") == (48, 64)


def test_sixteen_bit_grey_is_stretched_not_clipped(root):
    values = np.array([[1000, 1500], [2000, 3000]], dtype=np.uint16)
    Image.fromarray(values).save(root / "b.png")
    shown = np.asarray(load_image(root, "b.png"))[..., 0]
    assert shown.tolist() == [[0, 64], [128, 255]]


def test_constant_sixteen_bit_grey(root):
    Image.fromarray(np.full((2, 2), 700, dtype=np.uint16)).save(root / "b.png")
    assert np.asarray(load_image(root, "b.png")).max() == 0


def test_transparent_pixels_are_white(root):
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(root / "b.png")
    assert load_image(root, "b.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK"])
def test_other_modes(root, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (4, 4), "white").convert(mode).save(root / f"b.{suffix}")
    image = load_image(root, f"b.{suffix}")
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_plain_png_headers_are_read_as_pil_reads_them(root, mode):
    Image.new(mode, (37, 11)).save(root / "m.png")
    assert plain_size((root / "m.png").read_bytes()) == (37, 11)
    assert image_size(root, "m.png", png_end=True) == load_image(root, "m.png").size == (37, 11)


def test_unusual_png_headers_are_left_to_pil(root):
    image = Image.new("L", (37, 11))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(root / "turned.png", exif=exif)
    assert plain_size((root / "turned.png").read_bytes()) is None
    assert image_size(root, "turned.png") == load_image(root, "turned.png").size == (11, 37)
    image.save(root / "m.png")
    whole = bytearray((root / "m.png").read_bytes())
    for place in (0, 13, 17, 24, 25, 26, 28, 30):  # mark, name, width, kind, method, checksum
        broken = whole.copy()
        broken[place] ^= 0x55
        assert plain_size(bytes(broken)) is None
    for length in (20, 32, 40):
        assert plain_size(bytes(whole[:length])) is None
    (root / "cut.png").write_bytes(bytes(whole[:-8]))
    assert image_size(root, "cut.png") == (37, 11)
    with pytest.raises(DataError, match="its end is missing"):
        image_size(root, "cut.png", png_end=True)
