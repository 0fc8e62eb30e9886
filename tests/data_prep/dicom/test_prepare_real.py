"""Every public DICOM file from SOURCE to the tar: its fate, its pixels, its record and its pseudonyms."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image

from data_prep.dicom.source import Dicom
from data_prep.options import Options, Running
from data_prep.prepare import Summary, prepare
from tests.data_prep.dicom.exports import pixels, pseudonym, samples
from tests.data_prep.dicom.other_decoders import native
from tests.data_prep.dicom.real_files import ACCEPTED, PERCENTILE, REJECTED, expected

KEY = random.Random(2).randbytes(32)
TAKEN = {
    "693_J2KR", "JPGLosslessP14SV1_1s_1f_8b", "MR2_J2KI", "OBXXXX1A_2frame", "OBXXXX1A_rle", "OBXXXX1A_rle_2frame",
    "RG3_J2KI", "bad_sequence", "emri_small", "emri_small_RLE", "emri_small_big_endian", "emri_small_jpeg_2k_lossless",
    "emri_small_jpeg_ls_lossless",
}  # fmt: skip
REFUSED = {
    **dict.fromkeys(("US1_J2KI", "US1_J2KR", "color-pl", "color-px"), "ultrasound_uncropped"),
    "explicit_VR-UN": "converted",
    "emri_small_jpeg_2k_lossless_too_short": "no_pixels",
    **dict.fromkeys(("parametric_map_double_float", "parametric_map_float"), "not_an_image_object"),
}
NO_UID = {"JLSL_RGB_ILV0", "JLSL_RGB_ILV1", "JLSL_RGB_ILV2", "JLSN_RGB_ILV0"}  # so nobody can approve them
# As the files have it -> as the dataset says it.
MANUFACTURERS = {
    "SIEMENS": "Siemens", "FUJI PHOTO FILM CO. LTD.": "Fujifilm", "Philips Medical Systems": "Philips",
    "Philips": "Philips", "GE Medical Systems": "GE", "G.E. Medical Systems": "GE",
}  # fmt: skip
MODALITIES = ["CT", "MR", "US", "OP", "OPT", "CR", "DX", "MG"]


def fate(name: str) -> str | None:
    """The reason why a file is refused where no human has looked, None for one that is taken."""
    if name in TAKEN:
        return None
    if name in REFUSED:
        return REFUSED[name]
    return "not_an_image_object" if name.startswith("liver") else "secondary_capture"


@pytest.fixture(scope="module")
def variety(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The public files, each with an instance UID of its own, in a folder `files`; their key in `key`."""
    default = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    data = Path(os.environ.get("MEDPRETRAIN_TEST_DATA", default)) / "dicom" / "variety"
    if not data.is_dir():
        pytest.skip("no real images here: set MEDPRETRAIN_TEST_DATA to the folder of public test data")
    folder = tmp_path_factory.mktemp("variety")
    (folder / "files").mkdir()
    for number, path in enumerate(sorted(data.glob("*.dcm"))):
        content = path.read_bytes()
        uid = str(pydicom.dcmread(path, force=True).get("SOPInstanceUID", "")).encode()
        if uid:
            content = content.replace(uid, uid[:-3] + b"%03d" % number)
        (folder / "files" / path.name).write_bytes(content)
    (folder / "key").write_bytes(KEY)
    (folder / "key").chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def datasets(variety: Path) -> dict[str, pydicom.Dataset]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {path.stem: pydicom.dcmread(path, force=True) for path in sorted((variety / "files").glob("*.dcm"))}


@pytest.fixture(scope="module")
def stored(variety: Path, datasets: dict[str, pydicom.Dataset]) -> dict[str, np.ndarray]:
    """The stored values of each file that can be decoded, by means of the tests."""
    found = {}
    for name, (decode, _, _) in ACCEPTED.items():
        if fate(name) != "not_an_image_object":
            values = decode(datasets[name], variety / "files" / f"{name}.dcm")
            found[name] = values[..., None] if values.ndim == 3 else values
    return found


