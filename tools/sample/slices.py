"""One image of the set, and how volumes become images."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LONG_SIDE = 240  # pixels of the longer side of a stored image
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Slice:
    """An image with what is known of it.

    Attributes:
        key: file stem; its prefix up to the first "_" is the modality, as in Med-GRIT.
        pixels: uint8 [H, W] or [H, W, 3]; patient's right on the left side, front or head on top.
        masks: structure name to bool [H, W].
        volume: what it was cut from; its images of train and test lie apart.
        group: `volume` and, where one volume serves both splits, its slab.
        what: words for the description: modality, plane, region.
        slice_mm: place along the cutting axis, in mm from the volume's first slice.
    """

    key: str
    pixels: NDArray[np.uint8]
    masks: dict[str, Mask]
    volume: str
    group: str
    split: str
    what: dict[str, str]
    source: str
    slice_mm: float | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def modality(self) -> str:
        return self.key.split("_", 1)[0]


def window(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Map low…high to 0…255."""
    scaled = (values - low) / max(high - low, 1e-6)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def percentile_window(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Window between the 1st and 99.5th percentile."""
    low, high = np.percentile(values, [1, 99.5])
    return window(values, float(low), float(high))


def resize(pixels: NDArray[np.uint8], spacing: tuple[float, float]) -> NDArray[np.uint8]:
    """Square pixels, the longer side LONG_SIDE; spacing is (row, column) in mm."""
    return np.asarray(Image.fromarray(pixels).resize(_size(pixels.shape, spacing), _FILTER))


def resize_mask(mask: Mask, spacing: tuple[float, float]) -> Mask:
    """The same for a mask."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize(_size(mask.shape, spacing), Image.Resampling.BILINEAR)) > 127


_FILTER = Image.Resampling.BICUBIC


def _size(shape: tuple[int, ...], spacing: tuple[float, float]) -> tuple[int, int]:
    height, width = shape[0] * spacing[0], shape[1] * spacing[1]
    scale = LONG_SIDE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def axial(volume: NDArray, z: int) -> NDArray:
    """Axial slice of a volume in RAS+ order, patient's right on the left side, front on top."""
    return np.ascontiguousarray(volume[::-1, ::-1, z].T)


def slabs(
    count: int,
    spacing: float,
    train_mm: float,
    gap_mm: float,
    test_mm: float,
    offset_mm: float = 0.0,
) -> Iterator[tuple[int, str, int]]:
    """Deal slices out along an axis: train, gap, test, gap, train, …

    The first slice lies `offset_mm` inside the first slab of the train split.

    Yields:
        index, split and the number of the slab; slices of gaps are left out.
    """
    period = train_mm + gap_mm + test_mm + gap_mm
    for index in range(count):
        number, place = divmod(index * spacing + offset_mm, period)
        if place < train_mm:
            yield index, "train", int(number)
        elif train_mm + gap_mm <= place < train_mm + gap_mm + test_mm:
            yield index, "test", int(number)
