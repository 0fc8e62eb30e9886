"""What a compressed frame says of itself, read before a decoder sees it.

The decoders fill up a stream that ends early with gray, and trust its own size rather than the header's. So a stream
must be of the announced size, and whole.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from data_prep.quarantine import Rejected

_SOS, _APP0, _APP14 = 0xDA, 0xE0, 0xEE
# Start of frame: JPEG (without DHT, JPG and DAC, which lie in the same range) and JPEG-LS.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
# What else may stand before the scan: tables, LSE of JPEG-LS, application segments, comments. A decoder would skip
# anything else, with a warning at most.
_TABLES = frozenset((0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xF8, 0xFE)) | frozenset(range(0xE0, 0xF0))
_J2K_START = b"\xff\x4f\xff\x51"
_SOT, _EOC = 0xFF90, 0xFFD9


class Stream(NamedTuple):
    """What a compressed frame says of itself.

    Attributes:
        precision: bits of a value.
        process: JPEG alone: the code of the start of frame, 0xC3 where lossless.
        predictor: lossless JPEG alone: 1 to 7.
        identifiers: JPEG alone, as the next two: of the components; the letters RGB where they are.
        subsampled: components are of different sizes.
        marked: a JFIF or Adobe segment tells the colour space.
    """

    width: int
    height: int
    precision: int
    components: int
    process: int = 0
    predictor: int = 0
    identifiers: bytes = b""
    subsampled: bool = False
    marked: bool = False


def read_jpeg(data: bytes) -> Stream:
    """The header of a whole JPEG or JPEG-LS stream.

    Raises:
        Rejected: no such stream, or it ends early.
    """
    position = data.find(b"\xff\xd8")
    if position < 0:
        raise Rejected("bad_pixel_data", "no JPEG stream")
    position += 2
    found: Stream | None = None
    marked = False
    try:
        while True:
            if data[position] != 0xFF:
                raise Rejected("bad_pixel_data", "a damaged JPEG header")
            marker = data[position + 1]
            if marker == 0xFF:  # a fill byte
                position += 1
                continue
            (length,) = struct.unpack_from(">H", data, position + 2)
            body = position + 4
            if marker == _SOS:
                predictor = data[body + 1 + 2 * data[body]]
                break
            if marker not in _SOF and marker not in _TABLES:
                raise Rejected("bad_pixel_data", "a damaged JPEG header")
            if marker in _SOF:
                precision, height, width, components = struct.unpack_from(">BHHB", data, body)
                parts = data[body + 6 : body + 6 + 3 * components]
                found = Stream(width, height, precision, components, marker, 0, parts[::3], len(set(parts[1::3])) > 1)
            elif marker == _APP0 and data[body : body + 4] == b"JFIF":
                if data[body + 5] != 1:  # the version; a warning in a header makes GDCM end the process
                    raise Rejected("bad_pixel_data", "a damaged JPEG header")
                marked = True
            elif marker == _APP14 and data[body : body + 5] == b"Adobe":
                if data[body + 11] > 1:  # the colour transform of three components
                    raise Rejected("bad_pixel_data", "a damaged JPEG header")
                marked = True
            position += 2 + length
    except (IndexError, struct.error):
        raise Rejected("bad_pixel_data", "a JPEG header that ends early") from None
    if found is None:
        raise Rejected("bad_pixel_data", "a JPEG stream without a frame")
    # In entropy-coded data FF is never followed by D9.
    if data.find(b"\xff\xd9", position) < 0:
        raise Rejected("bad_pixel_data", "a JPEG stream that ends early")
    return found._replace(predictor=predictor, marked=marked)


def read_jpeg2000(data: bytes) -> Stream:
    """The header of a whole JPEG 2000 codestream, with or without the JP2 boxes around it.

    Raises:
        Rejected: no such stream, or it ends before its last tile does.
    """
    start = data.find(_J2K_START)
    if start < 0:
        raise Rejected("bad_pixel_data", "no JPEG 2000 codestream")
    try:
        right, lower, left, upper = struct.unpack_from(">4I", data, start + 8)
        tile_width, tile_height, tile_left, tile_upper = struct.unpack_from(">4I", data, start + 24)
        (components,) = struct.unpack_from(">H", data, start + 40)
        precision = (data[start + 42] & 0x7F) + 1
        if not tile_width or not tile_height:
            raise Rejected("bad_pixel_data", "a damaged JPEG 2000 header")
        tiles = -(-(right - tile_left) // tile_width) * -(-(lower - tile_upper) // tile_height)
        seen = _whole_tiles(data, start + 2)
    except (IndexError, struct.error):
        raise Rejected("bad_pixel_data", "a JPEG 2000 codestream that ends early") from None
    if seen < tiles:
        raise Rejected("bad_pixel_data", "a JPEG 2000 codestream that ends early")
    return Stream(right - left, lower - upper, precision, components)


def _whole_tiles(data: bytes, position: int) -> int:
    """How many tiles lie whole in the stream whose first marker segment starts at `position`."""
    tiles = set()
    while position + 1 < len(data):
        (marker,) = struct.unpack_from(">H", data, position)
        if marker == _EOC:
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == _SOT:
            tile, part = struct.unpack_from(">HI", data, position + 4)
            end = position + part if part else data.rfind(b"\xff\xd9")  # 0: up to the end of the codestream
            if not position < end <= len(data):
                raise Rejected("bad_pixel_data", "a JPEG 2000 codestream that ends early")
            tiles.add(tile)
            position = end
        elif marker >> 8 == 0xFF and not tiles:
            position += 2 + length
        else:  # neither a tile nor the end: padding
            break
    return len(tiles)
