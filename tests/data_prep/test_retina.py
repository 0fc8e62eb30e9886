"""Retinal photographs: the disc is found whatever surrounds it, nothing outside it is left, and unusable ones go."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from data_prep.field_of_view import find_field
from data_prep.quarantine import Rejected
from data_prep.retina import RetinaSettings, prepare_photograph

SETTINGS = RetinaSettings()
Colour = tuple[int, int, int]


def retina(side: int, seed: int = 0) -> np.ndarray:
    """(side, side, 3) float: an orange ground with dark branches of the width of vessels and a bright nerve head."""
    rng = np.random.default_rng(seed)
    drawing = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(drawing)
    for _ in range(60):
        points = side / 2 + np.cumsum(rng.normal(0, side / 12, (9, 2)), axis=0)
        pen.line([tuple(point) for point in points], fill=255, width=max(1, side // 110))
    vessels = np.asarray(drawing).astype(np.float32)[..., None] / 255
    ground = np.array([190.0, 95.0, 45.0]) * (1 - 0.35 * vessels)
    y, x = np.mgrid[:side, :side] / side
    head = np.exp(-((x - 0.7) ** 2 + (y - 0.5) ** 2) / 0.003)[..., None]
    return np.asarray(ground + head * np.array([60.0, 120.0, 80.0]))


def photograph(
    size: tuple[int, int],
    centre: tuple[float, float],
    radius: float,
    border: Colour = (0, 0, 0),
    squash: float = 1.0,
    seed: int = 0,
) -> Image.Image:
    """A disc of retina in a frame of `size` (width, height); `squash` is the disc's height over its width."""
    width, height = size
    side = 2 * int(radius) + 2
    texture = Image.fromarray(retina(side, seed).clip(0, 255).astype(np.uint8))
    texture = texture.resize((side, max(1, round(side * squash))))
    frame = Image.new("RGB", size)
    frame.paste(texture, (round(centre[0] - texture.width / 2), round(centre[1] - texture.height / 2)))
    x, y = np.arange(width) + 0.5 - centre[0], (np.arange(height) + 0.5 - centre[1]) / squash
    inside = x[None] ** 2 + y[:, None] ** 2 <= radius**2
    return Image.fromarray(np.where(inside[..., None], np.asarray(frame), np.array(border, np.uint8)))


def jpeg(image: Image.Image, quality: int = 80) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def reason(image: Image.Image, settings: RetinaSettings = SETTINGS) -> str:
    with pytest.raises(Rejected) as caught:
        prepare_photograph(image, settings)
    return caught.value.code


@pytest.mark.parametrize("border", [(0, 0, 0), (9, 12, 8), (28, 26, 34), (0, 34, 12)])
def test_the_disc_is_found_in_any_place_size_and_dark_border(border: Colour, rng: random.Random) -> None:
    for _ in range(4):
        radius = rng.uniform(150, 380)
        width, height = round(2 * radius + rng.uniform(20, 500)), round(2 * radius + rng.uniform(20, 200))
        x, y = rng.uniform(radius + 5, width - radius - 5), rng.uniform(radius + 5, height - radius - 5)
        image = jpeg(photograph((width, height), (x, y), radius, border))
        prepared = prepare_photograph(image, SETTINGS)
        expected = (x - radius, y - radius, x + radius, y + radius)
        error = np.abs(np.subtract(prepared.box, expected)).max()
        assert error < 0.012 * max(width, height), (prepared.box, expected)
        assert prepared.image.size == (max(prepared.box[2] - prepared.box[0], prepared.box[3] - prepared.box[1]),) * 2
        assert prepared.quality["field"] == 1.0


