"""Images with masks: organs, brain regions, lesions, nuclei."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import tifffile

from sample.names import brain_region, organ
from sample.slices import (
    Slice,
    axial,
    percentile_window,
    resize,
    resize_mask,
    slabs,
    window,
)

SOFT_TISSUE = (-160.0, 240.0)  # Hounsfield units
LUNG = (-1350.0, 150.0)
GAP_MM = 15.0  # between a slab of the train split and one of the test split
BRAIN_PLAN = (52.0, GAP_MM, 13.0, 48.0)  # deep nuclei and both ends of the head are trained on
LEAST_AREA = 0.002  # of the image: smaller masks are left out


def _masks(labels: np.ndarray, names: dict[int, str], spacing: tuple[float, float]) -> dict:
    """Masks of one slice by readable name, labels of one name joined, small ones left out."""
    joined: dict[str, np.ndarray] = {}
    for value in np.unique(labels):
        name = names.get(int(value))
        if name is not None:
            joined[name] = joined.get(name, False) | (labels == value)
    masks = {name: resize_mask(mask, spacing) for name, mask in joined.items()}
    return {name: mask for name, mask in masks.items() if mask.mean() >= LEAST_AREA}


def _class_map(package: Path) -> dict[str, dict[int, str]]:
    """TotalSegmentator's label names, read from its source without running it."""
    source = next(package.rglob("map_to_binary.py")).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "class_map":
            return ast.literal_eval(node.value)
    raise SystemExit("totalsegmentator: no class_map in map_to_binary.py")


def _named(package: Path, task: str) -> dict[int, str]:
    pairs = ((value, organ(label)) for value, label in _class_map(package)[task].items())
    return {value: name for value, name in pairs if name is not None}


def _nifti(path: Path) -> tuple[np.ndarray, Any]:
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj), image.header.get_zooms()


def _abdomen(masks: dict[str, Any]) -> str:
    pelvis = {"urinary bladder", "left femur", "right femur", "prostate", "sacrum"}
    upper = {"liver", "spleen", "stomach", "left kidney", "right kidney"}
    if any("lung" in name for name in masks) and not pelvis & set(masks):
        return "lower chest and upper abdomen"
    return "pelvis" if pelvis & set(masks) and not upper & set(masks) else "abdomen"


def totalsegmentator(package: Path) -> Iterator[Slice]:
    """A CT in slabs, an MR in slabs, and a CT of another patient kept for the test split."""
    files = next(package.rglob("reference_files"))
    for name, labels_name, task, modality, plan in (
        (
            "example_ct.nii.gz",
            "example_seg_fast_force_split.nii.gz",
            "total",
            "ct",
            (45.0, GAP_MM, 12.0, 72.0),  # the lungs, at the top, are trained on
        ),
        ("example_mr_sm.nii.gz", "example_seg_mr.nii.gz", "total_mr", "mr", (33.0, GAP_MM, 12.0)),
    ):
        volume, zooms = _nifti(files / name)
        labels, _ = _nifti(files / labels_name)
        names = _named(package, task)
        stem = f"{modality}_totalseg"
        spacing = (float(zooms[1]), float(zooms[0]))
        for z, split, slab in slabs(volume.shape[2], float(zooms[2]), *plan):
            plane = axial(volume, z).astype(np.float64)
            pixels = window(plane, *SOFT_TISSUE) if modality == "ct" else percentile_window(plane)
            masks = _masks(axial(labels, z), names, spacing)
            yield Slice(
                key=f"{stem}_ax_{z:03d}",
                pixels=resize(pixels, spacing),
                masks=masks,
                volume=stem,
                group=f"{stem}_{split}_{slab}",
                split=split,
                what={"modality": modality.upper(), "plane": "axial", "region": _abdomen(masks)},
                source="totalsegmentator",
                slice_mm=z * float(zooms[2]),
            )
    yield from _dicom_ct(package, files)


def _dicom_ct(package: Path, files: Path) -> Iterator[Slice]:
    labels, zooms = _nifti(files / "example_seg_dicom.nii.gz")
    slices = [pydicom.dcmread(path) for path in sorted((files / "example_ct_dicom").iterdir())]
    slices.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
    names = _named(package, "total")
    spacing = (float(zooms[1]), float(zooms[0]))
    for z in range(0, len(slices), 2):
        dataset = slices[z]
        if [round(float(c)) for c in dataset.ImageOrientationPatient] != [1, 0, 0, 0, 1, 0]:
            raise SystemExit("the DICOM slices do not lie as expected: right, back")
        plane = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        masks = _masks(axial(labels, z), names, spacing)
        yield Slice(
            key=f"ct_totalsegdicom_ax_{z:03d}",
            pixels=resize(window(plane, *SOFT_TISSUE), spacing),
            masks=masks,
            volume="ct_totalsegdicom",
            group="ct_totalsegdicom",
            split="test",
            what={"modality": "CT", "plane": "axial", "region": _abdomen(masks)},
            source="totalsegmentator",
            slice_mm=z * float(zooms[2]),
        )


