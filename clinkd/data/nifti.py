"""One slice of a NIfTI volume as a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clinkd.data.slices import (
    grey_picture,
    missing_package,
    read_selection,
    require_number,
    require_pixels,
)
from clinkd.errors import DataError

MAX_VOXELS = 1 << 31  # of a file; guards against headers that promise terabytes
PERCENTILES = (0.5, 99.5)  # of a slice without window: what becomes black and white


def _open_nifti(
    path: Path, name: str, selection: str, max_pixels: int
) -> tuple[Any, Any, dict[str, Any]]:
    """The image, for each of its first three axes (axis in RAS+, direction), and the selection."""
    try:
        import nibabel
    except ImportError as error:
        raise missing_package("nibabel", name, error) from None
    image: Any = nibabel.load(path)
    if len(image.shape) < 3 or min(image.shape) < 1:
        raise DataError(f"image {name!r} is no volume: its shape is {image.shape}")
    if np.prod(image.shape, dtype=np.float64) > MAX_VOXELS:
        raise DataError(f"image {name!r} has over {MAX_VOXELS} voxels: {image.shape}")
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"image {name!r} holds {image.get_data_dtype()} voxels, not grey values")
    orientation = nibabel.io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise DataError(f"image {name!r} has an affine that does not say how the volume lies")
    selected = read_selection(name, selection, ("axis", "index", "volume", "window"))
    for key in ("axis", "index"):
        if key not in selected:
            raise DataError(f"image {name!r} is a volume; say which slice: '#axis=2,index=30'")
    axis = require_number(name, "axis", selected["axis"], 3)
    raw = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    require_number(name, f"index on axis {axis}", selected["index"], image.shape[raw])
    volumes = int(np.prod(image.shape[3:]))
    if volumes > 1 and "volume" not in selected:
        raise DataError(f"image {name!r} has {volumes} volumes; say which: 'volume=0'")
    require_number(name, "volume", selected.get("volume", 0), volumes)
    width, height = _displayed_shape(image.shape, orientation, axis)
    require_pixels(name, width, height, max_pixels)
    return image, orientation, selected


def _displayed_shape(shape: Any, orientation: Any, axis: int) -> tuple[int, int]:
    """Width and height: of the two axes of RAS+ left, the first is drawn across."""
    length = {int(orientation[raw, 0]): int(shape[raw]) for raw in range(3)}
    across, up = (k for k in range(3) if k != axis)
    return length[across], length[up]


def nifti_size(path: Path, name: str, selection: str, max_pixels: int) -> tuple[int, int]:
    image, orientation, selected = _open_nifti(path, name, selection, max_pixels)
    return _displayed_shape(image.shape, orientation, selected["axis"])


def load_nifti(path: Path, name: str, selection: str, max_pixels: int) -> Image.Image:
    image, orientation, selected = _open_nifti(path, name, selection, max_pixels)
    axis = selected["axis"]
    raw = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    index = selected["index"]
    where: list[Any] = [slice(None)] * 3
    where[raw] = index if orientation[raw, 1] > 0 else image.shape[raw] - 1 - index
    where += np.unravel_index(selected.get("volume", 0), image.shape[3:])
    values = np.asarray(image.dataobj[tuple(where)], dtype=np.float64)  # only this slice is read
    left = [r for r in range(3) if r != raw]
    for position, r in enumerate(left):
        if orientation[r, 1] < 0:
            values = np.flip(values, axis=position)
    if orientation[left[0], 0] > orientation[left[1], 0]:
        values = values.T
    # now [across, up] of RAS+; the patient's right, or the front, comes to the left
    values = values[::-1, ::-1].T
    if "window" in selected:
        center, width = selected["window"]
        return grey_picture(values, center - width / 2, center + width / 2)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, PERCENTILES) if finite.size else (0.0, 0.0)
    if not high > low and finite.size:
        low, high = finite.min(), finite.max()
    return grey_picture(values, float(low), float(high))
