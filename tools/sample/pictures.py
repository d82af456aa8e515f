"""Images without masks: what they show comes from their metadata."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_rescale

from sample.slices import Slice, percentile_window, resize, window

# file, key, split, modality in words, region, frames (None: a single one)
_DICOM = (
    ("RG1_UNCR.dcm", "x_chest", "train", "X-ray", "chest", None),
    ("RG3_UNCR.dcm", "x_leg", "test", "X-ray", "lower leg", None),
    ("MR2_UNCR.dcm", "mr_shoulder", "train", "MR", "shoulder", None),
    ("693_UNCR.dcm", "ct_head693", "train", "CT", "head", None),
    ("explicit_VR-UN.dcm", "ct_pancreas", "train", "CT", "abdomen", None),
    ("J2K_pixelrep_mismatch.dcm", "ct_headj2k", "test", "CT", "head", None),
    ("US1_UNCR.dcm", "ultrasound_node", "test", "ultrasound", "a lymph node", None),
    ("gdcm-US-ALOKA-16.dcm", "ultrasound_aloka", "train", "ultrasound", "soft tissue", None),
    (
        "color3d_jpeg_baseline.dcm",
        "ultrasound_echo",
        "train",
        "ultrasound",
        "the heart",
        tuple(range(0, 120, 10)),
    ),
    ("color-px.dcm", "ultrasound_doppler", "test", "ultrasound", "the heart", None),
    ("JPEG2000_UNC.dcm", "nm_bonescan", "train", "nuclear medicine", "the whole body", None),
)

_BURNED_IN = {"US1_UNCR.dcm": slice(108, 336)}  # rows without the name of the site and the node


def upright(pixels: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Patient's right on the left side, front or head on top, as far as the file says how it lies.

    ImageOrientationPatient counts to the left, to the back and to the head; PatientOrientation
    names where rows and columns run to.
    """
    cosines = dataset.get("ImageOrientationPatient")
    if cosines is not None:
        row, column = np.asarray(cosines, dtype=float).reshape(2, 3)
        along, down = int(np.argmax(np.abs(row))), int(np.argmax(np.abs(column)))
        mirrored = along == 0 and row[0] < 0
        upside_down = (down == 1 and column[1] < 0) or (down == 2 and column[2] > 0)
    else:
        runs_to = [str(value) for value in dataset.get("PatientOrientation") or ("", "")]
        mirrored = runs_to[0].startswith("R")
        upside_down = runs_to[1].startswith(("A", "H"))
    if mirrored:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels[::-1] if upside_down else pixels)


def _pixels(dataset: pydicom.Dataset, frame: int | None, region: str) -> np.ndarray:
    """One frame as uint8, grey or RGB, dark is dark."""
    array = dataset.pixel_array
    if frame is not None:
        array = array[frame]
    elif dataset.get("NumberOfFrames") not in (None, 1):
        array = array[0]
    if dataset.SamplesPerPixel == 3:
        return np.ascontiguousarray(array.astype(np.uint8))  # pydicom has made RGB of it
    values = apply_rescale(array, dataset).astype(np.float64)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = values.max() - values
    if dataset.Modality == "CT":
        low, high = (-20.0, 100.0) if region == "head" else (-160.0, 240.0)
        return window(values, low, high)
    return percentile_window(values)


def dicom_pictures(*packages: Path) -> Iterator[Slice]:
    """pydicom's test images; several frames of a film lie far apart and in one split."""
    found = {path.name: path for package in packages for path in package.rglob("*.dcm")}
    for name, key, split, modality, region, frames in _DICOM:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(found[name])
            for frame in frames or (None,):
                stem = key if frame is None else f"{key}_f{frame:03d}"
                pixels = upright(_pixels(dataset, frame, region), dataset)
                if name in _BURNED_IN:
                    pixels = np.ascontiguousarray(pixels[_BURNED_IN[name]])
                yield _picture(stem, key, split, modality, region, "pydicom", pixels)


def free_pictures(package: Path) -> Iterator[Slice]:
    """scikit-image's retina, microaneurysms and stained tissue; tissue and retina also in tiles."""
    folder = package / "skimage" / "data"

    def read(name: str) -> np.ndarray:
        return np.asarray(Image.open(folder / name).convert("RGB"))

    source = "scikit-image"
    retina = read("retina.jpg")
    yield _picture(
        "fundus_retina",
        "fundus_retina",
        "train",
        "fundus photograph",
        "the retina",
        source,
        retina,
    )
    for index, (top, left) in enumerate(((150, 150), (150, 700), (650, 150), (650, 700))):
        tile = np.ascontiguousarray(retina[top : top + 600, left : left + 600])
        key = f"fundus_retina_t{index}"
        yield _picture(
            key, "fundus_retina", "train", "fundus photograph", "the retina", source, tile
        )
    aneurysms = read("microaneurysms.png")
    key = "fundus_microaneurysms"
    yield _picture(key, key, "test", "fundus photograph", "the retina", source, aneurysms)
    tissue = read("ihc.png")
    for split, lefts in (("train", (0, 96, 192)), ("test", (384,))):
        for top in range(0, 385, 128):
            for left in lefts:
                tile = np.ascontiguousarray(tissue[top : top + 128, left : left + 128])
                yield _picture(
                    f"microscopy_ihc_{top:03d}_{left:03d}",
                    f"microscopy_ihc_{split}",
                    split,
                    "bright-field microscopy",
                    "stained tissue",
                    source,
                    tile,
                    volume="microscopy_ihc",
                    facts={"left": str(left)},
                )


def _picture(
    key: str,
    group: str,
    split: str,
    modality: str,
    region: str,
    source: str,
    pixels: np.ndarray,
    volume: str | None = None,
    facts: dict[str, str] | None = None,
) -> Slice:
    return Slice(
        key=key,
        pixels=resize(pixels, (1.0, 1.0)),
        masks={},
        volume=volume or group,
        group=group,
        split=split,
        what={"modality": modality, "plane": "", "region": region},
        source=source,
        facts=facts or {},
    )