def brain_atlas(package: Path) -> Iterator[Slice]:
    """One subject's T1 with AAL regions, in axial slabs."""
    folder = package / "usr" / "share" / "mricron" / "templates"
    volume, zooms = _nifti(folder / "ch2.nii.gz")
    labels, _ = _nifti(folder / "aal.nii.gz")
    names = {}
    for line in (folder / "aal.nii.txt").read_text(encoding="utf-8").splitlines():
        value, _, label = line.partition(" ")
        if label and (name := brain_region(label.split()[0])) is not None:
            names[int(value)] = name
    pixels = percentile_window(volume.astype(np.float64))
    spacing = (float(zooms[1]), float(zooms[0]))
    for z, split, slab in slabs(volume.shape[2], float(zooms[2]), *BRAIN_PLAN):
        if z % 2 or not 12 <= z <= 160:
            continue
        masks = _masks(axial(labels, z), names, spacing)
        if len(masks) < 3:
            continue
        yield Slice(
            key=f"mr_brainatlas_ax_{z:03d}",
            pixels=resize(axial(pixels, z), spacing),
            masks=masks,
            volume="mr_brainatlas",
            group=f"mr_brainatlas_{split}_{slab}",
            split=split,
            what={"modality": "T1-weighted MR", "plane": "axial", "region": "head"},
            source="mricron-data",
            slice_mm=z * float(zooms[2]),
        )


def lesions(package: Path) -> Iterator[Slice]:
    """Tumours in CT and MR; a whole volume belongs to one split."""
    folder = next(package.rglob("lung1_image.nrrd")).parent
    for name, modality, region, lesion, split in (
        ("lung1", "ct", "chest", "lung lesion", "test"),
        ("lung2", "ct", "chest", "lung lesion", "train"),
        ("brain1", "mr", "head", "brain lesion", "train"),
        ("brain2", "mr", "head", "brain lesion", "test"),
        ("breast1", "mr", "breast", "breast lesion", "train"),
    ):
        volume, header = nrrd.read(str(folder / f"{name}_image.nrrd"))
        labels, _ = nrrd.read(str(folder / f"{name}_label.nrrd"))
        directions = np.diag(np.asarray(header["space directions"], dtype=float))
        if header["space"] != "left-posterior-superior" or (directions == 0).any():
            raise SystemExit(f"pyradiomics: {name} does not lie along left, posterior, superior")
        axes = tuple(int(axis) for axis in np.flatnonzero(directions < 0))
        volume, labels = np.flip(volume, axes), np.flip(labels, axes)
        across, down, along = np.abs(directions)
        step = 1 if name == "breast1" else 2
        spacing = (float(down), float(across))
        for z in range(volume.shape[2]):
            mask = (labels[:, :, z] > 0).T
            if z % step and not mask.any():
                continue
            plane = volume[:, :, z].T.astype(np.float64)  # x counts to the left, y to the back
            pixels = window(plane, *LUNG) if modality == "ct" else percentile_window(plane)
            resized = resize_mask(np.ascontiguousarray(mask), spacing)
            yield Slice(
                key=f"{modality}_radiomics{name}_ax_{z:03d}",
                pixels=resize(np.ascontiguousarray(pixels), spacing),
                masks={lesion: resized} if resized.mean() >= LEAST_AREA / 2 else {},
                volume=f"{modality}_radiomics{name}",
                group=f"{modality}_radiomics{name}",
                split=split,
                what={"modality": modality.upper(), "plane": "axial", "region": region},
                source="pyradiomics",
                slice_mm=z * float(along),
            )


def nuclei(package: Path) -> Iterator[Slice]:
    """Tiles of one fluorescence image; its right part, with a gap, is the test split."""
    folder = next(package.rglob("img2d.tif")).parent
    image = percentile_window(tifffile.imread(folder / "img2d.tif").astype(np.float64))
    labels = tifffile.imread(folder / "mask2d.tif")
    tile = 128
    for split, columns in (("train", range(0, 193, 64)), ("test", (384,))):
        for left in columns:
            for top in range(0, 385, 64):
                area = (slice(top, top + tile), slice(left, left + tile))
                whole = {
                    int(v): labels[area] == v
                    for v in np.unique(labels[area])
                    if v and (labels[area] == v).sum() == (labels == v).sum()
                }
                if len(whole) < 3:
                    continue
                sizes = sorted(whole, key=lambda v: int(whole[v].sum()))
                bright = max(whole, key=lambda v: float(image[area][whole[v]].mean()))
                masks = {"largest nucleus": whole[sizes[-1]]}
                if bright != sizes[-1]:  # one box has one name
                    masks["brightest nucleus"] = whole[bright]
                yield Slice(
                    key=f"microscopy_nuclei_{top:03d}_{left:03d}",
                    pixels=resize(np.ascontiguousarray(image[area]), (1.0, 1.0)),
                    masks={n: resize_mask(m, (1.0, 1.0)) for n, m in masks.items()},
                    volume="microscopy_nuclei",
                    group=f"microscopy_nuclei_{split}",
                    split=split,
                    what={
                        "modality": "fluorescence microscopy",
                        "plane": "",
                        "region": "cell nuclei",
                    },
                    source="stardist",
                    slice_mm=None,
                    facts={"left": str(left)},
                )
