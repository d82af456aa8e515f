"""DICOM files made by the tests, and what they show."""

import numpy as np


def write_dicom(path, values, *, photometric="MONOCHROME2", **attributes):
    """A DICOM file of uint16 `values` [H, W] or [frames, H, W].

    Args:
        attributes: more elements by keyword; None writes one without a value.
    """
    import pydicom  # an extra: who asks for a file skips without it
    from pydicom.dataset import FileMetaDataset

    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = values.shape[-2:]
    if values.ndim == 3:
        data.NumberOfFrames = len(values)
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    data.PixelRepresentation = 0
    data.PixelData = values.astype("<u2").tobytes()
    for key, value in attributes.items():
        setattr(data, key, value)
    data.save_as(path, enforce_file_format=True)


def grey(image):
    """[H, W] of a picture that must be grey."""
    values = np.asarray(image)
    assert image.mode == "RGB"
    assert (values[..., :1] == values).all()
    return values[..., 0]
