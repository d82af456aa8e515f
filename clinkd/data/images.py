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

from clinkd.data.png import END, HEAD_BYTES, plain_size
from clinkd.errors import DataError

MAX_PIXELS = 64 << 20  # decoded pixels of one image; a larger one is refused, not decoded
# no formats that start other programs or read other files, as EPS does
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "JPEG2000")
MEDICAL_SUFFIXES = (".dcm", ".dicom", ".nii", ".nii.gz")
PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".jp2")
_ORIENTATION = 0x0112  # EXIF tag; 5…8 exchange width and height


def split_name(name: str) -> tuple[str, str]:
    """The file of an image's name, and what stands behind `#`: only medical files have that."""
    path, mark, selection = name.rpartition("#")
    if mark and path.lower().endswith(MEDICAL_SUFFIXES):
        return path, selection
    return name, ""


def resolve_image(root: str | os.PathLike[str], name: str) -> str:
    """The image's path, which must lie inside the data root.

    Raises:
        DataError: an absolute path, one that leads out of the root (`..`, links), a missing file.
    """
    relative, _ = split_name(name)
    try:
        base = _real_folder(os.path.abspath(root))
        if os.path.isabs(relative):
            raise DataError(f"image {name!r} is an absolute path and lies outside the data root")
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

        return load_slice(Path(path), name, MAX_PIXELS)
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(name, *image.size)
            if image.format == "PNG":
                check_png_end(path, name)
            return to_rgb(ImageOps.exif_transpose(image))
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

        return slice_size(Path(path), name, MAX_PIXELS)
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
            width, height = image.size
            turned = image.format in ("JPEG", "TIFF", "WEBP") or "exif" in image.info
            if turned and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8):
                return height, width
            return width, height
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"image {name!r} has no readable header: {error}") from None


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
