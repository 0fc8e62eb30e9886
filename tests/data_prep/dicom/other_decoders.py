"""Decoders that share no code with ours, written anew or GDCM's and Pillow's: a dataset to its stored values.

All give (frames, rows, columns, samples).
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from PIL import Image


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
    precision, rows, columns = struct.unpack_from(">BHH", data, frame + 4)
    assert data[scan + 7] == 0  # lossless
    coded = data[scan + 10 : data.rindex(b"\xff\xd9")]
    stuffed = (
        f"{byte:07b}" if before == 0xFF else f"{byte:08b}" for before, byte in zip(b"\0" + coded, coded, strict=False)
    )
    bits, position = "".join(stuffed) + "1" * 64, 0

    span = 1 << precision
    if span > 128:
        factor = (min(span - 1, 4095) + 128) >> 8
        limits = factor + 2, 4 * factor + 3, 17 * factor + 4
    else:
        factor = 256 // span
        limits = max(2, 3 // factor), max(3, 7 // factor), max(4, 21 // factor)
    if b"\xff\xf8" in data[:scan]:  # parameters are written out, and must be the default ones
        written = struct.unpack_from(">4H", data, data.index(b"\xff\xf8") + 5)
        assert written == (span - 1, *limits)
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
