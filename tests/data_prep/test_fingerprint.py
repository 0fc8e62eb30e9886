"""One picture has one digest in whatever file it comes, and its near copies have near hashes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_prep.fingerprint import NO_PHASH, Fingerprint, fingerprint_of_file
from data_prep.fingerprint import fingerprint as fingerprint_of_pixels
from data_prep.samples import from_array, from_bytes, from_image

Draw = Callable[..., bytes]
RESAMPLING = Image.Resampling


def fingerprint(image: Image.Image) -> Fingerprint:
    return fingerprint_of_pixels(np.asarray(image))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def distance(one: Image.Image, other: Image.Image) -> int:
    return (fingerprint(one).phash ^ fingerprint(other).phash).bit_count()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_digest_does_not_depend_on_the_container(draw: Draw, mode: str) -> None:
    jpeg = draw(1, "JPEG", mode=mode, size=(131, 77))
    image = decoded(jpeg)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "another file")
    files = [
        jpeg,
        jpeg[:2] + b"\xff\xfe\x00\x04no" + jpeg[2:],  # a comment
        encoded(image, "PNG", compress_level=0),
        encoded(image, "PNG", compress_level=9, pnginfo=text, dpi=(72, 72)),
        encoded(image, "BMP"),
        encoded(image, "TIFF"),
        encoded(image, "WEBP", lossless=True),
    ]
    assert len(set(files)) == len(files)
    assert len({from_bytes(data).fingerprint for data in files}) == 1
    assert from_array(np.asarray(image)).fingerprint == from_bytes(jpeg).fingerprint
    assert from_image(image, "png").fingerprint == from_bytes(jpeg).fingerprint


def test_any_other_pixel_size_shape_or_depth_has_another_digest() -> None:
    gray = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) % 251
    images = [gray.astype(np.uint8), gray, gray * 257, gray.astype(np.uint8).reshape(40, 24)]
    images += [gray.astype(np.uint8)[:-1], np.dstack([gray.astype(np.uint8), *([gray.astype(np.uint8) ^ 1] * 2)])]
    for place in ((0, 0), (23, 39), (11, 20)):
        changed = gray.astype(np.uint8)
        changed[place] ^= 1
        images.append(changed)
    assert len({fingerprint(Image.fromarray(image)).digest for image in images}) == len(images)


def test_gray_stored_as_rgb_is_the_same_image_and_one_coloured_pixel_makes_it_another(draw: Draw) -> None:
    gray = decoded(draw(3, size=(300, 200)))
    colour = np.array(gray.convert("RGB"))
    assert fingerprint(Image.fromarray(colour)) == fingerprint(gray)
    for channel in range(3):
        changed = colour.copy()
        changed[101, 203, channel] ^= 1  # between the pixels that the first look takes
        assert fingerprint(Image.fromarray(changed)).digest != fingerprint(gray).digest


def test_the_hash_is_imagehash_on_the_same_pixels() -> None:
    rng = np.random.default_rng(4)
    for mode in ("L", "RGB"):
        coarse = rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((128, 128), RESAMPLING.BICUBIC).convert(mode)
        expected = np.packbits(imagehash.phash(image, highfreq_factor=16).hash).tobytes()
        assert fingerprint(image).phash == int.from_bytes(expected, "big")


@pytest.mark.parametrize("depth", [8, 16])
def test_flat_images_have_no_hash_and_faint_structure_has_one(depth: int) -> None:
    dtype = np.uint8 if depth == 8 else np.uint16
    noise = np.random.default_rng(5).integers(100, 102, (200, 300)).astype(dtype)
    for flat in (np.zeros((5, 7)), np.full((200, 300), 255), noise):
        assert fingerprint(Image.fromarray(flat.astype(dtype))).phash == NO_PHASH
    ramp = np.tile(np.linspace(100, 108, 300), (200, 1)).astype(dtype)
    assert fingerprint(Image.fromarray(ramp)).phash != NO_PHASH


def test_16_bits_hash_like_their_8_bit_copy(draw: Draw) -> None:
    gray = np.asarray(decoded(draw(6, size=(300, 200))))
    deep = fingerprint(Image.fromarray(gray.astype(np.uint16) * 257))
    assert deep.phash == fingerprint(Image.fromarray(gray)).phash
    assert deep.digest != fingerprint(Image.fromarray(gray)).digest


def test_copies_of_real_images_are_near_and_other_images_are_not(real_data: Path) -> None:
    files = sorted(real_data.glob("fundus/normal/*.jpg"))[::40] + sorted(real_data.glob("mednist/*/*"))[::300]
    images = [decoded(path.read_bytes()) for path in files]
    assert len(images) > 40
    near = total = 0
    for image in images:
        smaller = image.resize((image.width * 2 // 3, image.height * 2 // 3), RESAMPLING.LANCZOS)
        for copy in (
            decoded(encoded(image, "JPEG", quality=75)),
            decoded(encoded(image, "JPEG", quality=95)),
            smaller,
            image.resize((image.width * 2, image.height * 2), RESAMPLING.BICUBIC),
            image.point(lambda value: min(255, value * 1.05)),
        ):
            total += 1
            near += distance(image, copy) <= 2
    assert near / total > 0.93
    hashes = np.array([fingerprint(image).phash for image in images], np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(len(images), 1)]
    assert (apart <= 2).mean() < 0.002


def test_a_file_that_is_not_decoded_is_told_by_its_bytes_alone(draw: Draw) -> None:
    data = draw(7, "PNG")
    trusted = from_bytes(data, decode=False)
    assert trusted.fingerprint == fingerprint_of_file(data) == from_bytes(data, decode=False, measure=True).fingerprint
    assert trusted.fingerprint.phash == NO_PHASH
    assert trusted.fingerprint.digest not in (from_bytes(data).fingerprint.digest, fingerprint_of_file(data + b"x"))
    commented = encoded(decoded(data), "PNG", pnginfo=PngImagePlugin.PngInfo(), dpi=(300, 300))
    assert from_bytes(commented, decode=False).data == from_bytes(encoded(decoded(data), "PNG"), decode=False).data


def test_the_fingerprint_is_of_the_upright_shrunk_picture(draw: Draw) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    turned = from_bytes(draw(8, "PNG", mode="RGB", exif=tags.tobytes()))
    assert turned.fingerprint == fingerprint(decoded(turned.data))
    shrunk = from_bytes(draw(8, "PNG", mode="RGB"), 16)
    assert shrunk.fingerprint == fingerprint(decoded(shrunk.data))
    assert shrunk.fingerprint.digest != from_bytes(draw(8, "PNG", mode="RGB")).fingerprint.digest


def test_a_picture_in_memory_keeps_its_info_and_writes_none_of_it(draw: Draw) -> None:
    image = decoded(draw(9, "JPEG", mode="RGB", size=(90, 60), comment=b"JANE^DOE", dpi=(72, 72)))
    before = dict(image.info)
    for extension in ("jpg", "png"):
        sample = from_image(image, extension, resize=30, measure=True)
        assert (sample.extension, sample.width, sample.height, sample.channels) == (extension, 45, 30, 3)
        assert decoded(sample.data).format == {"jpg": "JPEG", "png": "PNG"}[extension]
        assert b"JANE" not in sample.data
        assert sample.values is not None
    assert image.info == before
    assert from_array(np.asarray(image), extension="jpg").extension == "jpg"
    with pytest.raises(AssertionError):
        from_array(np.zeros((4, 4), np.uint16), extension="jpg")
