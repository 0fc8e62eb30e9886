"""Drop what a JPEG or PNG says beside its pixels, without touching the compressed data.

EXIF, XMP, comments, thumbnails and text chunks carry names, dates and places. They are cut out segment by segment
(JPEG) or chunk by chunk (PNG); what the decoder needs stays byte for byte. A file with nothing to drop comes back as
it is. Bytes after the end of the image are dropped too.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

from data_prep.quarantine import Rejected

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PNG_KEPT = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))
# The end of entropy-coded data: an FF that is neither stuffed (00), a restart (D0-D7) nor a fill byte (FF).
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS = frozenset((0xC3, 0xF7))
_TABLES = frozenset((0xC4, 0xCC, 0xDB, 0xDC, 0xDD))  # DHT, DAC, DQT, DNL, DRI
_PLAIN_SOF = frozenset((0xC0, 0xC1, 0xC2))  # Huffman-coded baseline, extended, progressive: what every decoder reads


class Stripped(NamedTuple):
    """A file without its metadata, and what its header says.

    `conformant` is False where the pixels must be re-encoded to be read alike by every decoder (palette, alpha, ...).
    `orientation` is EXIF's 1..8; 1 is upright.
    """

    data: bytes
    extension: str
    width: int
    height: int
    bit_depth: int
    channels: int
    conformant: bool
    orientation: int


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def is_png(data: bytes) -> bool:
    return data[:8] == PNG_SIGNATURE


def strip_jpeg(data: bytes) -> Stripped:
    """Keep JFIF (without thumbnail), Adobe's APP14, tables, frame and scans; drop APPn, COM and all after the end.

    Raises:
        Rejected: `truncated` where no end marker comes, `corrupt` where the segments make no sense,
            `unsupported_mode` for lossless JPEG and for more than 8 bits.
    """
    end = len(data)
    parts: list[bytes] = []
    run = 0  # start of the bytes that are kept but not yet in parts
    pos = 2
    frame: tuple[int, int, int, int, int] | None = None
    scans = 0
    orientation = 1
    seen: set[int] = set()
    while True:
        if pos + 2 > end:
            raise Rejected("truncated")
        if data[pos] != 0xFF:
            raise Rejected("corrupt", "bytes between JPEG segments")
        marker = data[pos + 1]
        if marker == 0xFF:
            pos += 1
            continue
        if marker == _EOI:
            pos += 2
            break
        if pos + 4 > end:
            raise Rejected("truncated")
        length = (data[pos + 2] << 8) | data[pos + 3]
        stop = pos + 2 + length
        if length < 2:
            raise Rejected("corrupt", "a JPEG segment without a length")
        if stop > end:
            raise Rejected("truncated")
        if 0xE0 <= marker <= 0xEF or marker == _COM:
            segment = data[pos:stop]
            if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
                orientation = _orientation(segment[10:])
            kept = b"" if marker in seen else _kept_segment(marker, segment)
            if kept:
                seen.add(marker)
            if kept != segment:
                parts += (data[run:pos], kept)
                run = stop
        elif marker in _LOSSLESS:
            raise Rejected("unsupported_mode", "lossless JPEG or JPEG-LS")
        elif marker in _SOF:
            if length < 8:
                raise Rejected("corrupt", "a JPEG frame header that is too short")
            precision, height, width, channels = struct.unpack_from(">BHHB", data, pos + 4)
            if precision != 8:
                raise Rejected("unsupported_mode", "a JPEG of more than 8 bits")
            frame = (marker, precision, height, width, channels)
        elif marker == _SOS:
            scans += 1
            found = _MARKER.search(data, stop)
            if found is None:
                raise Rejected("truncated")
            pos = found.start()
            continue
        elif marker not in _TABLES and not 0xF0 <= marker <= 0xFD:
            raise Rejected("corrupt", "a JPEG marker out of place")
        pos = stop
    if frame is None or not scans:
        raise Rejected("corrupt", "a JPEG without a frame")
    marker, precision, height, width, channels = frame
    if run == 0 and pos == end:
        kept_data = data
    else:
        parts.append(data[run:pos])
        kept_data = b"".join(parts)
    conformant = marker in _PLAIN_SOF and channels in (1, 3) and width > 0 and height > 0
    return Stripped(kept_data, "jpg", width, height, precision, channels, conformant, orientation)


def _kept_segment(marker: int, segment: bytes) -> bytes:
    """The part of an APPn or COM segment that the decoder needs: JFIF's density and Adobe's colour transform."""
    if marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) >= 18:
        return b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0"
    if marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16:
        return b"\xff\xee\x00\x0e" + segment[4:16]
    return b""


def strip_png(data: bytes, check: bool = True) -> Stripped:
    """Keep IHDR, PLTE, IDAT and IEND; drop every other chunk and all after IEND.

    Args:
        data: the whole file.
        check: also check the CRC of every chunk (Pillow does not check those of the pixel data).

    Raises:
        Rejected: `truncated`, `corrupt`, `animated` (APNG), `unsupported_mode` (16-bit colour, which Pillow would
            silently cut to 8 bits).
    """
    view = memoryview(data)
    end = len(data)
    parts: list[bytes] = []
    run = 0
    pos = 8
    header: tuple[int, int, int, int] | None = None
    pixels = transparent = False
    orientation = 1
    while True:
        if pos + 12 > end:
            raise Rejected("truncated")
        (length,) = struct.unpack_from(">I", data, pos)
        kind = data[pos + 4 : pos + 8]
        stop = pos + 12 + length
        if stop > end:
            raise Rejected("truncated")
        if check and zlib.crc32(view[pos + 4 : stop - 4]) != int.from_bytes(view[stop - 4 : stop], "big"):
            raise Rejected("corrupt", "a PNG chunk with a wrong checksum")
        if header is None:
            if kind != b"IHDR" or length != 13:
                raise Rejected("corrupt", "a PNG that does not begin with its header")
            header = struct.unpack_from(">IIBB", data, pos + 8)
        elif kind == b"IDAT":
            pixels = True
        elif kind == b"acTL":
            raise Rejected("animated")
        elif kind == b"tRNS":
            transparent = True
        elif kind == b"eXIf":
            orientation = _orientation(data[pos + 8 : stop - 4])
        if kind not in _PNG_KEPT:
            parts.append(data[run:pos])
            run = stop
        pos = stop
        if kind == b"IEND":
            break
    if not pixels:
        raise Rejected("corrupt", "a PNG without pixel data")
    width, height, depth, colour = header
    if depth == 16 and colour != 0:
        raise Rejected("unsupported_mode", "16-bit colour or alpha")
    if run == 0 and pos == end:
        kept = data
    else:
        parts.append(data[run:pos])
        kept = b"".join(parts)
    conformant = (colour, depth) in ((0, 8), (0, 16), (2, 8)) and not transparent and width > 0 and height > 0
    return Stripped(kept, "png", width, height, depth, 3 if colour == 2 else 1, conformant, orientation)


def _orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1 where the block is broken or says nothing usable."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:  # the block is cut: decoders ignore it, and so do we
        return 1
    return 1
