"""Pictures that lie on their side: upright, and of one size whether decoded or not."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from clinkd.data.checks import check_dataset
from clinkd.data.formats import Options, read_file, write_file
from clinkd.data.images import image_size, load_image
from clinkd.data.records import Record, Turn

ORIENTATION = 0x0112
WIDE = Image.fromarray(
    np.stack(np.broadcast_arrays(np.arange(0, 240, 8)[None], np.arange(0, 200, 10)[:, None], 7), -1)
    .astype(np.uint8)
)  # fmt: skip
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "mpo": "MPO"}


def exif(orientation):
    out = Image.Exif()
    out[ORIENTATION] = orientation
    return out


def xmp(orientation):
    return f'<x:xmpmeta><d tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def shown(root, name):
    """The picture, whose size the header must give as well."""
    image = load_image(root, name)
    assert image_size(root, name) == image.size
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", FORMATS)
def test_exif(tmp_path, suffix, orientation):
    options = {"save_all": True, "append_images": [WIDE]} if suffix == "mpo" else {}
    options |= {"quality": 95} if suffix in ("jpg", "mpo") else {"lossless": True}
    name = f"a.{suffix}"
    WIDE.save(tmp_path / name, FORMATS[suffix], exif=exif(orientation), **options)
    with Image.open(tmp_path / name) as written:
        assert written.format == FORMATS[suffix]
    image = shown(tmp_path, name)
    assert image.size == ((20, 30) if orientation >= 5 else (30, 20))
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[orientation]  # of Transpose
    upright = WIDE if turned is None else WIDE.transpose(turned)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(upright).astype(int))
    assert difference.mean() < (0 if FORMATS[suffix] in ("PNG", "TIFF") else 8) + 1e-9


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif"])
def test_xmp(tmp_path, suffix):
    note = {"tiffinfo": {700: xmp(6)}} if suffix == "tif" else {"xmp": xmp(6)}
    WIDE.save(tmp_path / f"a.{suffix}", **note)
    assert shown(tmp_path, f"a.{suffix}").size == (20, 30)


def test_xmp_of_a_png(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", xmp(8).decode())
    WIDE.save(tmp_path / "a.png", pnginfo=note)
    assert shown(tmp_path, "a.png").size == (20, 30)


def test_a_note_behind_the_pixels_of_a_png_is_too_late(tmp_path):
    """The standard wants it before them; a header is read no further."""
    whole = io.BytesIO()
    WIDE.save(whole, "PNG")
    data = whole.getvalue()
    chunk = b"eXIf" + exif(6).tobytes().removeprefix(b"Exif\0\0")
    late = (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    (tmp_path / "a.png").write_bytes(data[:-12] + late + data[-12:])
    assert shown(tmp_path, "a.png").size == (30, 20)


def test_no_png_is_decoded_for_its_size(tmp_path, monkeypatch):
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "an unusual header")
    WIDE.save(tmp_path / "a.png", pnginfo=note)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert image_size(tmp_path, "a.png") == (30, 20)


@pytest.mark.parametrize("how", ["header", "decode"])
def test_the_checks_agree_about_a_turned_tiff(tmp_path, how):
    WIDE.save(tmp_path / "a.tif", exif=exif(6))
    talk = (Turn("human", "q"), Turn("gpt", "a"))
    upright = Record("a", ("a.tif",), "ct", "MIA", "g", talk, (), (20, 30))
    lying = Record("b", ("a.tif",), "ct", "MIA", "g", talk, (), (30, 20))
    assert check_dataset([upright], None, tmp_path, images=how) == []
    assert len(check_dataset([lying], None, tmp_path, images=how)) == 1


def test_pixels_of_a_turned_tiff(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.tif", exif=exif(6))
    box = "<|box_start|>(100,100),(500,900)<|box_end|>"
    talk = (Turn("human", "Where?"), Turn("gpt", box))
    record = Record("a", ("a.tif",), "ct", "VG", "g", talk, ((100, 100, 500, 900),))
    options = Options(boxes="qwen2.5", pixels="original", root=tmp_path)
    write_file(tmp_path / "a.json", [record], "llava", options)
    assert "[20, 30, 100, 270]" in (tmp_path / "a.json").read_text()
    assert read_file(tmp_path / "a.json", "llava", options)[0].answer == box
