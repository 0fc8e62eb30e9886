"""One image file in, one clean sample out: checked to its last byte, stripped, and re-encoded only where it must be.

What the check can find: any cut file; any changed byte of a PNG (it has checksums); of the others, what the decoder
stumbles over. A changed bit of a JPEG may give another valid scan, which nobody can tell from the original.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.fingerprint import Fingerprint, fingerprint, fingerprint_of_file
from data_prep.metadata import Stripped, is_jpeg, is_png, strip_jpeg, strip_png
from data_prep.quarantine import Rejected

# No EPS (runs Ghostscript), no PPM (Pillow cuts 16-bit colour silently).
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
MAX_PIXELS = 178_956_970  # twice Pillow's own warning: where it too refuses
JPEG_QUALITY = 95
PNG_LEVEL = 1  # five times as fast as the default, some per cent larger
MEASURE_SIDE = 64

Extension = Literal["jpg", "png"]

_GRAY = frozenset(("1", "LA", "La"))
_COLOUR = frozenset(("RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"))
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
# What Pillow's readers raise on damaged input. Not a bare except: a bug of ours such as NameError still surfaces.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    zlib.error,
    Image.DecompressionBombError,
)


class Sample(NamedTuple):
    """An image as it goes into a shard.

    `values` is (height, width) or (height, width, 3), uint8 or uint16, thinned to at most about 64 to 128 pixels a
    side, for the dataset's mean and standard deviation; None where it was not asked for. `fingerprint` is that of the
    picture before it was encoded (upright, shrunk); of the stripped file where the pixels were not to be read.
    """

    extension: str
    data: bytes
    width: int
    height: int
    bit_depth: int
    channels: int
    values: np.ndarray | None
    fingerprint: Fingerprint


def from_bytes(data: bytes, resize: int | None = None, decode: bool = True, measure: bool = False) -> Sample:
    """The sample made from one image file.

    A JPEG or PNG that every decoder reads alike passes through without its metadata; everything else becomes a PNG.
    With `resize` a large JPEG is decoded at a smaller scale, so its digest may differ from that of its PNG copy.

    Args:
        data: the whole file.
        resize: the largest shorter side, in pixels; larger images shrink to it, smaller ones stay.
        decode: read the image to its last byte; otherwise a file that passes through has only its headers read.
        measure: also return `values`.

    Raises:
        Rejected: the image cannot be used, with its reason.
    """
    stripped = _stripped(data, check=decode)
    if stripped is None:
        return _encoded(_decoded(data), "png", resize, measure)
    if stripped.width * stripped.height > MAX_PIXELS:
        raise Rejected("too_large")
    shrink = resize is not None and min(stripped.width, stripped.height) > resize
    if not stripped.conformant or stripped.orientation != 1 or shrink:
        # Twice the target, so that the antialiased step below decides the result and not the JPEG's coarse scale.
        image = _upright(stripped, 2 * resize if resize is not None and stripped.orientation == 1 else None)
        lossy = stripped.extension == "jpg" and stripped.conformant
        return _encoded(image, "jpg" if lossy else "png", resize, measure, stripped)
    whole = None
    if decode or measure:
        whole = _jpeg_pixels(stripped) if stripped.extension == "jpg" else np.asarray(_decoded(stripped.data))
    return Sample(
        stripped.extension,
        stripped.data,
        stripped.width,
        stripped.height,
        stripped.bit_depth,
        stripped.channels,
        _thinned(whole) if whole is not None and measure else None,
        # Only `decode` decides: whether an image is measured must not set two copies of it apart.
        fingerprint(whole) if whole is not None and decode else fingerprint_of_file(stripped.data),
    )


def decoded(data: bytes) -> Image.Image:
    """The pixels of an image file, upright, as mode L, RGB or I;16: for callers that make another picture of them.

    Raises:
        Rejected: the image cannot be used, with its reason.
    """
    stripped = _stripped(data, check=True)
    return _decoded(data) if stripped is None else _upright(stripped)


def _stripped(data: bytes, check: bool) -> Stripped | None:
    """A JPEG or PNG without its metadata, None for other formats."""
    if not data:
        raise Rejected("empty")
    if is_jpeg(data):
        return strip_jpeg(data)
    return strip_png(data, check=check) if is_png(data) else None


def _upright(stripped: Stripped, at_least: int | None = None) -> Image.Image:
    """The pixels, turned as EXIF said; a JPEG may come at a smaller scale with `at_least` pixels a side."""
    if stripped.extension == "jpg" and stripped.conformant:
        image = Image.fromarray(_jpeg_pixels(stripped, at_least))
    else:
        image = _decoded(stripped.data)
    return image if stripped.orientation == 1 else image.transpose(_UPRIGHT[stripped.orientation])


def _jpeg_pixels(stripped: Stripped, at_least: int | None = None) -> np.ndarray:
    """The pixels of a JPEG, every one read; what libjpeg only warns of, such as bytes lost in the scan, is damage."""
    colours = "RGB" if stripped.channels == 3 else "GRAY"
    scaled = {} if at_least is None else {"min_height": at_least, "min_width": at_least, "min_factor": 2}
    try:
        values = simplejpeg.decode_jpeg(stripped.data, colours, strict=True, **scaled)
    except ValueError:
        _decoded(stripped.data)  # which tells a cut file from a damaged one
        raise Rejected("corrupt", "the decoder found damage in its scan") from None
    return values if stripped.channels == 3 else values[..., 0]


def from_array(
    array: np.ndarray, resize: int | None = None, measure: bool = False, extension: Extension = "png"
) -> Sample:
    """The sample of an array: (height, width) or (height, width, 1 or 3), uint8, or uint16 for gray (PNG only).

    >>> from_array(np.zeros((4, 6), np.uint8))[2:6]
    (6, 4, 8, 1)
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return _encoded(Image.fromarray(np.ascontiguousarray(array)), extension, resize, measure)


