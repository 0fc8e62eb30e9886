"""Small DICOM files for the tests of data_prep.dicom."""

from __future__ import annotations

import io
from collections.abc import Callable

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from data_prep.dicom.header import silenced
from data_prep.dicom.profile import Profile, load_profile
from data_prep.dicom.pseudonyms import Pseudonyms

Make = Callable[..., Dataset]
CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture
def make() -> Make:
    """A header: `make(Modality="MR", ...)`; a CT slice where nothing else is said; None leaves an attribute out."""

    def build(**attributes: object) -> Dataset:
        dataset = Dataset()
        said = {
            "SOPClassUID": CT,
            "Modality": "CT",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "SOPInstanceUID": "1.2.3.4",
            "PatientID": "A-1",
            "Rows": 100,
            "Columns": 200,
            **attributes,
        }
        for keyword, value in said.items():
            if value is not None:
                with silenced():
                    setattr(dataset, keyword, value)
        return dataset

    return build


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """The file of a dataset: `encode(dataset, syntax=..., preamble=True)`."""

    def encoded(dataset: Dataset, syntax: str = ExplicitVRLittleEndian, preamble: bool = True) -> bytes:
        with silenced():
            return written(dataset, syntax, preamble)

    def written(dataset: Dataset, syntax: str, preamble: bool) -> bytes:
        buffer = io.BytesIO()
        if not preamble:
            implicit = syntax != ExplicitVRLittleEndian
            pydicom.dcmwrite(buffer, dataset, implicit_vr=implicit, little_endian=True)
            return buffer.getvalue()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        if "SOPClassUID" in dataset:
            dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.preamble = bytes(128)
        pydicom.dcmwrite(buffer, dataset)
        return buffer.getvalue()

    return encoded


@pytest.fixture
def pseudonyms() -> Pseudonyms:
    return Pseudonyms(bytes(range(32)))


@pytest.fixture
def strict() -> Profile:
    return load_profile("strict")
