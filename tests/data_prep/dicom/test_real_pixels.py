"""Every public DICOM file: what comes of it, and its pixels against a decoding that shares no code with ours.

Native, RLE, lossless JPEG and gray JPEG-LS data are decoded by code below; JPEG 2000 and colour JPEG-LS by GDCM's
reader of whole files; High-Throughput JPEG 2000 by Pillow; or there is an uncompressed copy of the same image.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from PIL import Image

from data_prep.dicom.pixels import WINDOW_USED, Frame, frames
from data_prep.dicom.windows import parse_window
from data_prep.quarantine import Rejected

Stored = Callable[[pydicom.Dataset, Path], np.ndarray]
PERCENTILE = "percentile:1/99"


def fragments(data: bytes) -> list[bytes]:
    """The items of encapsulated pixel data without the offset table; one frame an item in these files."""
    items, position = [], 0
    while data[position : position + 4] == b"\xfe\xff\x00\xe0":
        (length,) = struct.unpack_from("<I", data, position + 4)
        items.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    return items[1:]


def native(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    """(frames, rows, columns, samples) of plain data."""
    big = dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.2"
    rows, columns, samples = dataset.Rows, dataset.Columns, dataset.SamplesPerPixel
    if "PixelData" not in dataset:
        kind, data = ("<f4", dataset.FloatPixelData) if dataset.BitsAllocated == 32 else ("<f8", b"")
        values = np.frombuffer(data or dataset.DoubleFloatPixelData, kind)
    elif dataset.BitsAllocated == 1:
        values = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
        values = values[: int(dataset.NumberOfFrames) * rows * columns]
    else:
        kind = "i" if dataset.PixelRepresentation else "u"
        data = dataset.PixelData
        if big and dataset.BitsAllocated == 8 and dataset["PixelData"].VR == "OW":
            data = np.frombuffer(data, "<u2").byteswap().tobytes()
        values = np.frombuffer(data, f"{'><'[not big]}{kind}{dataset.BitsAllocated // 8}").astype(np.int64)
        values &= (1 << dataset.BitsStored) - 1
        if dataset.PixelRepresentation:
            values[values >= 1 << (dataset.BitsStored - 1)] -= 1 << dataset.BitsStored
    if dataset.get("PlanarConfiguration"):
        return values.reshape(-1, samples, rows, columns).transpose(0, 2, 3, 1)
    return values.reshape(-1, rows, columns, samples)


def run_lengths(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    """RLE (PS3.5 Annex G)."""
    images = []
    for data in fragments(dataset.PixelData):
        count, *starts = struct.unpack_from("<16I", data)
        planes = []
        for start, end in zip(starts[:count], [*starts[1:count], len(data)], strict=True):
            plane, position = bytearray(), start
            while position < end and len(plane) < dataset.Rows * dataset.Columns:
                code = data[position]
                if code < 128:
                    plane += data[position + 1 : position + 2 + code]
                    position += 2 + code
                elif code > 128:
                    plane += data[position + 1 : position + 2] * (257 - code)
                    position += 2
                else:
                    position += 1
            planes.append(np.frombuffer(plane, np.uint8).astype(np.uint16))
        image = planes[0] if count == 1 else planes[0] * 256 + planes[1]
        images.append(image.reshape(dataset.Rows, dataset.Columns, 1))
    return np.stack(images)


def lossless_jpeg(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    """Lossless JPEG of one component with predictor 1 (ITU T.81 Annex H)."""
    data = b"".join(fragments(dataset.PixelData))
    position, lookup = 2, [(0, 0)] * 65536
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        body = data[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xFFC3:
            precision, rows, columns = struct.unpack_from(">BHH", body)
        elif marker == 0xFFC4:
            code, symbols = 0, iter(body[17:])
            for size, count in enumerate(body[1:17], start=1):
                for _ in range(count):
                    first = code << (16 - size)
                    lookup[first : first + (1 << (16 - size))] = [(size, next(symbols))] * (1 << (16 - size))
                    code += 1
                code <<= 1
        elif marker == 0xFFDA:
            assert body[0] == 1
            assert body[3] == 1
            break
    coded = data[position : data.rfind(b"\xff\xd9")].replace(b"\xff\x00", b"\xff") + bytes(8)
    differences, bit = [], 0
    for _ in range(rows * columns):
        window = int.from_bytes(coded[bit >> 3 : (bit >> 3) + 6], "big") >> (16 - (bit & 7)) & 0xFFFFFFFF
        size, category = lookup[window >> 16]
        value = 32768 if category == 16 else 0  # the one without bits of its own
        category %= 16
        if category:
            value = window >> (32 - size - category) & ((1 << category) - 1)
            if value < 1 << (category - 1):
                value -= (1 << category) - 1
        differences.append(value)
        bit += size + category
    steps = np.array(differences).reshape(rows, columns)
    steps[:, 0] = np.cumsum(steps[:, 0]) + (1 << (precision - 1))
    image = np.cumsum(steps, axis=1) & ((1 << precision) - 1)
    if dataset.PixelRepresentation:
        image = image.astype(np.uint16).view(np.int16)
    return image[None, ..., None]


_RUN_LENGTHS = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4, 4, 5, 5, 6, 6, 7, 7, *range(8, 16)]


def jpeg_ls(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    """Lossless JPEG-LS of one component with default parameters (ITU T.87 Annex A)."""
    data = b"".join(fragments(dataset.PixelData))
    frame, scan = data.index(b"\xff\xf7"), data.index(b"\xff\xda")
    assert b"\xff\xf8" not in data[:scan]
    precision, rows, columns = struct.unpack_from(">BHH", data, frame + 4)
    assert data[scan + 7] == 0  # lossless
    coded = data[scan + 10 : data.rindex(b"\xff\xd9")]
    stuffed = (
        f"{byte:07b}" if before == 0xFF else f"{byte:08b}" for before, byte in zip(b"\0" + coded, coded, strict=False)
    )
    bits, position = "".join(stuffed) + "1" * 64, 0

    span = 1 << precision
    if span >= 128:
        factor = (min(span - 1, 4095) + 128) >> 8
        limits = factor + 2, 4 * factor + 3, 17 * factor + 4
    else:
        factor = 256 // span
        limits = max(2, 3 // factor), max(3, 7 // factor), max(4, 21 // factor)
    longest = 2 * (precision + max(8, precision))
    sums = [max(2, (span + 32) >> 6)] * 367
    biases, corrections, counts, negatives = [0] * 365, [0] * 365, [1] * 367, [0] * 367

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position] or "0", 2)

    def golomb(k: int, limit: int) -> int:
        nonlocal position
        one = bits.index("1", position)
        zeros, position = one - position, one + 1
        return zeros << k | read(k) if zeros < limit - precision - 1 else read(precision) + 1

    def level(difference: int) -> int:
        size = abs(difference)
        step = (size > 0) + sum(size >= limit for limit in limits)
        return step if difference >= 0 else -step

    def parameter(count: int, total: int) -> int:
        k = 0
        while count << k < total:
            k += 1
        return k

    def halve(context: int) -> None:
        if counts[context] == 64:
            sums[context] >>= 1
            counts[context] >>= 1
            negatives[context] >>= 1
            if context < 365:
                biases[context] >>= 1
        counts[context] += 1

    image = np.zeros((rows, columns), np.int64)
    above, corner, run = [0] * columns, 0, 0
    for row in range(rows):
        line: list[int] = []
        while len(line) < columns:
            x = len(line)
            b = above[x]
            a = line[-1] if x else b
            c = above[x - 1] if x else corner
            d = above[x + 1] if x + 1 < columns else b
            levels = [level(d - b), level(b - c), level(c - a)]
            if any(levels):
                context = 81 * levels[0] + 9 * levels[1] + levels[2]
                sign = 1 if context > 0 else -1
                context = abs(context)
                guess = min(a, b) if c >= max(a, b) else max(a, b) if c <= min(a, b) else a + b - c
                guess = min(max(guess + sign * corrections[context], 0), span - 1)
                k = parameter(counts[context], sums[context])
                mapped = golomb(k, longest)
                if k == 0 and 2 * biases[context] <= -counts[context]:
                    error = mapped >> 1 if mapped & 1 else -(mapped >> 1) - 1
                else:
                    error = -((mapped + 1) >> 1) if mapped & 1 else mapped >> 1
                sums[context] += abs(error)
                biases[context] += error
                halve(context)
                if biases[context] <= -counts[context]:
                    biases[context] = max(biases[context] + counts[context], 1 - counts[context])
                    corrections[context] = max(corrections[context] - 1, -128)
                elif biases[context] > 0:
                    biases[context] = min(biases[context] - counts[context], 0)
                    corrections[context] = min(corrections[context] + 1, 127)
                line.append((guess + sign * error) % span)
                continue
            while len(line) < columns and read(1):
                length = 1 << _RUN_LENGTHS[run]
                run = min(run + (length <= columns - len(line)), 31)
                line += [a] * min(length, columns - len(line))
            if len(line) == columns:
                break
            line += [a] * read(_RUN_LENGTHS[run])
            b = above[len(line)]
            same = int(a == b)
            context = 365 + same
            k = parameter(counts[context], sums[context] + (counts[context] >> 1) * same)
            mapped = golomb(k, longest - _RUN_LENGTHS[run] - 1)
            odd = (mapped + same) & 1
            error = (mapped + same + odd) >> 1
            if (k != 0 or 2 * negatives[context] >= counts[context]) == bool(odd):
                error = -error
            negatives[context] += error < 0
            sums[context] += (mapped + 1 - same) >> 1
            halve(context)
            line.append(((a if same else b) + (-error if not same and a > b else error)) % span)
            run = max(run - 1, 0)
        image[row] = line
        corner, above = above[0], line
    if dataset.PixelRepresentation:
        image[image >= span >> 1] -= span
    return image[None, ..., None]


def gdcm_reader(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    """GDCM's own reader of files, header and all."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    image = reader.GetImage()
    data = image.GetBuffer().encode("utf-8", "surrogateescape")
    kind = image.GetPixelFormat()
    values = np.frombuffer(data, f"<{'ui'[kind.GetPixelRepresentation()]}{kind.GetBitsAllocated() // 8}")
    samples = kind.GetSamplesPerPixel()
    if samples == 3 and image.GetPlanarConfiguration():
        return values.reshape(-1, 3, dataset.Rows, dataset.Columns).transpose(0, 2, 3, 1)
    return values.reshape(-1, dataset.Rows, dataset.Columns, samples)