def from_image(image: Image.Image, extension: Extension, resize: int | None = None, measure: bool = False) -> Sample:
    """The sample of a picture in memory, upright as it is. Alpha is dropped; what `image.info` holds is never written.

    Args:
        image: of any mode that can be 8-bit gray or RGB, or 16-bit gray.
        extension: `jpg` for 8 bits whose source was lossy already, else `png`.
        resize: as in `from_bytes`.
        measure: as in `from_bytes`.

    Raises:
        Rejected: `unsupported_mode`.
    """
    plain = _plain(image)
    return _encoded(plain.copy() if plain is image else plain, extension, resize, measure)


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _decoded(data: bytes) -> Image.Image:
    """The pixels, as mode L, RGB or I;16; upright, but for JPEG and PNG."""
    known = data.startswith(_MAGIC) or data[8:12] == b"WEBP"
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise Rejected("animated")
        if image.width * image.height > MAX_PIXELS:
            raise Rejected("too_large")
        _refuse_silent_cut(image, data)
        image.load()
        if image.format not in ("JPEG", "PNG"):  # theirs was read and dropped with the metadata
            image = ImageOps.exif_transpose(image)
        return _plain(image)
    except UnidentifiedImageError:
        if data[128:132] == b"DICM":
            raise Rejected("dicom") from None
        raise Rejected("corrupt" if known else "not_an_image") from None
    except Image.DecompressionBombError:
        raise Rejected("too_large") from None
    except _DECODE_ERRORS as error:
        raise Rejected("truncated" if "truncated" in str(error) else "corrupt") from None


def _refuse_silent_cut(image: Image.Image, data: bytes) -> None:
    """Refuse colour of more than 8 bits and odd JPEG 2000 depths: Pillow would cut or scale them without a word."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        if max(bits if isinstance(bits, tuple) else (bits,)) > 8 and len(image.getbands()) > 1:
            raise Rejected("unsupported_mode", "16-bit colour or alpha")
    elif image.format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51") + 2
        (count,) = struct.unpack_from(">H", data, start + 38)
        depths = {data[start + 40 + 3 * component] for component in range(count)}
        if depths != {7} and not (depths == {15} and count == 1):
            raise Rejected("unsupported_mode", "a JPEG 2000 depth other than 8, or 16 gray")


def _plain(image: Image.Image) -> Image.Image:
    """Any supported mode as L, RGB or I;16. Alpha is dropped: the colours under it stay as stored."""
    mode = image.mode
    if mode in ("L", "RGB", "I;16"):
        return image
    if mode in _GRAY:
        return image.convert("L")
    if mode in _COLOUR:
        return image.convert("RGB")
    if mode in ("P", "PA"):
        colour = image.convert("RGB")
        red, green, blue = colour.split()
        gray = red.tobytes() == green.tobytes() == blue.tobytes()
        return red if gray else colour
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "JPEG2000")):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise Rejected("unsupported_mode", "values outside 16 bits")
        return Image.fromarray(values.astype(np.uint16))
    raise Rejected("unsupported_mode")


def _encoded(
    image: Image.Image, extension: Extension, resize: int | None, measure: bool, stripped: Stripped | None = None
) -> Sample:
    """Shrink and encode; `stripped` tells the full size where `image` was decoded at a smaller scale."""
    full = image.size
    if stripped is not None:
        swapped = stripped.orientation >= 5
        full = (stripped.height, stripped.width) if swapped else (stripped.width, stripped.height)
    if resize is not None and min(full) > resize:
        scale = resize / min(full)
        image = _shrunk(image, (max(1, round(full[0] * scale)), max(1, round(full[1] * scale))))
    assert extension == "png" or image.mode != "I;16", "JPEG holds 8 bits"
    image.info.clear()  # Pillow would write comments and transparency from here
    buffer = io.BytesIO()
    if extension == "jpg":
        # 4:4:4, since small red lesions are what a retina model looks for
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    channels = 3 if image.mode == "RGB" else 1
    bit_depth = 16 if image.mode == "I;16" else 8
    pixels = np.asarray(image)
    mark = fingerprint(pixels)
    if extension == "jpg":  # lossy: what is in the file is known by its bytes, and equal pixels give equal bytes
        mark = fingerprint_of_file(buffer.getvalue())._replace(phash=mark.phash)
    values = _thinned(pixels) if measure else None
    return Sample(extension, buffer.getvalue(), image.width, image.height, bit_depth, channels, values, mark)


def _shrunk(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Antialiased; 16 bits go through float32, which holds them exactly."""
    if image.mode != "I;16":
        return image.resize(size, Image.Resampling.LANCZOS)
    exact = Image.fromarray(np.asarray(image).astype(np.float32))
    values = np.asarray(exact.resize(size, Image.Resampling.LANCZOS))
    return Image.fromarray(np.clip(np.rint(values), 0, 0xFFFF).astype(np.uint16))


def _thinned(values: np.ndarray) -> np.ndarray:
    """Every k-th row and column: unlike an average, this keeps the standard deviation."""
    step = max(1, min(values.shape[:2]) // MEASURE_SIDE)
    return values[::step, ::step]