def run(folder: Path, source: Path, **how: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Prepare; returns (instance, frame) -> (image, record) and number in the walk -> reason."""
    summary = prepare(Dicom(source, folder / "key", **how), folder / "out", Options(), Running(overwrite=True))
    assert isinstance(summary, Summary)
    quarantine = pq.read_table(folder / "out" / "quarantine.parquet").to_pylist()
    names = [path.stem for path in sorted(source.iterdir())]
    images = {
        (record["instance"], record.get("frame")): (image, record)
        for image, record, _ in samples(folder / "out").values()
    }
    return images, {names[row["number"]]: row["reason"] for row in quarantine}


def instance(dataset: pydicom.Dataset) -> str | None:
    return pseudonym(KEY, "i", str(dataset.get("SOPInstanceUID", "")))


def approved(folder: Path, datasets: dict[str, pydicom.Dataset]) -> Path:
    """A review in which a human has let everything pass."""
    names = [name for dataset in datasets.values() if (name := instance(dataset))]
    (folder / "reviewed.csv").write_text("\n".join(["instance", *names]) + "\n")
    return folder / "reviewed.csv"


def about(dataset: pydicom.Dataset, frame: int, window: str) -> dict[str, Any]:
    """What should leave with an image of these files, by pydicom's own reading."""
    said: dict[str, Any] = {"Window": window}
    for keyword in ("Rows", "Columns", "Modality", "PhotometricInterpretation", "Laterality", "ViewPosition"):
        if dataset.get(keyword):
            said[keyword] = dataset[keyword].value
    shared = dataset.get("SharedFunctionalGroupsSequence", [pydicom.Dataset()])[0]
    measures = shared.get("PixelMeasuresSequence", [dataset])[0]
    for keyword in ("KVP", "MagneticFieldStrength", "SliceThickness", "SpacingBetweenSlices"):
        value = (measures if keyword.startswith("S") else dataset).get(keyword)
        if value:
            said[keyword] = float(f"{float(value):.6g}")
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        value = (measures if keyword == "PixelSpacing" else dataset).get(keyword)
        if value:
            said[keyword] = [float(f"{float(part):.6g}") for part in value]
    if dataset.get("BodyPartExamined"):
        said["BodyPartExamined"] = dataset.BodyPartExamined.replace(" ", "").upper()
    if dataset.get("Manufacturer") in MANUFACTURERS:
        said["Manufacturer"] = MANUFACTURERS[dataset.Manufacturer]
    if dataset.get("NumberOfFrames"):
        said["NumberOfFrames"] = int(dataset.NumberOfFrames)
        if dataset.NumberOfFrames > 1:
            said["FrameNumber"] = frame + 1
    if said.get("BodyPartExamined") in ("HEAD", "PANCREAS"):
        said["AnatomySource"] = "BodyPartExamined"
    return said


def test_every_file_meets_its_fate(variety: Path, datasets: dict[str, pydicom.Dataset]) -> None:
    images, reasons = run(variety, variety / "files")
    assert reasons == {name: reason for name in datasets if (reason := fate(name)) is not None}
    assert {name for name, _ in images} == {instance(datasets[name]) for name in TAKEN}


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        ({}, 8),
        ({"bits": 16}, 16),
        ({"image_format": "jpg"}, 8),
        ({"window": "percentile:2,97.5"}, 8),
        ({"window": "fixed"}, 8),
        ({"resize": 60}, 8),
    ],
    ids=str,
)
def test_every_image_and_its_record_is_right(
    variety: Path, datasets: dict[str, pydicom.Dataset], stored: dict[str, np.ndarray], how: dict[str, Any], bits: int
) -> None:
    images, reasons = run(variety, variety / "files", reviewed=approved(variety, datasets), **how)
    checked = 0
    for name, dataset in datasets.items():
        decoded = stored.get(name)
        if decoded is None or name in NO_UID:
            wrong = fate(name) if name in NO_UID or name.startswith(("liver", "param")) else REJECTED[name]
            assert reasons.pop(name) == wrong
            continue
        _, count, window = ACCEPTED[name]
        if bits == 16 and (decoded.shape[-1] == 3 or dataset.PhotometricInterpretation == "PALETTE COLOR"):
            assert reasons.pop(name) == "unsupported_mode"
            continue
        if str(how.get("window")).startswith("percentile") and not window.startswith(("none", "scaled")):
            window = "percentile:2/97.5"
        if how.get("window") == "fixed" and name == "explicit_VR-UN":  # the one CT whose anatomy is known
            window = "fixed:abd:50/400"
        inside = scanned(dataset)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        shown = decoded[:, *box]
        for frame, right in enumerate(expected(dataset, shown, window, 2**bits - 1)):
            right = np.where(inside[box] if right.ndim == 2 else inside[box][..., None], right, 0)
            image, record = images.pop((instance(dataset), frame if count > 1 else None))
            assert record["about"] == about(dataset, frame, window), name
            whose = ("patient", "p", "PatientID", "IssuerOfPatientID"), ("study", "s", "StudyInstanceUID")
            for level, letter, *keywords in (*whose, ("series", "e", "SeriesInstanceUID")):
                values = [str(dataset.get(keyword, "")) for keyword in keywords]
                assert record.get(level) == pseudonym(KEY, letter, *values), (name, level)
            modality = dataset.get("Modality")
            assert record["labels"]["modality"] == (modality if modality in MODALITIES else None)
            part = dataset.get("BodyPartExamined")
            assert record["labels"]["anatomy"] == {"HEAD": "brain", "PANCREAS": "abd"}.get(part)
            assert record["bit_depth"] == bits
            compare(name, pixels(image), np.asarray(right), how)
            checked += 1
    assert not images
    assert not reasons
    assert checked == (61 if bits == 16 else 91)


