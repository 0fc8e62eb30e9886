"""Made-up datasets: each step from stored values to brightness against the equations of the standard."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from data_prep.dicom.pixels import WINDOW_USED, Frame, frames
from data_prep.dicom.windows import WindowChoice, parse_window
from data_prep.quarantine import Rejected

STORED = parse_window("stored")
Change = Callable[[Dataset], Any]


def made(
    array: np.ndarray, bits: int = 16, syntax: str = pydicom.uid.ExplicitVRLittleEndian, **attributes: Any
) -> Dataset:
    """A parsed file of one frame (H, W) or, with `NumberOfFrames`, several (F, H, W)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.Rows, dataset.Columns = array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = 8 * array.dtype.itemsize
    if array.dtype.kind == "f":
        setattr(dataset, "FloatPixelData" if array.dtype.itemsize == 4 else "DoubleFloatPixelData", array.tobytes())
    else:
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
        dataset.PixelRepresentation = int(array.dtype.kind == "i")
        dataset.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
        dataset["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def taken(dataset: Dataset, choice: WindowChoice = STORED, bits: Any = 8, **options: Any) -> list[Frame]:
    options = {"modality": None, "anatomy": None, **options}
    found = list(frames(dataset, choice=choice, bits=bits, **options))
    assert all(WINDOW_USED.fullmatch(frame.window) for frame in found)
    return found


def ramp(kind: str = "<u2") -> np.ndarray:
    """4096 different values; signed ones from -2048 on."""
    start = -2048 if np.dtype(kind).kind == "i" else 0
    return np.arange(start, start + 4096).astype(kind).reshape(64, 64)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("function", "centre", "width"),
    [
        ("LINEAR", 40, 400),
        ("LINEAR", 40.5, 1),
        ("LINEAR_EXACT", 40, 0.5),
        ("LINEAR_EXACT", -10, 333),
        ("SIGMOID", 40, 400),
    ],
)
def test_each_function_is_that_of_the_standard(function: str, centre: float, width: float, bits: int) -> None:
    dataset = made(
        ramp("<i2"),
        RescaleSlope="0.5",
        RescaleIntercept="3",
        WindowCenter=centre,
        WindowWidth=width,
        VOILUTFunction=function,
    )
    (frame,) = taken(dataset, bits=bits)
    top, wanted = 2**bits - 1, []
    for stored in ramp("<i2").ravel().tolist():
        x = stored * 0.5 + 3
        if function == "SIGMOID":  # C.11.2.1.3.1
            y = top / (1 + np.exp(-4 * (x - centre) / width))
        elif function == "LINEAR_EXACT":  # C.11.2.1.3.2
            below, above = x <= centre - width / 2, x > centre + width / 2
            y = 0 if below else top if above else ((x - centre) / width + 0.5) * top
        else:  # C.11.2.1.2.1
            below, above = x <= centre - 0.5 - (width - 1) / 2, x > centre - 0.5 + (width - 1) / 2
            y = 0 if below else top if above else ((x - (centre - 0.5)) / (width - 1) + 0.5) * top
        wanted.append(y)
    assert np.abs(frame.pixels.ravel() - np.array(wanted)).max() <= 0.5 + 1e-6
    assert frame.window == f"stored:{centre:g}/{width:g}" + ("" if function == "LINEAR" else f"/{function}")
    assert frame.pixels.dtype == (np.uint8 if bits == 8 else np.uint16)


@pytest.mark.parametrize("kind", ["<u1", "<i1", "<u2", "<i2", "<i4", "<u4", "<f4", "<f8"])
def test_percentiles_are_those_of_the_pixels(kind: str, rng: random.Random) -> None:
    numbers = np.random.default_rng(rng.randrange(2**32))
    values = (numbers.normal(60, 17, (50, 41)) * (1 if kind.endswith("1") else 100)).astype(kind)
    dataset = made(values, bits=8 * values.itemsize, RescaleSlope="-2", RescaleIntercept="7")
    real = values.astype(np.float64) * -2 + 7
    low, high = np.percentile(real, [2, 99.5], method="inverted_cdf")
    (frame,) = taken(dataset, parse_window("percentile:2,99.5"), 16)
    assert frame.window == "percentile:2/99.5"
    wanted = np.clip((real - low) / (high - low), 0, 1) * 65535
    assert np.abs(frame.pixels - wanted).max() <= 0.5 + 1e-6
    (again,) = taken(dataset, WindowChoice("stored", (2, 99.5)), 16)
    np.testing.assert_array_equal(again.pixels, frame.pixels)


