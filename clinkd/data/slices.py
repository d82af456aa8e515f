"""What slices of DICOM and NIfTI files share: their selection, limits, grey values as a picture."""

from typing import Any

import numpy as np
from PIL import Image

from clinkd.errors import DataError, SetupError


def read_selection(name: str, text: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    """What stands behind `#`, as whole numbers and, for `window`, a (centre, width)."""
    out: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals and "frame" in allowed:
            key, value = "frame", part
        key = key.strip()
        if key not in allowed or key in out:
            raise DataError(
                f"image {name!r}: behind '#' stands {part!r}; allowed, once each: "
                + ", ".join(
                    f"{k}=CENTRE:WIDTH" if k == "window" else f"{k}=NUMBER" for k in allowed
                )
            )
        try:
            out[key] = _window(value) if key == "window" else int(value)
        except ValueError:
            raise DataError(f"image {name!r}: {key}={value!r} is no number") from None
    return out


def _window(text: str) -> tuple[float, float]:
    center, width = (float(part) for part in text.split(":"))
    if not width > 0:
        raise ValueError
    return center, width


def require_number(name: str, what: str, value: int, count: int) -> int:
    if not 0 <= value < count:
        raise DataError(f"image {name!r}: {what} must be 0…{count - 1}, got {value}")
    return value


def grey_picture(values: Any, low: float, high: float) -> Image.Image:
    """Grey values as RGB, `low` and below black, `high` and above white."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=low, posinf=high, neginf=low)
    scale = 255.0 / (high - low) if high > low else 0.0
    grey = np.rint(np.clip((values - low) * scale, 0, 255)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def require_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DataError(f"image {name!r} has {width} × {height} pixels")
    if width * height > max_pixels:
        raise DataError(f"image {name!r} has {width} × {height} pixels, over {max_pixels}")


def missing_package(package: str, name: str, error: ImportError) -> SetupError:
    return SetupError(
        f"image {name!r} needs {package}, which is not installed ({error}): "
        "pip install 'clinkd[medical]'"
    )
