"""Single slices of DICOM and NIfTI files, as the 8-bit RGB pictures that a vision model takes.

| name | what |
| --- | --- |
| `scan.dcm` | the one frame of a DICOM file |
| `cine.dcm#3` or `cine.dcm#frame=3` | frame 3 of several, counted from 0 |
| `ct.dcm#window=40:400` | shown with window centre 40 and width 400 instead of the file's own |
| `ct.nii.gz#axis=2,index=30` | slice 30 (from 0) across axis 2 of the volume turned to RAS+ |
| `fmri.nii#axis=2,index=30,volume=5,window=50:350` | of the sixth volume of a series |

Axis 0 runs from left to right (its slices are sagittal), 1 from back to front (coronal), 2 from
feet to head (axial), whatever the order in the file. Pictures are shown as radiologists do: front
or head at the top, and the patient's right (in sagittal ones the front) at the left.
"""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from clinkd.errors import DataError, SetupError

MAX_VOXELS = 1 << 31  # of a NIfTI file; guards against headers that promise terabytes
PERCENTILES = (0.5, 99.5)  # of a NIfTI slice without window: what becomes black and white


def load_slice(path: Path, name: str, max_pixels: int) -> Image.Image:
    """Decode one slice as RGB.

    Args:
        path: the file.
        name: as the record gives it, with the selection behind `#`.
        max_pixels: a larger slice is refused before it is decoded.

    Raises:
        DataError: a damaged file, or a selection that does not fit it.
        SetupError: the extra `medical` is not installed.
    """
    decode = _load_nifti if _is_nifti(path) else _load_dicom
    picture: Image.Image = _guarded(decode, path, name, max_pixels)
    return picture


def slice_size(path: Path, name: str, max_pixels: int) -> tuple[int, int]:
    """Width and height of the slice, from the header alone; raises as `load_slice`."""
    measure = _nifti_size if _is_nifti(path) else _dicom_size
    size: tuple[int, int] = _guarded(measure, path, name, max_pixels)
    return size


