"""One frame of a DICOM file as a picture."""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
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


def _open_dicom(
    path: Path, name: str, selection: str, max_pixels: int, *, pixels: bool
) -> tuple[Any, int, tuple[float, float] | None]:
    """The data set, the number of the frame, and the window that is asked for."""
    try:
        import pydicom
    except ImportError as error:
        raise missing_package("pydicom", name, error) from None
    data = pydicom.dcmread(path, stop_before_pixels=not pixels)
    for key in ("Rows", "Columns"):
        if not data.get(key):
            raise DataError(f"image {name!r} is a DICOM file without an image ({key} is missing)")
    require_pixels(name, int(data.Columns), int(data.Rows), max_pixels)
    frames = int(data.get("NumberOfFrames") or 1)
    selected = read_selection(name, selection, ("frame", "window"))
    if "frame" not in selected and frames > 1:
        raise DataError(f"image {name!r} has {frames} frames; say which: '#0' … '#{frames - 1}'")
    frame = require_number(name, "frame", selected.get("frame", 0), frames)
    return data, frame, selected.get("window")


def dicom_size(path: Path, name: str, selection: str, max_pixels: int) -> tuple[int, int]:
    data, *_ = _open_dicom(path, name, selection, max_pixels, pixels=False)
    return int(data.Columns), int(data.Rows)


def load_dicom(path: Path, name: str, selection: str, max_pixels: int) -> Image.Image:
    data, frame, window = _open_dicom(path, name, selection, max_pixels, pixels=True)
    from pydicom import pixels

    kind = str(data.get("PhotometricInterpretation", "MONOCHROME2"))
    try:
        values = pixels.pixel_array(data, index=frame)  # colour comes as RGB
    except RuntimeError as error:
        if "missing" in str(error) or "plugin" in str(error):
            raise missing_package(
                "a decoder for its compression", name, ImportError(error)
            ) from None
        raise
    if not kind.startswith("MONOCHROME"):
        bits = int(data.BitsStored)
        if kind == "PALETTE COLOR":
            values = pixels.apply_color_lut(values, data)
            bits = 8 * values.dtype.itemsize
        return Image.fromarray((values >> max(bits - 8, 0)).astype(np.uint8)).convert("RGB")
    grey = _grey(values, data, frame, window, pixels)
    if kind == "MONOCHROME1":  # its least value means white
        grey = grey.point(lambda v: 255 - v)
    return grey


def _grey(
    values: Any, data: Any, frame: int, window: tuple[float, float] | None, pixels: ModuleType
) -> Image.Image:
    """Rescale to the scanner's unit, then the window: asked for, the file's own, or all values."""
    inside = ~_padded(values, data)
    source = _functional_groups(data, frame)
    values = pixels.apply_modality_lut(values, source)
    if window is not None:
        return grey_picture(values, window[0] - window[1] / 2, window[0] + window[1] / 2)
    if "VOILUTSequence" in source or "WindowWidth" in source:
        shown = pixels.apply_voi_lut(values, source)
        if "VOILUTSequence" in source:
            bits = int(source.VOILUTSequence[0].LUTDescriptor[2])
            return grey_picture(shown, 0, 2**bits - 1)
        center, width = float(source.WindowCenter), float(source.WindowWidth)
        function = str(source.get("VOILUTFunction") or "LINEAR")
        if function == "SIGMOID":
            return grey_picture(shown, float(shown.min()), float(shown.max()))
        if function == "LINEAR":  # PS3.3 C.11.2.1.2: from c - 0.5 - (w - 1) / 2, w - 1 wide
            center, width = center - 0.5, max(width - 1, 1)
        return grey_picture(values, center - width / 2, center + width / 2)
    known = values[inside] if inside.any() else values
    return grey_picture(values, float(known.min()), float(known.max()))


def _padded(values: Any, data: Any) -> Any:
    """Where pixels fill up the frame: one value, or all between two in either order."""
    first, last = data.get("PixelPaddingValue"), data.get("PixelPaddingRangeLimit")
    if not isinstance(first, int):
        return np.zeros(values.shape, dtype=bool)
    low, high = sorted((first, last if isinstance(last, int) else first))
    return (values >= low) & (values <= high)


def _functional_groups(data: Any, frame: int) -> Any:
    """The data set with the window and rescale of this frame: enhanced files keep them apart."""
    import pydicom

    flat = pydicom.Dataset()
    flat.file_meta = data.file_meta  # says in which order the bytes of a lookup table stand
    _take(flat, (e for e in data if e.tag.group == 0x0028))
    groups = [data.get("SharedFunctionalGroupsSequence"), None]
    per_frame = data.get("PerFrameFunctionalGroupsSequence")
    if per_frame and frame < len(per_frame):
        groups[1] = [per_frame[frame]]
    for group in groups:
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if group and group[0].get(sequence):
                _take(flat, group[0][sequence].value[0])
    _complete(flat)
    return flat


def _take(flat: Any, elements: Iterable[Any]) -> None:
    """Copy elements that have a value: many programs write the others empty, as if absent."""
    flat.update({e.tag: e for e in elements if not e.is_empty})


def _complete(flat: Any) -> None:
    """Leave the first whole window, whole lookup tables, and both or no numbers of rescaling."""
    for sequence in ("ModalityLUTSequence", "VOILUTSequence"):
        table = flat[sequence].value[0] if sequence in flat else {}
        if any(k not in table or table[k].is_empty for k in ("LUTDescriptor", "LUTData")):
            flat.pop(sequence, None)
    keys = ("WindowCenter", "WindowWidth")
    windows = zip(*(_listed(flat.get(key)) for key in keys), strict=False)
    # some write a width of 0 where they mean none
    window = next((w for w in windows if None not in w and "" not in w and w[1] > 0), None)
    for index, key in enumerate(keys):
        flat.pop(key, None)
        if window is not None:
            setattr(flat, key, window[index])
    for key, other, neutral in (
        ("RescaleSlope", "RescaleIntercept", 0),
        ("RescaleIntercept", "RescaleSlope", 1),
    ):
        if key in flat and other not in flat:
            setattr(flat, other, neutral)


def _listed(value: Any) -> list[Any]:
    """One or several values of an element; none where it is absent."""
    if value is None:
        return []
    return [value] if isinstance(value, (int, float)) else list(value)
