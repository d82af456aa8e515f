"""DICOM and NIfTI slices, with files that pydicom and nibabel bring along or that are made here."""

import os
from pathlib import Path

import numpy as np
import pytest
from dicom_files import grey, write_dicom
from PIL import Image

from clinkd.data.images import image_size, load_image
from clinkd.errors import DataError, SetupError

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")


RAMP = np.arange(12, dtype=np.uint16).reshape(3, 4) * 100


def test_dicom_without_window_spans_all_values(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    image = load_image(tmp_path, "a.dcm")
    assert image.size == image_size(tmp_path, "a.dcm") == (4, 3)
    assert np.array_equal(grey(image), np.rint(RAMP * (255 / 1100)).astype(np.uint8))


def test_dicom_rescale_and_window_of_the_file(tmp_path):
    write_dicom(
        tmp_path / "a.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1000,
        WindowCenter=[0.5, 40], WindowWidth=[1001, 400],
    )  # fmt: skip
    units = RAMP * 2.0 - 1000  # the window goes from -500 to 500
    expected = np.rint(np.clip((units + 500) * 255 / 1000, 0, 255))
    assert np.array_equal(grey(load_image(tmp_path, "a.dcm")), expected)


def test_dicom_window_of_the_name(tmp_path):
    write_dicom(
        tmp_path / "a.dcm",
        RAMP,
        RescaleSlope=1,
        RescaleIntercept=-100,
        WindowCenter=1,
        WindowWidth=2,
    )
    expected = np.rint(np.clip((RAMP - 100.0) * 255 / 500, 0, 255))
    assert np.array_equal(grey(load_image(tmp_path, "a.dcm#window=250:500")), expected)


@pytest.mark.parametrize("name", ["1.2.840.10008", "IM0001", "slice.ima", "a.b.c"])
def test_dicom_by_the_names_that_exports_give(tmp_path, name):
    write_dicom(tmp_path / "a.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8))
    os.rename(tmp_path / "a.dcm", tmp_path / name)
    assert load_image(tmp_path, name).size == image_size(tmp_path, name) == (8, 8)


def test_monochrome1_is_turned_over(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    write_dicom(tmp_path / "b.dcm", RAMP, photometric="MONOCHROME1")
    a, b = (grey(load_image(tmp_path, name)) for name in ("a.dcm", "b.dcm"))
    assert np.array_equal(a, 255 - b)


def test_padding_does_not_set_the_range(tmp_path):
    values = RAMP.copy()
    values[0, 0] = 60000
    write_dicom(tmp_path / "a.dcm", values, PixelPaddingValue=60000)
    shown = grey(load_image(tmp_path, "a.dcm"))
    assert shown[0, 1] == 0
    assert shown[2, 3] == 255


def test_frames_are_chosen_by_number(tmp_path):
    values = np.stack([np.full((2, 2), 0), np.array([[0, 1], [2, 3]]), np.array([[3, 2], [1, 0]])])
    write_dicom(tmp_path / "cine.dcm", values, WindowCenter=2, WindowWidth=4)
    first, second, third = (grey(load_image(tmp_path, f"cine.dcm#{n}")) for n in range(3))
    assert first.max() == 0
    assert np.array_equal(second, third[::-1, ::-1])
    assert np.array_equal(grey(load_image(tmp_path, "cine.dcm#frame=1")), second)
    assert image_size(tmp_path, "cine.dcm#1") == (2, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cine.dcm", "has 3 frames; say which: '#0' … '#2'"),
        ("cine.dcm#3", "frame must be 0…2, got 3"),
        ("cine.dcm#-1", "frame must be 0…2, got -1"),
        ("cine.dcm#axis=1", "allowed, once each: frame=NUMBER, window=CENTRE:WIDTH"),
        ("cine.dcm#one", "frame='one' is no number"),
        ("cine.dcm#0,window=3", "window='3' is no number"),
        ("cine.dcm#0,window=40:0", "window='40:0' is no number"),
        ("cine.dcm#0,frame=1", "once each"),
    ],
)
def test_wrong_frames(tmp_path, name, message):
    write_dicom(tmp_path / "cine.dcm", np.zeros((3, 2, 2)))
    with pytest.raises(DataError) as caught:
        load_image(tmp_path, name)
    assert message in str(caught.value)


def test_dicom_known_by_its_mark(tmp_path):
    write_dicom(tmp_path / "IM0001", RAMP)
    assert load_image(tmp_path, "IM0001").size == (4, 3)


def test_truncated_dicom(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    whole = (tmp_path / "a.dcm").read_bytes()
    for cut in (10, 200, len(whole) - 4):
        (tmp_path / "a.dcm").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"image 'a\.dcm'"):
            load_image(tmp_path, "a.dcm")


def test_dicom_without_pixels(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    data = pydicom.dcmread(tmp_path / "a.dcm")
    del data.Rows
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(DataError, match="without an image"):
        image_size(tmp_path, "a.dcm")


def test_huge_dicom_is_refused_before_decoding(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP, Rows=60000, Columns=60000)
    with pytest.raises(DataError, match="60000 × 60000 pixels, over"):
        load_image(tmp_path, "a.dcm")


@pytest.mark.parametrize(
    ("file", "size", "mode"),
    [
        ("CT_small.dcm", (128, 128), "grey"),
        ("MR_small.dcm", (64, 64), "grey"),
        ("examples_palette.dcm", (800, 350), "colour"),
        ("examples_rgb_color.dcm", (320, 240), "colour"),
        ("MR_small_RLE.dcm", (64, 64), "grey"),
    ],
)
def test_pydicoms_own_files(tmp_path, file, size, mode):
    source = pydicom.data.get_testdata_file(file, download=False)
    if source is None:
        pytest.skip(f"this pydicom does not bring {file}")
    (tmp_path / file).write_bytes(Path(source).read_bytes())
    image = load_image(tmp_path, file)
    values = np.asarray(image).astype(int)
    assert image.size == image_size(tmp_path, file) == size
    assert values.max() - values.min() > 100  # there is something to see
    assert ((values[..., 0] != values[..., 1]).any()) == (mode == "colour")


def test_one_file_compressed_and_not_looks_the_same(tmp_path):
    pictures = []
    for file in ("MR_small.dcm", "MR_small_RLE.dcm"):
        source = pydicom.data.get_testdata_file(file, download=False)
        (tmp_path / file).write_bytes(Path(source).read_bytes())
        pictures.append(np.asarray(load_image(tmp_path, file)))
    assert np.array_equal(*pictures)


# NIfTI: a volume whose value says where a voxel lies in the patient ----------------------------

SHAPE = (3, 4, 5)  # right, front, head: voxel (x, y, z) of RAS+ holds 100 x + 10 y + z


def write_nifti(path, axes="RAS", series=1):
    """The volume of SHAPE, stored in another order of axes, e.g. 'LPS' or 'SAR'."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    image = nibabel.Nifti1Image((100 * x + 10 * y + z).astype(np.int16), np.eye(4))
    if series > 1:
        values = np.stack([image.get_fdata() + 1000 * t for t in range(series)], axis=-1)
        image = nibabel.Nifti1Image(values.astype(np.int16), np.eye(4))
    change = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(np.eye(4)), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(image.as_reoriented(change), path)


def seen(root, name):
    """The values of SHAPE's volume that a slice shows, through a window of one grey step each."""
    return grey(load_image(root, f"{name},window=127.5:255")).astype(int)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SAR", "ASL", "IPR", "PIR"])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_slices_lie_as_radiologists_show_them(tmp_path, axes, suffix):
    name = f"v.{suffix}"
    write_nifti(tmp_path / name, axes)
    axial = seen(tmp_path, f"{name}#axis=2,index=1")  # right of the patient at the left, front up
    x, y = np.meshgrid([2, 1, 0], [3, 2, 1, 0])
    assert np.array_equal(axial, 100 * x + 10 * y + 1)
    coronal = seen(tmp_path, f"{name}#axis=1,index=2")  # right at the left, head up
    x, z = np.meshgrid([2, 1, 0], [4, 3, 2, 1, 0])
    assert np.array_equal(coronal, 100 * x + 20 + z)
    sagittal = seen(tmp_path, f"{name}#axis=0,index=1")  # front at the left, head up
    y, z = np.meshgrid([3, 2, 1, 0], [4, 3, 2, 1, 0])
    assert np.array_equal(sagittal, 100 + 10 * y + z)
    assert image_size(tmp_path, f"{name}#axis=0,index=0") == (4, 5)
    assert image_size(tmp_path, f"{name}#axis=1,index=0") == (3, 5)


def test_volumes_of_a_series(tmp_path):
    write_nifti(tmp_path / "f.nii", series=2)
    shown = grey(load_image(tmp_path, "f.nii#axis=2,index=0,volume=1,window=1127.5:255"))
    assert shown[-1, -1] == 0  # 1000 + 0
    assert shown[-1, 0] == 200


def test_window_by_percentiles(tmp_path):
    values = np.zeros((100, 100, 1), dtype=np.float32)
    values[50:, :, 0] = 100
    values[0, 0, 0] = 1e9  # one hot voxel does not darken the rest
    values[0, 1, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii")
    shown = grey(load_image(tmp_path, "v.nii#axis=2,index=0"))
    assert set(np.unique(shown)) == {0, 255}
    assert (shown[:, :50] == 255).all()  # large x, the patient's right, at the left


def test_constant_slice_is_black(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), 7.0), np.eye(4)), tmp_path / "v.nii")
    assert grey(load_image(tmp_path, "v.nii#axis=0,index=0")).max() == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v.nii", "say which slice: '#axis=2,index=30'"),
        ("v.nii#axis=2", "say which slice"),
        ("v.nii#axis=3,index=0", "axis must be 0…2, got 3"),
        ("v.nii#axis=2,index=5", "index on axis 2 must be 0…4, got 5"),
        ("v.nii#axis=0,index=3", "index on axis 0 must be 0…2, got 3"),
        ("v.nii#axis=2,index=0,volume=1", "volume must be 0…0, got 1"),
        ("v.nii#5", "allowed, once each: axis=NUMBER, index=NUMBER"),
    ],
)
def test_wrong_slices(tmp_path, name, message):
    write_nifti(tmp_path / "v.nii", "LPS")
    with pytest.raises(DataError) as caught:
        load_image(tmp_path, name)
    assert message in str(caught.value)


