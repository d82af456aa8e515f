"""Reading images safely: inside the data root, whole, and not too large.

`load_image` is the one entrance. A name is a path relative to the data root; slices of medical
files are named behind a `#`: `scan.dcm#3`, `volume.nii.gz#axis=2,index=30` (`clinkd.data.medical`).
"""

import contextlib
import os
import stat
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from clinkd.data.png import END, HEAD_BYTES, plain_size
from clinkd.errors import DataError

MAX_PIXELS = 64 << 20  # decoded pixels of one image; a larger one is refused, not decoded
# no formats that start other programs or read other files, as EPS does
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "JPEG2000")
MEDICAL_SUFFIXES = (".dcm", ".dicom", ".nii", ".nii.gz")
PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jp2")
_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112  # tags of TIFF, the last of EXIF too
_ASIDE = (5, 6, 7, 8)  # orientations that exchange width and height
_TURNS = {  # what makes a picture of each orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# where PIL keeps what it finds an orientation in
_NOTES = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}


def split_name(name: str, root: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """The file of an image's name, and what stands behind its last `#`: a medical file's slice.

    Args:
        name: as a record gives it.
        root: the data root, to look there whether a file without a medical suffix is DICOM; None
            goes by suffixes alone. Names without `#`, and those of pictures, are not looked up.
    """
    path, mark, selection = name.rpartition("#")
    if not mark or name.lower().endswith(PLAIN_SUFFIXES):
        return name, ""
    if path.lower().endswith(MEDICAL_SUFFIXES):
        return path, selection
    if root is not None:
        with contextlib.suppress(DataError):  # no such file, or none that may be opened
            if is_medical(_resolve(root, path, name)):
                return path, selection
    return name, ""


def resolve_image(root: str | os.PathLike[str], name: str) -> str:
    """The image's path without links, which must lie inside the data root.

    Raises:
        DataError: an absolute path, one with a `..` in it, links out of the root, a missing file.
    """
    return _resolve(root, split_name(name, root)[0], name)


def _resolve(root: str | os.PathLike[str], relative: str, name: str) -> str:
    """The real path of a file under the root; errors give the whole `name`."""
    try:
        base = _real_folder(os.path.abspath(root))
        if os.path.isabs(relative):
            raise DataError(f"image {name!r} is an absolute path and lies outside the data root")
        if ".." in relative.replace(os.sep, "/").split("/"):
            raise DataError(
                f"image {name!r} goes up with '..': what lies outside the data root is refused; "
                f"write the path from {base} down"
            )
        path = _below(base, relative)
        if path is None:
            path = os.path.realpath(os.path.join(base, relative), strict=True)
            if path != base and not path.startswith(base.rstrip("/") + "/"):
                raise DataError(f"image {name!r} lies outside the data root {base}")
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DataError(f"image {name!r} is not a file under {base}")
    except FileNotFoundError:
        raise DataError(f"image {name!r} does not exist under {base}") from None
    except (OSError, RuntimeError) as error:  # no permission, a name too long, a ring of links
        raise DataError(f"image {name!r} cannot be reached under {root}: {error}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image {name!r} is no path: {error}") from None
    return path


def _below(base: str, relative: str) -> str | None:
    """The path of a file that no link leads to; None where there is one, or anything unusual."""
    parts = relative.split("/")
    if os.sep != "/" or not {"", ".", ".."}.isdisjoint(parts):
        return None
    path = base.rstrip("/")
    for part in parts:
        path = f"{path}/{part}"
        mode = os.lstat(path).st_mode
        if not stat.S_ISDIR(mode):
            break
    return path if stat.S_ISREG(mode) and part is parts[-1] else None


@lru_cache(maxsize=16)
def _real_folder(folder: str) -> str:
    """The data root without links; a root exchanged later only makes its images be refused."""
    return os.path.realpath(folder)


def load_image(root: str | os.PathLike[str], name: str) -> Image.Image:
    """Open and decode an image as RGB, turned upright as its EXIF note says.

    Grey images of more than 8 bits are stretched from their least to their largest value, see
    `to_rgb`; transparent pixels become white.

    Args:
        root: the data root.
        name: path relative to it; for medical files with a selection of the slice behind `#`.

    Raises:
        DataError: outside the root, missing, too large, truncated, or no image.
        SetupError: a DICOM or NIfTI file, and the packages of the extra `medical` are missing.
    """
    path = resolve_image(root, name)
    if is_medical(path):
        from clinkd.data.medical import load_slice  # here: pydicom and nibabel are an extra

        return load_slice(Path(path), name, split_name(name, root)[1], MAX_PIXELS)
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(name, *image.size)
            if image.format == "PNG":
                check_png_end(path, name)
            return to_rgb(_upright(image))
    except DataError:
        raise
    except Exception as error:  # of PIL's readers each has its own: struct.error, TypeError, …
        raise DataError(f"image {name!r} cannot be decoded (truncated?): {error}") from None


def image_size(
    root: str | os.PathLike[str], name: str, *, png_end: bool = False
) -> tuple[int, int]:
    """Width and height of what `load_image` would return, read from the file's header alone.

    Args:
        png_end: make sure as well that a PNG has its last chunk.

    Raises:
        DataError, SetupError: as `load_image`, but damage behind the header goes unseen.
    """
    path = resolve_image(root, name)
    if is_medical(path):
        from clinkd.data.medical import slice_size

        return slice_size(Path(path), name, split_name(name, root)[1], MAX_PIXELS)
    try:
        head, end = _ends(path)
        if (plain := plain_size(head)) is not None:
            _check_pixels(name, *plain)
            if png_end and end != END:
                check_png_end(path, name)
            return plain
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(name, *image.size)
            if png_end and image.format == "PNG":
                check_png_end(path, name)
            return _upright_size(image)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"image {name!r} has no readable header: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    """The decoded image, turned as its note says."""
    turn = _TURNS.get(_orientation(image))  # before the pixels are read, as `_upright_size` does
    if image.format == "TIFF":  # turns itself as it is decoded
        return ImageOps.exif_transpose(image)
    return image.transpose(turn) if turn is not None else image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """The size of what `_upright` returns, of an image that is not decoded yet."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # newer versions of PIL have turned its `size` already
        width, height = int(image.tag_v2[_WIDTH]), int(image.tag_v2[_HEIGHT])
    return (height, width) if _orientation(image) in _ASIDE else (width, height)


def _orientation(image: Image.Image) -> int:
    """The header's note which side is up, 1 without one; none behind a PNG's pixels counts."""
    if image.format != "TIFF" and _NOTES.isdisjoint(image.info):
        return 1
    # not `image.getexif()`, which decodes a PNG to look behind its pixels
    found = Image.Image.getexif(image).get(_ORIENTATION)
    return found if isinstance(found, int) else 1


def is_medical(path: str) -> bool:
    """Whether a file is DICOM or NIfTI: by its name, or by the mark that DICOM files carry."""
    lower = os.path.basename(path).lower()
    if lower.endswith(MEDICAL_SUFFIXES):
        return True
    if lower.endswith(PLAIN_SUFFIXES):
        return False
    # exports often have a number for a name, or a maker's suffix
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. PIL alone would clip 16-bit grey at 255 and show what transparency hides."""
    if image.mode == "1" or image.mode.startswith(("I", "F")):
        if image.mode == "1":
            return image.convert("RGB")
        return stretch(image).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def stretch(image: Image.Image) -> Image.Image:
    """A grey image of many bits as 8-bit grey, from its least value (0) to its largest (255)."""
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    scaled = (np.where(finite, values, low) - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def check_png_end(path: str, name: str) -> None:
    """Make sure that a PNG has its last chunk: PIL does not miss it, and half of what precedes it.

    Raises:
        DataError: it is cut off.
    """
    with open(path, "rb") as file:
        if _ends(path)[1] != END and END not in file.read():  # other bytes may follow the end
            raise DataError(f"image {name!r} cannot be decoded (truncated?): its end is missing")


def _ends(path: str) -> tuple[bytes, bytes]:
    """The first bytes of a file, enough for `plain_size`, and its last ones."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        return os.pread(file, HEAD_BYTES, 0), os.pread(file, len(END), max(0, size - len(END)))
    finally:
        os.close(file)


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"image {name!r} has {width} × {height} pixels, over {MAX_PIXELS}")
