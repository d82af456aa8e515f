"""Elements of DICOM files that are empty, incomplete, or give a range: as if absent, or whole."""

import numpy as np
import pytest
from dicom_files import grey, write_dicom

from clinkd.data.images import load_image

pydicom = pytest.importorskip("pydicom")

RAMP = np.arange(12, dtype=np.uint16).reshape(3, 4) * 100


def table(**elements):
    out = pydicom.Dataset()
    for key, value in elements.items():
        setattr(out, key, value)
    return out


def shown(root, values=RAMP, **elements):
    write_dicom(root / "a.dcm", values, **elements)
    return grey(load_image(root, "a.dcm"))


NOT_WHOLE = [
    {"WindowCenter": None, "WindowWidth": None},
    {"WindowCenter": "", "WindowWidth": ""},
    {"WindowCenter": 40, "WindowWidth": None},
    {"WindowWidth": 400},
    {"WindowCenter": 40},
    {"WindowCenter": 0, "WindowWidth": 0},
    {"WindowCenter": ["", 40], "WindowWidth": [400, ""]},
    {"VOILUTSequence": []},
    {"VOILUTSequence": [table()]},
    {"VOILUTSequence": [table(LUTDescriptor=[4, 0, 16], LUTData=None)]},
    {"ModalityLUTSequence": []},
    {"ModalityLUTSequence": [table(LUTDescriptor=[4, 0, 8])]},
    {"RescaleSlope": None, "RescaleIntercept": None},
    {"RescaleSlope": 2, "RescaleIntercept": None},
    {"RescaleSlope": None, "RescaleIntercept": -1024},
    {"PixelPaddingValue": None, "PixelPaddingRangeLimit": None},
    {"PixelPaddingValue": None, "PixelPaddingRangeLimit": 500},
    {"SharedFunctionalGroupsSequence": [], "PerFrameFunctionalGroupsSequence": []},
    {"SharedFunctionalGroupsSequence": [table(FrameVOILUTSequence=[])]},
]


@pytest.mark.parametrize("elements", NOT_WHOLE, ids=range(len(NOT_WHOLE)))
def test_what_is_not_whole_is_absent(tmp_path, elements):
    assert np.array_equal(shown(tmp_path, **elements), shown(tmp_path))


def test_an_empty_function_is_the_linear_one(tmp_path):
    window = {"WindowCenter": 500, "WindowWidth": 301}
    assert np.array_equal(shown(tmp_path, **window, VOILUTFunction=None), shown(tmp_path, **window))


def test_the_first_whole_window_counts(tmp_path):
    several = shown(tmp_path, WindowCenter=["", 500, 40], WindowWidth=[80, 301, 400])
    assert np.array_equal(several, shown(tmp_path, WindowCenter=500, WindowWidth=301))


def test_an_incomplete_table_leaves_the_window(tmp_path):
    window = {"WindowCenter": 500, "WindowWidth": 301}
    assert np.array_equal(
        shown(tmp_path, **window, VOILUTSequence=[table()]), shown(tmp_path, **window)
    )


def test_an_empty_window_of_the_frame_leaves_the_files_own(tmp_path):
    window = {"WindowCenter": 500, "WindowWidth": 301}
    empty = table(FrameVOILUTSequence=[table(WindowCenter=None, WindowWidth=None)])
    assert np.array_equal(
        shown(tmp_path, **window, PerFrameFunctionalGroupsSequence=[empty]),
        shown(tmp_path, **window),
    )


@pytest.mark.parametrize(
    ("half", "whole"),
    [
        ({"RescaleSlope": 2}, {"RescaleSlope": 2, "RescaleIntercept": 0}),
        ({"RescaleIntercept": -500}, {"RescaleSlope": 1, "RescaleIntercept": -500}),
    ],
)
def test_half_a_rescaling_is_completed(tmp_path, half, whole):
    window = {"WindowCenter": 500, "WindowWidth": 801}
    values = shown(tmp_path, **window, **half)
    assert np.array_equal(values, shown(tmp_path, **window, **whole))
    assert not np.array_equal(values, shown(tmp_path, **window))


def test_a_table_of_words(tmp_path):
    """In files with implicit types every table is read as words, whose order must be known."""
    item = table(LUTDescriptor=[4, 0, 16])
    item.add_new("LUTData", "OW", np.array([0, 10, 20, 65535], dtype="<u2").tobytes())
    values = np.array([[0, 1], [2, 3]], dtype=np.uint16)
    assert shown(tmp_path, values, VOILUTSequence=[item]).tolist() == [[0, 0], [0, 255]]


@pytest.mark.parametrize(("first", "last"), [(0, 10), (10, 0), (3, 5)])
def test_a_range_of_padding_does_not_set_what_is_black(tmp_path, first, last):
    values = np.array([[3, 5], [1000, 1100]], dtype=np.uint16)
    padded = shown(tmp_path, values, PixelPaddingValue=first, PixelPaddingRangeLimit=last)
    assert padded.tolist() == [[0, 0], [0, 255]]
    assert shown(tmp_path, values, PixelPaddingValue=3).tolist() == [[0, 0], [232, 255]]