def test_series_needs_a_volume(tmp_path):
    write_nifti(tmp_path / "v.nii", series=3)
    with pytest.raises(DataError, match="has 3 volumes; say which: 'volume=0'"):
        load_image(tmp_path, "v.nii#axis=2,index=0")


def test_truncated_nifti(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 999, (16, 16, 16)).astype(np.int16)
    for name in ("v.nii", "v.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for part in (100, len(whole) // 2):
            (tmp_path / name).write_bytes(whole[:part])
            with pytest.raises(DataError, match=rf"image '{name}.*cannot be decoded"):
                load_image(tmp_path, f"{name}#axis=2,index=15")


def test_no_volume_and_no_grey_values(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2), np.float32), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"is no volume: its shape is \(2, 2\)"):
        load_image(tmp_path, "a.nii#axis=0,index=0")
    complex_ = np.zeros((2, 2, 2), np.complex64)
    nibabel.save(nibabel.Nifti1Image(complex_, np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(DataError, match="holds complex64 voxels"):
        load_image(tmp_path, "b.nii#axis=0,index=0")


@pytest.mark.parametrize(
    ("package", "name"), [("pydicom", "a.dcm"), ("nibabel", "v.nii#axis=0,index=0")]
)
def test_missing_extra_is_named(tmp_path, monkeypatch, package, name):
    write_dicom(tmp_path / "a.dcm", RAMP)
    write_nifti(tmp_path / "v.nii")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(SetupError, match=r"pip install 'clinkd\[medical\]'"):
        load_image(tmp_path, name)


def test_hash_in_an_ordinary_name(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a#1.png")
    assert load_image(tmp_path, "a#1.png").size == (3, 2)
