"""Decode the frames of a DICOM file, one at a time, each by one named decoder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.utils import as_pixel_options

from data_prep.dicom.attributes import guarded, text, whole_number
from data_prep.dicom.codestreams import Stream, read_jpeg, read_jpeg2000
from data_prep.quarantine import Rejected
from data_prep.samples import MAX_PIXELS

PALETTE = "PALETTE COLOR"
GRAY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

_NATIVE = frozenset(
    (
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    )
)
_LOSSY_JPEG = frozenset((uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit))
_LOSSLESS_JPEG = frozenset((uid.JPEGLossless, uid.JPEGLosslessSV1))
# Which of pydicom's plugins decodes a transfer syntax. Lossy JPEG is not here: we ask Pillow ourselves, since pydicom
# converts to RGB once more what Pillow has converted already where a file says YBR and its JPEG has an Adobe marker.
_PLUGINS = {
    **dict.fromkeys(_NATIVE, ""),
    **dict.fromkeys(_LOSSLESS_JPEG, "gdcm"),
    **dict.fromkeys(uid.JPEGLSTransferSyntaxes, "pyjpegls"),
    **dict.fromkeys((uid.JPEG2000Lossless, uid.JPEG2000), "pylibjpeg"),
    **dict.fromkeys((uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K), "pylibjpeg"),
    uid.RLELossless: "pydicom",
}
_HEADER = "bad_pixel_header"


@dataclass(frozen=True)
class Layout:
    """The Image Pixel attributes (PS3.3 C.7.6.3) of a file, checked.

    Attributes:
        cells: arrays come as they are stored, with what else may be in the unused bits of each cell.
        bits: how many bits of a cell are the value, from bit `shift` on; all of them where `cells` is False.
    """

    syntax: uid.UID
    keyword: str
    photometric: str
    samples: int
    frames: int
    rows: int
    columns: int
    allocated: int
    bits: int
    shift: int
    signed: bool
    cells: bool


def read_layout(dataset: Dataset) -> Layout:
    """Check what can be checked before decoding.

    Raises:
        Rejected: the file has no pixels, none that can be decoded, too many, or its attributes make no sense.
    """
    found = [keyword for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if keyword in dataset]
    if not found:
        raise Rejected("no_pixels")
    if len(found) > 1:
        raise Rejected(_HEADER, "two kinds of pixel data")
    keyword = found[0]
    photometric = text(dataset, "PhotometricInterpretation", _HEADER)
    samples = whole_number(dataset, "SamplesPerPixel", _HEADER)
    rows = whole_number(dataset, "Rows", _HEADER)
    columns = whole_number(dataset, "Columns", _HEADER)
    frames = whole_number(dataset, "NumberOfFrames", _HEADER, 1)
    allocated = whole_number(dataset, "BitsAllocated", _HEADER)
    if rows < 1 or columns < 1 or frames < 0:
        raise Rejected(_HEADER, "rows, columns or frames below 1")
    if rows * columns > MAX_PIXELS:
        raise Rejected("too_large")
    syntax = _transfer_syntax(dataset)
    bits, shift, signed, cells = allocated, 0, True, False
    if keyword == "PixelData":
        bits = whole_number(dataset, "BitsStored", _HEADER)
        high = whole_number(dataset, "HighBit", _HEADER, bits - 1)
        signed = whole_number(dataset, "PixelRepresentation", _HEADER) == 1
        if not 1 <= bits <= allocated or not bits - 1 <= high < allocated:
            raise Rejected(_HEADER, "BitsAllocated, BitsStored and HighBit do not fit")
        cells = (syntax in _NATIVE or syntax == uid.RLELossless) and allocated in (8, 16)
        shift = high + 1 - bits if cells else 0
        if shift == 0 and high != bits - 1 and not syntax.is_encapsulated:
            raise Rejected(_HEADER, "BitsAllocated, BitsStored and HighBit do not fit")
    if photometric not in (*GRAY, PALETTE, *COLOUR):
        raise Rejected("unsupported_mode", "this photometric interpretation")
    if samples != (3 if photometric in COLOUR else 1):
        raise Rejected(_HEADER, "SamplesPerPixel does not fit PhotometricInterpretation")
    _check_depth(photometric, keyword, allocated, bits, signed)
    if allocated == 1 and syntax == uid.RLELossless:
        raise Rejected("unsupported_transfer_syntax", "1-bit pixels in RLE")
    if syntax == uid.JPEGExtended12Bit and bits > 8:
        raise Rejected("unsupported_transfer_syntax", "12-bit lossy JPEG")
    return Layout(
        syntax, keyword, photometric, samples, frames or 1, rows, columns, allocated, bits, shift, signed, cells
    )


def _transfer_syntax(dataset: Dataset) -> uid.UID:
    with guarded("unsupported_transfer_syntax", "TransferSyntaxUID cannot be read"):
        meta = getattr(dataset, "file_meta", None)
        name = None if meta is None else meta.get("TransferSyntaxUID")
    if not name:
        raise Rejected("unsupported_transfer_syntax", "the file names none")
    if name not in _PLUGINS and name not in _LOSSY_JPEG:
        raise Rejected("unsupported_transfer_syntax")
    return uid.UID(name)


def _check_depth(photometric: str, keyword: str, allocated: int, bits: int, signed: bool) -> None:
    """Refuse depths that have no meaning for the kind of image."""
    if keyword != "PixelData":
        if photometric not in GRAY or allocated != (32 if keyword == "FloatPixelData" else 64):
            raise Rejected(_HEADER, "floating-point pixels that are not 32- or 64-bit gray")
    elif photometric in COLOUR:
        if allocated not in (8, 16) or bits < 8 or signed:
            raise Rejected("unsupported_mode", "colour of less than 8 or more than 16 bits, or signed")
        if photometric != "RGB" and allocated != 8:
            raise Rejected("unsupported_mode", "YBR of more than 8 bits")
    elif allocated not in ((8, 16) if photometric == PALETTE else (1, 8, 16, 32)):
        raise Rejected("unsupported_mode", "this number of bits")


def decoded(dataset: Dataset, layout: Layout) -> Iterator[np.ndarray]:
    """The frames in order: (rows, columns), or (rows, columns, 3) as RGB. Arrays may be read-only views.

    Frames beyond the announced number are left out.

    Raises:
        Rejected: a frame is missing, damaged, or not what the header says.
    """
    code, detail = "bad_pixel_data", "they cannot be decoded"
    with guarded(code, detail):
        if not dataset.get(layout.keyword):
            raise Rejected("no_pixels", "the element is empty")
    streams: Iterator[tuple[bytes, Stream | None]] | None = None
    if layout.syntax.is_encapsulated:
        streams = _streams(dataset, layout)
    arrays = None
    if layout.syntax not in _LOSSY_JPEG:
        options: dict[str, Any] = {"view_only": True} if layout.syntax in _NATIVE and layout.cells else {}
        if layout.syntax in _LOSSLESS_JPEG and streams is not None:
            with guarded(code, detail):
                first = next(streams, (b"", None))
            if (
                first[1] is not None
            ):  # GDCM cuts values to the bits that it is told, and some encoders store whole cells
                options["bits_stored"] = max(layout.bits, first[1].precision)
            streams = chain([first], streams)
        arrays = get_decoder(layout.syntax).iter_array(
            dataset,
            decoding_plugin=_PLUGINS[layout.syntax],
            allow_excess_frames=False,
            # Unsigned values of lossless JPEG are whole as they come; cells are put right by a look-up table.
            correct_unused_bits=not layout.cells and (layout.signed or not layout.syntax.is_encapsulated),
            **options,
        )
    shape = (layout.rows, layout.columns, 3)[: 3 if layout.samples == 3 else 2]
    for _ in range(layout.frames):
        with guarded(code, detail):
            if streams is not None:
                data, stream = next(streams, (b"", None))
                if not data:
                    raise Rejected(code, "fewer frames than announced")
                if stream is not None:
                    _check_stream(stream, layout)
            if arrays is None:
                assert stream is not None
                array = _pillow(data, stream, layout)
            else:
                found = next(arrays, None)
                if found is None:
                    raise Rejected(code, "fewer frames than announced")
                array, properties = found
                if layout.samples == 3 and properties["photometric_interpretation"] != "RGB":
                    raise Rejected("unsupported_mode", "this photometric interpretation")
            if array.shape != shape:
                raise Rejected(code, "a frame of another size than announced")
        yield array


def _streams(dataset: Dataset, layout: Layout) -> Iterator[tuple[bytes, Stream | None]]:
    """The compressed frames with their own headers; RLE has none."""
    encoded = generate_frames(
        dataset.PixelData,
        number_of_frames=layout.frames,
        extended_offsets=as_pixel_options(dataset).get("extended_offsets"),
    )
    for data in encoded:
        if layout.syntax == uid.RLELossless:
            yield data, None
        elif layout.syntax in uid.JPEG2000TransferSyntaxes:
            yield data, read_jpeg2000(data)
        else:
            yield data, read_jpeg(data)


def _check_stream(stream: Stream, layout: Layout) -> None:
    if (stream.width, stream.height, stream.components) != (layout.columns, layout.rows, layout.samples):
        raise Rejected("bad_pixel_data", "a frame of another size than announced")
    if layout.samples == 3 and stream.precision != layout.bits:
        raise Rejected("bad_pixel_data", "colour of another depth than announced")
    if stream.precision > max(layout.allocated, 8):
        raise Rejected("bad_pixel_data", "more bits than announced")
    if layout.syntax in _LOSSLESS_JPEG:
        # Where these do not fit, GDCM ends the process, or gives all 0.
        depths = layout.allocated, layout.bits, stream.precision
        if depths != (8, 8, 8) and not (layout.allocated == 16 and min(depths) > 8):
            raise Rejected("bad_pixel_data", "lossless JPEG of another depth than announced")
        if stream.process != 0xC3 or not 1 <= stream.predictor <= 7:
            raise Rejected("bad_pixel_data", "a JPEG stream that is not lossless")
    if layout.signed and stream.precision > layout.bits:
        raise Rejected("bad_pixel_data", "signed values of more bits than announced")


def _pillow(data: bytes, stream: Stream, layout: Layout) -> np.ndarray:
    """Lossy JPEG of 8 bits. Without a marker that tells the colour space, the header decides."""
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    known = stream.marked or stream.identifiers == b"RGB"
    # A file that says RGB, but whose chroma is subsampled, is YBR all the same.
    if layout.photometric == "RGB" and not known and not stream.subsampled:
        image.draft("YCbCr", image.size)  # no conversion: libjpeg takes what is unmarked for YCbCr
    return np.asarray(image)