def test_pixels_inside_the_disc_are_not_resampled() -> None:
    image = photograph((700, 500), (320, 260), 200)
    prepared = prepare_photograph(image, SETTINGS)
    left, top, right, bottom = prepared.box
    source, cut = np.asarray(image.crop(prepared.box)), np.asarray(prepared.image)
    x, y = (cut.shape[1] - (right - left)) // 2, (cut.shape[0] - (bottom - top)) // 2
    cut = cut[y : y + bottom - top, x : x + right - left]
    row, column = np.mgrid[: cut.shape[0], : cut.shape[1]]
    deep = (column + left - 320) ** 2 + (row + top - 260) ** 2 < 195**2
    assert deep.sum() > 100_000
    assert (cut[deep] == source[deep]).all()


def test_text_beside_the_disc_and_noise_around_it_are_black_afterwards() -> None:
    image = photograph((640, 480), (320, 240), 230, border=(6, 6, 6))
    pen = ImageDraw.Draw(image)
    for place in ((100, 15), (480, 20), (95, 440), (470, 450)):  # in the corners of the disc's own box
        pen.text(place, "DOE JANE 1947-03-02", fill=(255, 255, 255))
    prepared = prepare_photograph(jpeg(image, 60), SETTINGS)
    side = prepared.image.width
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    outside = np.asarray(prepared.image)[np.hypot(x, y) > 1.02 * 230]
    assert len(outside) > 10_000
    assert outside.max() == 0


def test_a_disc_cut_at_top_and_bottom_is_padded_with_black_and_keeps_its_shape() -> None:
    image = photograph((1000, 560), (500, 280), 330)
    prepared = prepare_photograph(jpeg(image), SETTINGS)
    assert prepared.box[1] == 0
    assert prepared.box[3] == 560
    assert 0.93 < prepared.quality["field"] < 0.98
    values = np.asarray(prepared.image)
    missing = (prepared.image.width - 560) // 2
    assert missing > 30
    assert values[: missing - 1].max() == 0
    assert values[-missing + 1 :].max() == 0
    assert values[missing + 5, values.shape[1] // 2].min() > 20


def test_a_picture_cropped_to_the_disc_keeps_all_but_its_black_corners() -> None:
    prepared = prepare_photograph(jpeg(photograph((224, 224), (112, 112), 128)), SETTINGS)
    assert prepared.box == (0, 0, 224, 224)
    assert prepared.image.size == (224, 224)
    assert 0.85 < prepared.quality["field"] < 0.97


def test_a_field_that_fills_the_frame_is_kept_whole() -> None:
    image = Image.fromarray(retina(400).clip(0, 255).astype(np.uint8)).crop((0, 40, 400, 360))
    prepared = prepare_photograph(image, SETTINGS)
    assert prepared.box == (0, 0, 400, 320)
    assert prepared.image.size == (400, 400)
    assert np.array_equal(np.asarray(prepared.image)[40:360], np.asarray(image))


def test_a_photograph_resized_to_another_shape_is_masked_as_an_ellipse() -> None:
    field = find_field(jpeg(photograph((300, 300), (150, 140), 110, squash=1.25)))
    assert field.disc is not None
    assert field.disc.a == pytest.approx(110, abs=3)
    assert field.disc.b == pytest.approx(137.5, abs=3)


def test_a_white_page_around_the_black_border_is_no_part_of_the_field() -> None:
    page = Image.new("RGB", (700, 640), (255, 255, 255))
    page.paste(photograph((560, 480), (280, 240), 200), (70, 80))
    prepared = prepare_photograph(jpeg(page), SETTINGS)
    assert np.abs(np.subtract(prepared.box, (150, 120, 550, 520))).max() < 8


def test_a_white_page_that_cuts_the_disc_leaves_no_white() -> None:
    page = Image.new("RGB", (700, 640), (255, 255, 255))
    page.paste(photograph((560, 400), (280, 200), 240), (70, 120))
    prepared = prepare_photograph(jpeg(page), SETTINGS)
    assert np.abs(np.subtract(prepared.box, (110, 120, 590, 520))).max() < 12
    values = np.asarray(prepared.image)
    assert values[:, :, 2].max() < 200  # the retina's blue is far below the page's


def test_half_of_the_disc_in_the_dark_does_not_move_it() -> None:
    values = np.asarray(photograph((600, 500), (300, 250), 220)).astype(np.float32)
    values *= np.clip((np.arange(600) - 150) / 200, 0, 1)[None, :, None]
    field = find_field(jpeg(Image.fromarray(values.astype(np.uint8))))
    assert field.disc is not None
    assert np.abs(np.subtract(field.disc, (300, 250, 220, 220))).max() < 9


def test_quality_does_not_depend_on_the_resolution() -> None:
    large = photograph((2400, 1800), (1200, 900), 850)
    small = large.resize((600, 450), Image.Resampling.BOX)
    first, second = (prepare_photograph(image, SETTINGS).quality for image in (large, small))
    for name, tolerance in (("sharpness", 0.1), ("illumination", 0.02), ("brightness", 0.02), ("field", 0.01)):
        assert first[name] == pytest.approx(second[name], abs=tolerance), name


def _blurred(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    return Image.fromarray(ndimage.gaussian_filter(values, (14, 14, 0)).astype(np.uint8))


def _defocused_disc() -> Image.Image:
    """The retina out of focus, the camera's aperture sharp."""
    sharp = photograph((600, 500), (300, 250), 220)
    soft = np.asarray(_blurred(Image.fromarray(retina(600)[:500].clip(0, 255).astype(np.uint8))))
    return Image.fromarray(np.where(np.asarray(sharp).max(axis=2, keepdims=True) > 0, soft, 0).astype(np.uint8))


def _with(change: str) -> Image.Image:
    values = np.asarray(photograph((600, 500), (300, 250), 220)).astype(np.float32)
    if change == "dark":
        values = values * 0.05
    elif change == "bright":
        values = values * 6
    elif change == "half":
        values[:, :300] = 0
    elif change == "gray":
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (_defocused_disc(), "blurred"),
        (_with("dark"), "too_dark"),
        (_with("bright"), "too_bright"),
        (_with("half"), "uneven_illumination"),
        (_with("gray"), "no_colour"),
        (_with("gray").convert("L"), "no_colour"),
        (photograph((600, 220), (300, 380), 300), "field_cut"),
        (Image.new("RGB", (400, 300)), "too_dark"),
        (Image.new("RGB", (400, 300), (255, 255, 255)), "no_field_of_view"),
        (Image.new("RGB", (400, 300), (180, 90, 40)), "blurred"),
        (Image.new("RGB", (9, 400), (180, 90, 40)), "no_field_of_view"),
    ],
    ids=["blurred", "dark", "bright", "half", "gray", "mode L", "cut", "black", "white", "uniform", "sliver"],
)
def test_an_unusable_frame_is_rejected_with_its_reason(image: Image.Image, code: str) -> None:
    assert reason(image) == code