def _guarded(decode: Any, path: Path, name: str, max_pixels: int) -> Any:
    """Call a decoder; whatever a hostile file makes its library say becomes one DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of each value outside the standard
            return decode(path, name, max_pixels)
    except (DataError, SetupError):
        raise
    except Exception as error:
        raise DataError(f"image {name!r} cannot be decoded (truncated?): {error}") from error


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _selection(name: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    """What stands behind `#`, as whole numbers and, for `window`, a (centre, width)."""
    from clinkd.data.images import split_name

    out: dict[str, Any] = {}
    text = split_name(name)[1]
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


def _number(name: str, what: str, value: int, count: int) -> int:
    if not 0 <= value < count:
        raise DataError(f"image {name!r}: {what} must be 0…{count - 1}, got {value}")
    return value


def _picture(values: Any, low: float, high: float) -> Image.Image:
    """Grey values as RGB, `low` and below black, `high` and above white."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=low, posinf=high, neginf=low)
    scale = 255.0 / (high - low) if high > low else 0.0
    grey = np.rint(np.clip((values - low) * scale, 0, 255)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DataError(f"image {name!r} has {width} × {height} pixels")
    if width * height > max_pixels:
        raise DataError(f"image {name!r} has {width} × {height} pixels, over {max_pixels}")


def _missing(package: str, name: str, error: ImportError) -> SetupError:
    return SetupError(
        f"image {name!r} needs {package}, which is not installed ({error}): "
        "pip install 'clinkd[medical]'"
    )


# DICOM -------------------------------------------------------------------------------------


def _open_dicom(path: Path, name: str, max_pixels: int, *, pixels: bool) -> tuple[Any, int]:
    """The data set and the number of the frame."""
    try:
        import pydicom
    except ImportError as error:
        raise _missing("pydicom", name, error) from None
    data = pydicom.dcmread(path, stop_before_pixels=not pixels)
    for key in ("Rows", "Columns"):
        if not data.get(key):
            raise DataError(f"image {name!r} is a DICOM file without an image ({key} is missing)")
    _check_pixels(name, int(data.Columns), int(data.Rows), max_pixels)
    frames = int(data.get("NumberOfFrames") or 1)
    selected = _selection(name, ("frame", "window"))
    if "frame" not in selected and frames > 1:
        raise DataError(f"image {name!r} has {frames} frames; say which: '#0' … '#{frames - 1}'")
    return data, _number(name, "frame", selected.get("frame", 0), frames)


def _dicom_size(path: Path, name: str, max_pixels: int) -> tuple[int, int]:
    data, _ = _open_dicom(path, name, max_pixels, pixels=False)
    return int(data.Columns), int(data.Rows)


def _load_dicom(path: Path, name: str, max_pixels: int) -> Image.Image:
    data, frame = _open_dicom(path, name, max_pixels, pixels=True)
    from pydicom import pixels

    kind = str(data.get("PhotometricInterpretation", "MONOCHROME2"))
    try:
        values = pixels.pixel_array(data, index=frame)  # colour comes as RGB
    except RuntimeError as error:
        if "missing" in str(error) or "plugin" in str(error):
            raise _missing("a decoder for its compression", name, ImportError(error)) from None
        raise
    if not kind.startswith("MONOCHROME"):
        bits = int(data.BitsStored)
        if kind == "PALETTE COLOR":
            values = pixels.apply_color_lut(values, data)
            bits = 8 * values.dtype.itemsize
        return Image.fromarray((values >> max(bits - 8, 0)).astype(np.uint8)).convert("RGB")
    grey = _grey(values, data, frame, _selection(name, ("frame", "window")).get("window"), pixels)
    if kind == "MONOCHROME1":  # its least value means white
        grey = grey.point(lambda v: 255 - v)
    return grey


def _grey(
    values: Any, data: Any, frame: int, window: tuple[float, float] | None, pixels: ModuleType
) -> Image.Image:
    """Rescale to the scanner's unit, then the window: asked for, the file's own, or all values."""
    padding = data.get("PixelPaddingValue")
    inside = values != padding if isinstance(padding, int) else np.ones(values.shape, dtype=bool)
    source = _functional_groups(data, frame)
    values = pixels.apply_modality_lut(values, source)
    if window is not None:
        return _picture(values, window[0] - window[1] / 2, window[0] + window[1] / 2)
    if "VOILUTSequence" in source or "WindowWidth" in source:
        shown = pixels.apply_voi_lut(values, source)
        if "VOILUTSequence" in source:
            bits = int(source.VOILUTSequence[0].LUTDescriptor[2])
            return _picture(shown, 0, 2**bits - 1)
        center, width = _first(source.WindowCenter), _first(source.WindowWidth)
        function = str(source.get("VOILUTFunction") or "LINEAR")
        if function == "SIGMOID":
            return _picture(shown, float(shown.min()), float(shown.max()))
        if function == "LINEAR":  # PS3.3 C.11.2.1.2: from c - 0.5 - (w - 1) / 2, w - 1 wide
            center, width = center - 0.5, max(width - 1, 1)
        return _picture(values, center - width / 2, center + width / 2)
    known = values[inside] if inside.any() else values
    return _picture(values, float(known.min()), float(known.max()))


def _first(value: Any) -> float:
    """The first of one or several values: a file may offer several windows."""
    return float(value if isinstance(value, (int, float)) else value[0])


def _functional_groups(data: Any, frame: int) -> Any:
    """The data set with the window and rescale of this frame: enhanced files keep them apart."""
    import pydicom

    flat = pydicom.Dataset()
    flat.update({e.tag: e for e in data if e.tag.group == 0x0028})
    groups = [data.get("SharedFunctionalGroupsSequence"), None]
    per_frame = data.get("PerFrameFunctionalGroupsSequence")
    if per_frame and frame < len(per_frame):
        groups[1] = [per_frame[frame]]
    for group in groups:
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if group and sequence in group[0]:
                flat.update({e.tag: e for e in group[0][sequence].value[0]})
    return flat


# NIfTI -------------------------------------------------------------------------------------


def _open_nifti(path: Path, name: str, max_pixels: int) -> tuple[Any, Any, dict[str, Any]]:
    """The image, for each of its first three axes (axis in RAS+, direction), and the selection."""
    try:
        import nibabel
    except ImportError as error:
        raise _missing("nibabel", name, error) from None
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
    selected = _selection(name, ("axis", "index", "volume", "window"))
    for key in ("axis", "index"):
        if key not in selected:
            raise DataError(f"image {name!r} is a volume; say which slice: '#axis=2,index=30'")
    axis = _number(name, "axis", selected["axis"], 3)
    raw = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    _number(name, f"index on axis {axis}", selected["index"], image.shape[raw])
    volumes = int(np.prod(image.shape[3:]))
    if volumes > 1 and "volume" not in selected:
        raise DataError(f"image {name!r} has {volumes} volumes; say which: 'volume=0'")
    _number(name, "volume", selected.get("volume", 0), volumes)
    width, height = _displayed_shape(image.shape, orientation, axis)
    _check_pixels(name, width, height, max_pixels)
    return image, orientation, selected


def _displayed_shape(shape: Any, orientation: Any, axis: int) -> tuple[int, int]:
    """Width and height: of the two axes of RAS+ left, the first is drawn across."""
    length = {int(orientation[raw, 0]): int(shape[raw]) for raw in range(3)}
    across, up = (k for k in range(3) if k != axis)
    return length[across], length[up]


def _nifti_size(path: Path, name: str, max_pixels: int) -> tuple[int, int]:
    image, orientation, selected = _open_nifti(path, name, max_pixels)
    return _displayed_shape(image.shape, orientation, selected["axis"])


def _load_nifti(path: Path, name: str, max_pixels: int) -> Image.Image:
    image, orientation, selected = _open_nifti(path, name, max_pixels)
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
        return _picture(values, center - width / 2, center + width / 2)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, PERCENTILES) if finite.size else (0.0, 0.0)
    if not high > low and finite.size:
        low, high = finite.min(), finite.max()
    return _picture(values, float(low), float(high))