def scanned(dataset: pydicom.Dataset) -> np.ndarray:
    """What of an ultrasound image lies in its two-dimensional regions, all of any other: (rows, columns) bool."""
    regions = [item for item in dataset.get("SequenceOfUltrasoundRegions", []) if item.RegionSpatialFormat == 1]
    inside = np.full((dataset.Rows, dataset.Columns), not regions)
    for item in regions:
        top, bottom = item.RegionLocationMinY0, item.RegionLocationMaxY1
        inside[top : bottom + 1, item.RegionLocationMinX0 : item.RegionLocationMaxX1 + 1] = True
    return inside


def compare(name: str, found: np.ndarray, right: np.ndarray, how: dict[str, Any]) -> None:
    if "resize" in how:
        side = min(right.shape[:2])
        scale = min(1.0, how["resize"] / side)
        height, width = (max(1, round(length * scale)) for length in right.shape[:2])
        assert found.shape[:2] == (height, width)
        right = np.asarray(Image.fromarray(right.astype(np.uint8)).resize((width, height), Image.Resampling.BOX))
        assert np.abs(found - right.astype(int)).mean() < (12 if scale < 1 else 1e-9), name
    elif how.get("image_format") == "jpg":
        assert found.shape == right.shape
        assert np.abs(found - right).mean() < 3, name
    else:
        np.testing.assert_array_equal(found, right, err_msg=name)


def test_a_series_arrives_slice_by_slice(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    source = real_data / "dicom" / "brain_mr_volume"
    images, reasons = run(tmp_path, source)
    assert not reasons
    paths = sorted(source.glob("*.dcm"))
    assert len(paths) == len(images) == 32
    for path in paths:
        dataset = pydicom.dcmread(path)
        image, record = images[instance(dataset), None]
        values = native(dataset, path)
        np.testing.assert_array_equal(pixels(image), next(expected(dataset, values, PERCENTILE, 255)))
        assert record["about"] == about(dataset, 0, "constant" if np.ptp(values) == 0 else PERCENTILE)
        assert record["series"] == pseudonym(KEY, "e", dataset.SeriesInstanceUID)
        assert record["patient"] == pseudonym(KEY, "p", dataset.PatientID, str(dataset.get("IssuerOfPatientID", "")))
