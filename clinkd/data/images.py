"""Reading images safely: inside the data root, whole, and not too large."""

import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from clinkd.errors import DataError

MAX_PIXELS = 64 << 20  # decoded pixels of one image; a larger one is refused, not decoded


def resolve_image(root: str | os.PathLike[str], name: str) -> Path:
    """The image's path, which must lie inside the data root.

    Raises:
        DataError: an absolute path, one that leads out of the root (`..`, links), a missing file.
    """
    base = Path(root).resolve()
    path = (base / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(base):
        raise DataError(f"image {name!r} lies outside the data root {base}")
    if not path.is_file():
        raise DataError(f"image {name!r} does not exist under {base}")
    return path


def load_image(root: str | os.PathLike[str], name: str) -> Image.Image:
    """Open and decode an image as RGB.

    Raises:
        DataError: outside the root, missing, too large, truncated, or no image.
    """
    path = resolve_image(root, name)
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"image {name!r} has {image.width} × {image.height} pixels, over {MAX_PIXELS}"
                )
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise DataError(f"image {name!r} cannot be decoded (truncated?): {error}") from None
