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
from typing import Any

from PIL import Image

from clinkd.data.dicom import dicom_size, load_dicom
from clinkd.data.nifti import load_nifti, nifti_size
from clinkd.errors import DataError, SetupError


def load_slice(path: Path, name: str, selection: str, max_pixels: int) -> Image.Image:
    """Decode one slice as RGB.

    Args:
        path: the file.
        name: as the record gives it, for errors.
        selection: what stands behind its `#`.
        max_pixels: a larger slice is refused before it is decoded.

    Raises:
        DataError: a damaged file, or a selection that does not fit it.
        SetupError: the extra `medical` is not installed.
    """
    decode = load_nifti if _is_nifti(path) else load_dicom
    picture: Image.Image = _guarded(decode, path, name, selection, max_pixels)
    return picture


def slice_size(path: Path, name: str, selection: str, max_pixels: int) -> tuple[int, int]:
    """Width and height of the slice, from the header alone; raises as `load_slice`."""
    measure = nifti_size if _is_nifti(path) else dicom_size
    size: tuple[int, int] = _guarded(measure, path, name, selection, max_pixels)
    return size


def _guarded(decode: Any, path: Path, name: str, selection: str, max_pixels: int) -> Any:
    """Call a decoder; whatever a hostile file makes its library say becomes one DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of each value outside the standard
            return decode(path, name, selection, max_pixels)
    except (DataError, SetupError):
        raise
    except Exception as error:
        raise DataError(f"image {name!r} cannot be decoded (truncated?): {error}") from error


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))