def pillow(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in fragments(dataset.PixelData)])


def same_as(name: str) -> Stored:
    """An uncompressed copy of the same image."""

    def read(dataset: pydicom.Dataset, path: Path) -> np.ndarray:
        return native(pydicom.dcmread(path.with_name(name)), path)

    return read


# File -> (how its stored values are found, frames, window), or the reason why it is left out.
ACCEPTED: dict[str, tuple[Stored, int, str]] = {
    "693_J2KR": (gdcm_reader, 1, "stored:40/100"),
    "HTJ2K_08_RGB": (pillow, 1, "none"),
    "JLSL_08_07_0_1F": (jpeg_ls, 1, PERCENTILE),
    "JLSL_16_15_1_1F": (jpeg_ls, 1, PERCENTILE),
    "JLSL_RGB_ILV0": (gdcm_reader, 1, "none"),
    "JLSL_RGB_ILV1": (gdcm_reader, 1, "none"),
    "JLSL_RGB_ILV2": (gdcm_reader, 1, "none"),
    "JLSN_RGB_ILV0": (gdcm_reader, 1, "none"),
    "JPEG-LL": (lossless_jpeg, 1, PERCENTILE),
    "JPGLosslessP14SV1_1s_1f_8b": (lossless_jpeg, 1, "stored:127/254"),
    "MR2_J2KI": (gdcm_reader, 1, "stored:1000/2000"),
    "OBXXXX1A_2frame": (native, 2, "none"),
    "OBXXXX1A_rle": (run_lengths, 1, "none"),
    "OBXXXX1A_rle_2frame": (run_lengths, 2, "none"),
    "RG3_J2KI": (gdcm_reader, 1, "stored:550/1024"),
    "SC_rgb": (native, 1, "none"),
    "SC_rgb_16bit": (native, 1, "scaled:16"),
    "SC_rgb_16bit_2frame": (native, 2, "scaled:16"),
    "SC_rgb_2frame": (native, 2, "none"),
    "SC_rgb_dcmtk_ebcr_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcyn1_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcyn2_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcynp_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcys2_dcmd": (native, 1, "none"),
    "SC_rgb_dcmtk_ebcys4_dcmd": (native, 1, "none"),
    "SC_rgb_expb": (native, 1, "none"),
    "SC_rgb_expb_16bit": (native, 1, "scaled:16"),
    "SC_rgb_expb_16bit_2frame": (native, 2, "scaled:16"),
    "SC_rgb_expb_2frame": (native, 2, "none"),
    "SC_rgb_gdcm2k_uncompressed": (native, 1, "none"),
    "SC_ybr_full_uncompressed": (native, 1, "none"),
    "US1_J2KI": (gdcm_reader, 1, "none"),
    "US1_J2KR": (gdcm_reader, 1, "none"),
    "bad_sequence": (lossless_jpeg, 1, "stored:40/350"),
    "color-pl": (native, 1, "none"),
    "color-px": (native, 1, "none"),
    "emri_small": (native, 10, PERCENTILE),
    "emri_small_RLE": (run_lengths, 10, PERCENTILE),
    "emri_small_big_endian": (same_as("emri_small.dcm"), 10, PERCENTILE),
    "emri_small_jpeg_2k_lossless": (same_as("emri_small.dcm"), 10, PERCENTILE),
    "emri_small_jpeg_ls_lossless": (same_as("emri_small.dcm"), 10, PERCENTILE),
    "explicit_VR-UN": (gdcm_reader, 1, PERCENTILE),
    "liver": (native, 3, "none"),
    "liver_expb": (same_as("liver.dcm"), 3, "none"),
    "liver_j2k": (same_as("liver.dcm"), 3, "none"),
    "liver_nonbyte_aligned": (native, 3, "none"),
    "liver_nonbyte_aligned_j2k": (same_as("liver_nonbyte_aligned.dcm"), 3, "none"),
    "mlut_18": (native, 1, PERCENTILE),
    "parametric_map_double_float": (native, 1, PERCENTILE),
    "parametric_map_float": (native, 1, PERCENTILE),
    "vlut_04": (native, 1, "stored:lut"),
}
REJECTED = {
    "OT-PAL-8-face": "unsupported_transfer_syntax",  # no file meta information
    "SC_rgb_32bit": "unsupported_mode",
    "SC_rgb_32bit_2frame": "unsupported_mode",
    "SC_rgb_expb_32bit": "unsupported_mode",
    "SC_rgb_expb_32bit_2frame": "unsupported_mode",
    "emri_small_jpeg_2k_lossless_too_short": "no_pixels",  # pydicom parses nothing of it
    "liver_deflate": "unsupported_transfer_syntax",
    "liver_nonbyte_aligned_deflate": "unsupported_transfer_syntax",
    "liver_nonbyte_aligned_rle": "unsupported_transfer_syntax",
    "liver_rle": "unsupported_transfer_syntax",
}