def test_sixteen_bits_keep_all_that_is_stored() -> None:
    (frame,) = taken(made(ramp(), bits=12, WindowCenter=2048, WindowWidth=4096), bits=16)
    assert len(np.unique(frame.pixels)) == 4096
    assert (frame.pixels.min(), frame.pixels.max()) == (0, 65535)


def test_monochrome1_is_inverted_exactly() -> None:
    attributes = {"WindowCenter": 700, "WindowWidth": 999}
    (plain,) = taken(made(ramp(), **attributes))
    (inverted,) = taken(made(ramp(), PhotometricInterpretation="MONOCHROME1", **attributes))
    np.testing.assert_array_equal(inverted.pixels, 255 - plain.pixels)


@pytest.mark.parametrize(("padding", "limit"), [(63536, None), (-2000, None), (-2040, -2000)])
def test_padding_is_black_and_does_not_count(padding: int, limit: int | None) -> None:
    values = ramp("<i2").clip(-2000, None)
    values[:20] = -2000
    dataset = made(values, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=padding)
    if limit is not None:
        dataset.PixelPaddingRangeLimit = limit
    (frame,) = taken(dataset)
    real = values != -2000
    low, high = np.percentile(values[real], [1, 99], method="inverted_cdf")
    wanted = 255 - np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(frame.pixels, np.where(real, wanted, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_black(bad: float) -> None:
    values = np.linspace(-1, 1, 400, dtype="<f4").reshape(20, 20)
    values[3, 4] = bad
    (frame,) = taken(made(values))
    low, high = np.percentile(values[np.isfinite(values)], [1, 99], method="inverted_cdf").astype(float)
    wanted = np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255)
    wanted[3, 4] = 0
    np.testing.assert_array_equal(frame.pixels, wanted)
    (empty,) = taken(made(np.full((4, 4), bad, "<f8")))
    assert (empty.window, empty.pixels.any()) == ("constant", False)


def test_an_image_of_one_value_is_black_and_says_so() -> None:
    for kind in ("<u2", "<i4", "<f4"):
        (frame,) = taken(made(np.full((9, 8), 77, kind), bits=8 * np.dtype(kind).itemsize), bits=16)
        assert (frame.window, frame.pixels.any(), frame.pixels.shape) == ("constant", False, (9, 8))


def test_a_small_bright_spot_survives_the_percentiles() -> None:
    values = np.zeros((100, 100), "<u2")
    values[5, 5:8] = (100, 200, 300)
    (frame,) = taken(made(values))
    assert frame.window == "percentile:0/100"
    assert frame.pixels[5, 5:8].tolist() == [85, 170, 255]


def test_what_lies_in_unused_bits_is_ignored() -> None:
    window = {"WindowCenter": 100, "WindowWidth": 3000}
    (clean,) = taken(made(ramp("<i2"), bits=12, **window))
    masked = (ramp("<i2").view("<u2") & 0x0FFF) | 0x7000  # overlays lie here in old files
    (dirty,) = taken(made(masked.view("<i2"), bits=12, **window))
    np.testing.assert_array_equal(dirty.pixels, clean.pixels)
    (high,) = taken(made(ramp("<i2") << 4, bits=12, HighBit=15, **window))
    np.testing.assert_array_equal(high.pixels, clean.pixels)


def test_each_frame_has_its_own_window_and_rescale() -> None:
    def item(**attributes: Any) -> Dataset:
        found = Dataset()
        for keyword, value in attributes.items():
            setattr(found, keyword, value)
        return found

    def groups(slope: int, centre: int) -> Dataset:
        rescale = item(RescaleSlope=slope, RescaleIntercept=0)
        return item(
            PixelValueTransformationSequence=Sequence([rescale]),
            FrameVOILUTSequence=Sequence([item(WindowCenter=centre, WindowWidth=1000)]),
        )

    dataset = made(np.stack([ramp(), ramp()]), NumberOfFrames=2, WindowCenter=5, WindowWidth=5)
    dataset.SharedFunctionalGroupsSequence = Sequence([groups(1, 1)])
    dataset.PerFrameFunctionalGroupsSequence = Sequence([groups(2, 500), groups(3, 700)])
    first, second = taken(dataset)
    assert (first.window, second.window) == ("stored:500/1000", "stored:700/1000")
    for frame, slope, centre in ((first, 2, 500), (second, 3, 700)):
        (alone,) = taken(made(ramp(), RescaleSlope=slope, WindowCenter=centre, WindowWidth=1000))
        np.testing.assert_array_equal(frame.pixels, alone.pixels)
    dataset.PerFrameFunctionalGroupsSequence = Sequence([Dataset(), Dataset()])
    assert [frame.window for frame in taken(dataset)] == ["stored:1/1000"] * 2


def test_only_the_regions_count_and_are_shown() -> None:
    values = ramp()
    values[0] = 65535
    (frame,) = taken(made(values), regions=[(5, 10, 20, 30), (5, 30, 20, 40)])
    (alone,) = taken(made(np.ascontiguousarray(values[10:40, 5:20])))
    np.testing.assert_array_equal(frame.pixels, alone.pixels)
    assert frame.pixels.flags.c_contiguous
    # Two regions with a banner between them, in gray and in colour.
    values[20:30] = 65535
    (apart,) = taken(made(values), regions=[(5, 10, 20, 20), (5, 30, 20, 40)])
    (joined,) = taken(made(np.concatenate([values[10:20, 5:20], values[30:40, 5:20]])))
    np.testing.assert_array_equal(apart.pixels[:10], joined.pixels[:10])
    np.testing.assert_array_equal(apart.pixels[20:], joined.pixels[10:])
    assert apart.pixels.shape == (30, 15)
    assert not apart.pixels[10:20].any()
    colour = made(np.full((64, 192), 200, "u1"), bits=8, Columns=64, SamplesPerPixel=3, PlanarConfiguration=0)
    colour.PhotometricInterpretation = "RGB"
    (apart,) = taken(colour, regions=[(5, 10, 20, 20), (5, 30, 20, 40)])
    assert apart.pixels.any(axis=(1, 2)).tolist() == [True] * 10 + [False] * 10 + [True] * 10
    with pytest.raises(Rejected):
        taken(made(values), regions=[(64, 0, 90, 9)])


def test_fixed_windows_are_for_ct_in_hounsfield_units_alone() -> None:
    fixed = parse_window("fixed")
    ct = made(ramp("<i2"), RescaleSlope=1, RescaleIntercept=0, WindowCenter=1, WindowWidth=2)
    (frame,) = taken(ct, fixed, modality="CT", anatomy="brain")
    assert frame.window == "fixed:brain:40/80"
    assert frame.pixels[ramp("<i2") == -1].tolist() == [0]
    assert frame.pixels[ramp("<i2") == 79].tolist() == [255]
    assert taken(ct, fixed, modality="CT")[0].window == "stored:1/2"
    assert taken(ct, fixed, modality="MR", anatomy="brain")[0].window == "stored:1/2"
    ct.RescaleType = "Z_EFF"
    assert taken(ct, fixed, modality="CT", anatomy="brain")[0].window == "stored:1/2"
    assert taken(made(ramp()), fixed, modality="CT", anatomy="brain")[0].window == "percentile:1/99"


SECRET = "Jane^Doe"


def raw(tag: int, value: str) -> pydicom.dataelem.RawDataElement:
    """An element as a file's reader leaves it: not looked at yet."""
    return pydicom.dataelem.RawDataElement(
        pydicom.tag.Tag(tag), "DS", len(value), value.encode(), 0, False, True, True, None
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: setattr(d, "WindowWidth", 0), "bad_window"),
        (lambda d: setattr(d, "WindowWidth", -5), "bad_window"),
        (lambda d: setattr(d, "WindowWidth", 0.5), "bad_window"),
        (lambda d: delattr(d, "WindowWidth"), "bad_window"),
        (lambda d: d.add_new("WindowCenter", "LO", SECRET), "bad_window"),
        (lambda d: d.add_new("WindowCenter", "LO", "40"), "bad_window"),
        (lambda d: setattr(d, "_dict", {**d._dict, 0x00281050: raw(0x00281050, SECRET)}), "bad_window"),
        (lambda d: setattr(d, "_dict", {**d._dict, 0x00280008: raw(0x00280008, SECRET)}), "bad_pixel_header"),
        (lambda d: setattr(d, "WindowCenter", float("inf")), "bad_window"),
        (lambda d: d.add_new("VOILUTFunction", "LO", SECRET), "bad_window"),
        (lambda d: d.add_new("VOILUTSequence", "LO", SECRET), "bad_window"),
        (lambda d: setattr(d, "RescaleSlope", 0), "bad_window"),
        (lambda d: d.add_new("RescaleIntercept", "LO", SECRET), "bad_window"),
        (lambda d: d.add_new("Rows", "LO", SECRET), "bad_pixel_header"),
        (lambda d: delattr(d, "BitsStored"), "bad_pixel_header"),
        (lambda d: setattr(d, "HighBit", 19), "bad_pixel_header"),
        (lambda d: setattr(d, "NumberOfFrames", 2), "bad_pixel_data"),
        (lambda d: setattr(d, "PixelData", d.PixelData[:-2]), "bad_pixel_data"),
        (lambda d: setattr(d, "PixelData", b""), "no_pixels"),
        (lambda d: delattr(d, "PixelData"), "no_pixels"),
        (lambda d: (setattr(d, "Rows", 60000), setattr(d, "Columns", 60000)), "too_large"),
        (lambda d: setattr(d, "PhotometricInterpretation", "CMYK"), "unsupported_mode"),
        (lambda d: setattr(d.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.4.102"), "unsupported_transfer_syntax"),
        (lambda d: setattr(d.file_meta, "TransferSyntaxUID", pydicom.uid.RLELossless), "bad_pixel_data"),
    ],
)
def test_a_bad_header_is_rejected_by_name_and_says_nothing_of_its_values(
    change: Change, code: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = made(ramp(), bits=12, RescaleIntercept=0, WindowCenter=40, WindowWidth=400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(dataset)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        with pytest.raises(Rejected) as caught:
            taken(dataset)
    assert caught.value.code == code
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert (warned, caplog.records, *capfd.readouterr()) == ([], [], "", "")
    assert SECRET not in str(caught.value)


def test_bytes_after_the_last_pixel_are_no_pixels() -> None:
    dataset = made(ramp(), WindowCenter=40, WindowWidth=400)
    (clean,) = taken(dataset)
    dataset.PixelData += bytes(dataset.PixelData) + b"\0\0"
    (frame,) = taken(dataset)
    np.testing.assert_array_equal(frame.pixels, clean.pixels)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_lookup_table_goes_before_the_window(bits: int) -> None:
    table = Dataset()
    table.LUTDescriptor = [3, 10, 10]
    table.LUTData = [0, 1023, 341]
    dataset = made(
        np.array([[0, 10, 11, 12, 400]], "<u2"), VOILUTSequence=Sequence([table]), WindowCenter=1, WindowWidth=2
    )
    (frame,) = taken(dataset, bits=bits)
    top = 2**bits - 1
    assert (frame.window, frame.pixels.tolist()) == ("stored:lut", [[0, 0, top, top // 3, top // 3]])
    table.LUTData = [0, 1023]
    with pytest.raises(Rejected, match="look-up table"):
        taken(dataset)


@pytest.mark.parametrize(
    ("mode", "marker"), [("YCbCr", True), ("YCbCr", False), ("RGB", True), ("RGB", False), ("RGB420", False)]
)
@pytest.mark.parametrize("said", ["RGB", "YBR_FULL_422"])
def test_the_colours_of_lossy_jpeg_are_right_whatever_the_header_says(mode: str, marker: bool, said: str) -> None:
    """A marker or a subsampled chroma decides, else the header."""
    image = Image.new("RGB", (32, 32), (200, 30, 60))
    stored = image if mode != "RGB" else Image.frombytes("YCbCr", image.size, image.tobytes())
    buffer = io.BytesIO()
    if mode == "RGB" and marker:
        image.save(buffer, "JPEG", quality=95, keep_rgb=True)  # component identifiers R, G, B
        data = buffer.getvalue()
    else:
        stored.save(buffer, "JPEG", quality=95, subsampling="4:2:0" if mode == "RGB420" else "4:4:4")
        data = buffer.getvalue()
        if not marker:
            start = data.index(b"\xff\xe0")
            data = data[:start] + data[start + 18 :]
    dataset = made(np.zeros((32, 32), "u1"), bits=8, syntax=pydicom.uid.JPEGBaseline8Bit, PlanarConfiguration=0)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, said
    dataset.PixelData = encapsulate([data])
    (frame,) = taken(dataset)
    truth = {"YCbCr": "YBR_FULL_422", "RGB": "RGB", "RGB420": "YBR_FULL_422"}[mode]
    right = marker or mode == "RGB420" or said == truth
    assert (np.abs(frame.pixels.astype(int) - (200, 30, 60)).max() <= 3) == right


def test_subsampled_native_colour_becomes_rgb() -> None:
    """Y1 Y2 Cb Cr for two pixels (PS3.3 C.7.6.3.1.2): here both of pure red."""
    dataset = made(np.tile(np.array([76, 76, 85, 255], "u1"), (4, 2)), bits=8, PlanarConfiguration=0)
    dataset.Columns, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 4, 3, "YBR_FULL_422"
    (frame,) = taken(dataset)
    assert frame.pixels.reshape(-1, 3).tolist() == [[254, 0, 0]] * 16


def test_gray_lossy_jpeg_is_decoded_and_windowed() -> None:
    values = np.tile(np.arange(0, 256, 8, dtype="u1"), (32, 1))
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=100)
    dataset = made(values, bits=8, syntax=pydicom.uid.JPEGBaseline8Bit, WindowCenter=128, WindowWidth=256)
    for data, right in ((buffer.getvalue(), True), (buffer.getvalue()[:-60], False), (buffer.getvalue()[:-2], False)):
        dataset.PixelData = encapsulate([data])
        if right:
            assert np.abs(taken(dataset)[0].pixels.astype(int) - values).max() <= 2
        else:
            with pytest.raises(Rejected, match="ends early"):
                taken(dataset)
    dataset.PixelData, dataset.Rows = encapsulate([buffer.getvalue()]), 31
    with pytest.raises(Rejected, match="another size"):
        taken(dataset)


def test_a_segmented_palette_is_that_of_its_plain_copy() -> None:
    dataset = made(np.arange(256, dtype="u1").reshape(16, 16), bits=8, PhotometricInterpretation="PALETTE COLOR")
    for colour, top in (("Red", 255), ("Green", 51), ("Blue", 0)):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        segments = np.array([0, 1, 0, 1, 255, top * 257], "<u2")  # a discrete entry, then a line to `top`
        setattr(dataset, f"Segmented{colour}PaletteColorLookupTableData", segments.tobytes())
    (frame,) = taken(dataset)
    red, green, blue = frame.pixels.reshape(256, 3).T.tolist()
    assert red == list(range(256))
    assert (green[0], green[255], set(blue)) == (0, 51, {0})
    assert green == sorted(green)
    del dataset.SegmentedRedPaletteColorLookupTableData
    with pytest.raises(Rejected):
        taken(dataset)