def test_nothing_but_a_reason_comes_of_any_odd_picture(rng: random.Random) -> None:
    for _ in range(30):
        numbers = np.random.default_rng(rng.randrange(2**32))
        height, width = (int(number) for number in numbers.integers(1, 90, 2))
        coarse = numbers.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        noise = Image.fromarray(coarse).resize((width, height), Image.Resampling(int(numbers.integers(0, 4))))
        try:
            prepared = prepare_photograph(noise, RetinaSettings(0, 0, 1, 1, 0))
        except Rejected:
            continue
        assert prepared.image.width == prepared.image.height


def test_real_photographs_are_kept_and_radiographs_are_not(real_data: Path) -> None:
    kept = rejected = 0
    for folder in ("glaucoma", "normal"):
        for path in sorted((real_data / "fundus" / folder).iterdir())[::30]:
            image = Image.open(path).convert("RGB")
            try:
                prepared = prepare_photograph(image, SETTINGS)
            except Rejected:
                rejected += 1
                continue
            kept += 1
            assert prepared.quality["field"] > 0.8
    assert kept >= 40
    assert rejected <= 1
    for path in sorted((real_data / "mednist").glob("*/*"))[::200]:
        assert reason(Image.open(path)) == "no_colour"
        reason(Image.open(path).convert("RGB"))
