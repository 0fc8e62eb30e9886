"""What becomes of one image file: passed through, stripped, re-encoded or rejected for the right reason."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_prep.metadata import strip_jpeg
from data_prep.quarantine import Rejected
from data_prep.samples import from_array, from_bytes

Draw = Callable[..., bytes]
SECRET = b"JANE^DOE"


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def reason(data: bytes, **options: object) -> str:
    with pytest.raises(Rejected) as caught:
        from_bytes(data, **options)  # type: ignore[arg-type]
    return caught.value.code


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = SECRET.decode()
    return tags.tobytes()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_clean_jpeg_stays_byte_identical(draw: Draw, mode: str, progressive: bool) -> None:
    data = draw(1, "JPEG", mode=mode, progressive=progressive)
    sample = from_bytes(data)
    assert (sample.data, sample.extension, sample.width, sample.height) == (data, "jpg", 40, 30)
    assert (sample.bit_depth, sample.channels) == (8, 3 if mode == "RGB" else 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_clean_png_stays_byte_identical(draw: Draw, mode: str) -> None:
    data = draw(1, "PNG", mode=mode)
    sample = from_bytes(data)
    assert sample.data == data
    assert (sample.bit_depth, sample.channels) == (16 if mode == "I;16" else 8, 3 if mode == "RGB" else 1)


def test_jpeg_metadata_go_and_the_compressed_data_stay(draw: Draw) -> None:
    clean = draw(2, "JPEG", mode="RGB")
    extra = b"".join(segment(marker, b"Exif\0\0" + SECRET) for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE))
    extra += segment(0xE0, b"JFXX\0\x10" + SECRET)
    dirty = clean[:20] + extra + clean[20:] + b"\0" + SECRET
    assert from_bytes(dirty).data == clean


def test_a_jfif_thumbnail_goes(draw: Draw) -> None:
    clean = draw(2, "JPEG", mode="L")
    thumbnail = segment(0xE0, clean[6:18] + b"\x01\x03" + SECRET + b"!")
    assert from_bytes(clean[:2] + thumbnail + clean[20:]).data == clean


def test_adobe_transform_is_kept_so_that_colours_do_not_turn(draw: Draw) -> None:
    clean = draw(3, "JPEG", mode="RGB")
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")  # says: the components are RGB as they are
    marked = clean[:2] + adobe + clean[20:]
    assert from_bytes(marked).data == marked
    assert not np.array_equal(pixels(marked), pixels(clean))


def test_png_text_exif_and_trailing_bytes_go(draw: Draw) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", SECRET.decode())
    info.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    dirty = draw(4, "PNG", pnginfo=info, exif=exif(1), dpi=(72, 72)) + SECRET
    assert SECRET in dirty
    sample = from_bytes(dirty)
    assert SECRET not in sample.data
    assert sample.data == draw(4, "PNG")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_baked_in(draw: Draw, kind: str, orientation: int) -> None:
    data = draw(5, kind, mode="RGB", exif=exif(orientation))
    stored = pixels(draw(5, kind, mode="RGB")).astype(int)
    upright = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation](stored)
    sample = from_bytes(data)
    found = pixels(sample.data).astype(int)
    assert found.shape == upright.shape
    assert (sample.height, sample.width) == upright.shape[:2]
    assert np.abs(found - upright).mean() < (3 if kind == "JPEG" else 0.001)
    assert sample.extension == ("jpg" if kind == "JPEG" else "png")
    assert SECRET not in sample.data


@pytest.mark.parametrize(
    ("kind", "mode", "target"),
    [
        ("PNG", "P", "RGB"),
        ("PNG", "RGBA", "RGB"),
        ("PNG", "LA", "L"),
        ("PNG", "1", "L"),
        ("BMP", "RGB", "RGB"),
        ("TIFF", "L", "L"),
        ("TIFF", "I;16", "I;16"),
        ("GIF", "P", "RGB"),
    ],
)
def test_other_formats_become_png_without_loss(draw: Draw, kind: str, mode: str, target: str) -> None:
    data = draw(6, kind, mode=mode)
    sample = from_bytes(data)
    assert sample.extension == "png"
    expected = Image.open(io.BytesIO(data))
    found = Image.open(io.BytesIO(sample.data))
    assert found.mode == target
    assert np.array_equal(np.asarray(found), np.asarray(expected if target == "I;16" else expected.convert(target)))


def test_lossless_webp_and_cmyk_jpeg_become_rgb_png(draw: Draw) -> None:
    webp = from_bytes(draw(7, "WEBP", mode="RGB", lossless=True))
    assert np.array_equal(pixels(webp.data), pixels(draw(7, "PNG", mode="RGB")))
    cmyk = from_bytes(draw(7, "JPEG", mode="CMYK"))
    assert (cmyk.extension, cmyk.channels) == ("png", 3)


def test_a_gray_palette_becomes_gray(draw: Draw) -> None:
    image = Image.open(io.BytesIO(draw(8, "PNG", mode="L"))).convert("L")
    gray_palette = Image.fromarray(np.asarray(image))
    gray_palette.putpalette([value for value in range(256) for _ in range(3)])
    buffer = io.BytesIO()
    gray_palette.save(buffer, "PNG")
    sample = from_bytes(buffer.getvalue())
    assert sample.channels == 1
    assert np.array_equal(pixels(sample.data), np.asarray(image))


@pytest.mark.parametrize("resize", [8, 16, 29])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_resize_gives_the_shorter_side_and_keeps_the_picture(draw: Draw, kind: str, resize: int) -> None:
    data = draw(9, kind, mode="RGB")
    sample = from_bytes(data, resize)
    assert (sample.height, sample.width) == (resize, round(40 * resize / 30))
    expected = Image.open(io.BytesIO(data)).resize((sample.width, resize), Image.Resampling.LANCZOS)
    assert np.abs(pixels(sample.data).astype(int) - np.asarray(expected).astype(int)).mean() < 4
    assert sample.extension == ("jpg" if kind == "JPEG" else "png")


def test_resize_never_enlarges(draw: Draw) -> None:
    data = draw(9, "JPEG")
    assert from_bytes(data, 30).data == data


def test_resize_keeps_16_bits(draw: Draw) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    sample = from_array(ramp, 16)
    assert (sample.bit_depth, sample.width) == (16, 16)
    found = pixels(sample.data)
    assert found.dtype == np.uint16
    assert len(np.unique(found)) > 250  # 8 bits would leave at most 256 steps of 257
    assert np.any(found % 257)
    assert abs(float(found.mean()) - float(ramp.mean())) < 300


@pytest.mark.parametrize("progressive", [False, True])
def test_every_cut_of_a_jpeg_is_found(draw: Draw, progressive: bool) -> None:
    data = draw(10, "JPEG", mode="RGB", progressive=progressive)
    for length in range(3, len(data), 7):
        assert reason(data[:length]) == "truncated", length
    assert reason(data[:-1]) == "truncated"


def test_every_cut_and_every_flip_of_a_png_is_found(draw: Draw, rng: random.Random) -> None:
    data = draw(11, "PNG")
    for length in range(8, len(data), 7):
        assert reason(data[:length]) == "truncated"
    for _ in range(200):
        at = rng.randrange(8, len(data))
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        assert reason(bytes(flipped)) in ("corrupt", "truncated", "animated", "unsupported_mode"), at


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_bytes_never_crash(draw: Draw, rng: random.Random) -> None:
    originals = [
        draw(12, "JPEG", mode="RGB"),
        draw(12, "TIFF"),
        draw(12, "GIF", mode="P"),
        draw(12, "BMP"),
        draw(12, "WEBP"),
    ]
    for _ in range(400):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        cut = rng.randrange(1, len(data)) if rng.random() < 0.5 else len(data)
        with contextlib.suppress(Rejected):  # anything else that is raised would stop a run
            from_bytes(bytes(data[:cut]))


def test_reasons(draw: Draw) -> None:
    assert reason(b"") == "empty"
    assert reason(b"just text, no image") == "not_an_image"
    assert reason(bytes(128) + b"DICM" + bytes(50)) == "dicom"
    frames = [Image.new("L", (8, 8), value) for value in (0, 100)]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        assert reason(buffer.getvalue()) == "animated", kind
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, "TIFF")
    assert reason(buffer.getvalue()) == "unsupported_mode"


def test_a_decompression_bomb_is_a_reason_and_not_a_crash(draw: Draw) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    assert reason(bomb) == "too_large"
    assert reason(bomb, decode=False) == "too_large"


def test_16_bit_colour_is_refused_since_it_would_be_cut_to_8(draw: Draw) -> None:
    raw = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert reason(data) == "unsupported_mode"


def test_trust_reads_headers_only_and_finds_the_same_size(draw: Draw) -> None:
    data = draw(13, "JPEG", mode="RGB", size=(123, 45))
    trusted = from_bytes(data, decode=False)
    assert trusted[:-1] == from_bytes(data)[:-1]  # all but the fingerprint, which tells what was read
    assert trusted.fingerprint == from_bytes(data, decode=False, measure=True).fingerprint
    assert trusted.fingerprint != from_bytes(data).fingerprint
    flipped = bytearray(draw(13, "PNG"))
    flipped[-20] ^= 1
    assert from_bytes(bytes(flipped), decode=False).data == bytes(flipped)


def test_a_second_picture_after_the_end_is_cut_off(draw: Draw) -> None:
    first, second = draw(14, "JPEG"), draw(15, "JPEG")
    assert strip_jpeg(first + second).data == first


@pytest.mark.parametrize("resize", [None, 32])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_that_lost_bytes_in_its_scan_is_damaged_though_it_ends_well(
    draw: Draw, mode: str, resize: int | None
) -> None:
    whole = draw(3, "JPEG", mode=mode, size=(300, 200), quality=95)
    middle = len(whole) * 2 // 3
    cut = whole[:middle] + whole[middle + 200 :]
    assert cut.endswith(b"\xff\xd9")
    from_bytes(whole, resize)
    with pytest.raises(Rejected, match="damage in its scan"):
        from_bytes(cut, resize)