def expected(dataset: pydicom.Dataset, stored: np.ndarray, window: str, top: int) -> Iterator[np.ndarray]:
    """The images by the equations of the standard, frame by frame."""
    if stored.shape[-1] == 3:
        for image in stored:
            if dataset.PhotometricInterpretation == "YBR_FULL":
                y, cb, cr = (image[..., i].astype(np.float64) for i in range(3))
                cb, cr = cb - 128, cr - 128
                red, blue = y + 1.402 * cr, y + 1.772 * cb
                green = (y - 0.299 * red - 0.114 * blue) / 0.587
                image = np.clip(np.floor(np.stack([red, green, blue], axis=-1) + 0.5), 0, 255)
            yield image >> 8 if window == "scaled:16" else image
        return
    for image in stored[..., 0]:
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            words = [dataset[f"{c}PaletteColorLookupTableData"].value for c in ("Red", "Green", "Blue")]
            yield np.stack([np.frombuffer(data, "<u2")[image] >> 8 for data in words], axis=-1)
            continue
        if window == "none":
            yield image.astype(np.int64) * top
            continue
        values = image.astype(np.float64) * float(dataset.get("RescaleSlope", 1)) + float(
            dataset.get("RescaleIntercept", 0)
        )
        if "ModalityLUTSequence" in dataset:
            item = dataset.ModalityLUTSequence[0]
            values = np.array(item.LUTData)[image.astype(int) - item.LUTDescriptor[1]].astype(np.float64)
        if window == PERCENTILE:
            real = values[image != dataset.get("PixelPaddingValue")]
            low, high = np.percentile(real, [1, 99], method="inverted_cdf")
            bright = (values - low) / (high - low) if high > low else np.zeros_like(values)
        elif window == "stored:lut":
            item = dataset.VOILUTSequence[0]
            bright = np.array(item.LUTData)[image - item.LUTDescriptor[1]] / (2 ** item.LUTDescriptor[2] - 1)
        else:
            centre, width = map(float, window.removeprefix("stored:").split("/"))
            bright = (values - (centre - 0.5)) / (width - 1) + 0.5
        gray = np.rint(np.clip(bright, 0, 1) * top)
        yield top - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


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
