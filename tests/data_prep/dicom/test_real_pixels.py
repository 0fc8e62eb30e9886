"""Every public DICOM file: what comes of it, and its pixels against a decoding that shares no code with ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from data_prep.dicom.pixels import WINDOW_USED, Frame, frames
from data_prep.dicom.windows import parse_window
from data_prep.quarantine import Rejected
from tests.data_prep.dicom.other_decoders import fragments, native
from tests.data_prep.dicom.real_files import ACCEPTED, PERCENTILE, REJECTED, expected


def images(path: Path, bits: int = 8) -> tuple[pydicom.Dataset, list[Frame]]:
    dataset = pydicom.dcmread(path, force=True)
    choice = parse_window("stored")
    return dataset, list(frames(dataset, choice=choice, bits=bits, modality=None, anatomy=None))


def test_the_list_of_public_files_is_complete(real_data: Path) -> None:
    names = {path.stem for path in (real_data / "dicom" / "variety").glob("*.dcm")}
    assert names == set(ACCEPTED) | set(REJECTED)


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_pixels_are_those_of_an_independent_decoding(real_data: Path, name: str) -> None:
    path = real_data / "dicom" / "variety" / f"{name}.dcm"
    decode, count, window = ACCEPTED[name]
    stored = None
    for bits in (8, 16):
        dataset, found = images(path, bits)
        if stored is None:
            stored = decode(dataset, path)
            if stored.ndim == 3:
                stored = stored[..., None]
        assert [frame.number for frame in found] == list(range(count))
        wanted = list(expected(dataset, stored, window, 2**bits - 1))
        for frame, image in zip(found, wanted, strict=True):
            assert frame.window == window
            assert WINDOW_USED.fullmatch(frame.window)
            assert frame.pixels.dtype == (np.uint16 if bits == 16 and frame.pixels.ndim == 2 else np.uint8)
            assert frame.pixels.flags.c_contiguous
            np.testing.assert_array_equal(frame.pixels, image)


@pytest.mark.parametrize("name", REJECTED)
def test_a_file_that_cannot_be_used_is_rejected_by_name(real_data: Path, name: str) -> None:
    with pytest.raises(Rejected) as caught:
        images(real_data / "dicom" / "variety" / f"{name}.dcm")
    assert caught.value.code == REJECTED[name]


def test_the_slices_of_a_volume_are_those_of_an_independent_decoding(real_data: Path) -> None:
    paths = sorted((real_data / "dicom" / "brain_mr_volume").glob("*.dcm"))
    assert len(paths) == 32
    for path in paths:
        dataset, (frame,) = images(path)
        stored = native(dataset, path)
        assert frame.window == ("constant" if np.ptp(stored) == 0 else PERCENTILE)
        np.testing.assert_array_equal(frame.pixels, next(expected(dataset, stored, PERCENTILE, 255)))


@pytest.mark.parametrize(
    "name",
    ["693_J2KR", "HTJ2K_08_RGB", "JLSL_16_15_1_1F", "JPEG-LL", "OBXXXX1A_rle", "emri_small", "liver", "color-pl"],
)
def test_pixel_data_that_end_early_never_become_an_image(real_data: Path, name: str) -> None:
    dataset = pydicom.dcmread(real_data / "dicom" / "variety" / f"{name}.dcm")
    whole = dataset.PixelData
    for part in (0.05, 0.5, 0.97):
        data = whole[: int(part * len(whole)) & ~1]
        if dataset["PixelData"].is_undefined_length:  # keep the encapsulation valid
            image = b"".join(fragments(whole))
            image = image[: int(part * len(image)) & ~1]
            data = pydicom.encaps.encapsulate([image])
        dataset.PixelData = data
        with pytest.raises(Rejected) as caught:
            list(frames(dataset, choice=parse_window("stored"), bits=8, modality=None, anatomy=None))
        assert caught.value.code == "bad_pixel_data"


@pytest.mark.parametrize("name", ["JPEG-LL", "bad_sequence", "JPGLosslessP14SV1_1s_1f_8b"])
@pytest.mark.parametrize("depth", [(32, 32), (32, 16), (16, 8), (16, 1), (8, 2), (1, 1)])
def test_a_lossless_jpeg_of_another_depth_does_not_end_the_process(
    real_data: Path, name: str, depth: tuple[int, int]
) -> None:
    dataset = pydicom.dcmread(real_data / "dicom" / "variety" / f"{name}.dcm")
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = *depth, depth[1] - 1
    with pytest.raises(Rejected):
        list(frames(dataset, choice=parse_window("stored"), bits=8, modality=None, anatomy=None))


def test_a_lossless_jpeg_of_more_bits_than_the_header_says_keeps_them(real_data: Path) -> None:
    """Some encoders store whole 16-bit cells of 12-bit values; here a header of 9 bits is put before a stream of 12."""
    dataset, (right,) = images(real_data / "dicom" / "variety" / "bad_sequence.dcm")
    dataset.BitsStored, dataset.HighBit = 9, 8
    (frame,) = frames(dataset, choice=parse_window("stored"), bits=8, modality=None, anatomy=None)
    np.testing.assert_array_equal(frame.pixels, right.pixels)


@pytest.mark.parametrize(
    ("good", "bad"), [(b"JFIF\0\1", b"JFIF\0\4"), (b"\xff\xc4", b"\xff\0"), (b"\xff\xc3", b"\xff\xc0")]
)
def test_a_damaged_jpeg_header_does_not_end_the_process(real_data: Path, good: bytes, bad: bytes) -> None:
    dataset = pydicom.dcmread(real_data / "dicom" / "variety" / "bad_sequence.dcm")
    assert good in dataset.PixelData
    dataset.PixelData = dataset.PixelData.replace(good, bad, 1)
    with pytest.raises(Rejected, match=r"damaged JPEG header|not lossless"):
        list(frames(dataset, choice=parse_window("stored"), bits=8, modality=None, anatomy=None))
